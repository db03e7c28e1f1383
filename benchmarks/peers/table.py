"""The tables of a result of `peers`, as the documents show them."""

from __future__ import annotations

import statistics

from ..record import Comparison, Measurement, SuiteReport

TITLES = (
    "whole s",
    "diffusers' time over it (quartiles)",
    "of CPU time",
    "encode s",
    "denoise s",
    "decode s",
    "PSNR dB",
    "worst frame",
    "SSIM",
    "flicker",
    "spectrum dB",
    "peak MiB",
)


def markdown(report: SuiteReport) -> str:
    """A row a contestant, medians; quality: means, each beside its own uncached clip. Below: what was left out."""
    found = {one.name: one for one in report.measurements}
    ratios = {one.name: one for one in report.comparisons}
    groups = list(dict.fromkeys(name.partition("/whole/")[0] for name in found if "/whole/" in name))
    lines = [("contestant", *TITLES), ("---",) * (1 + len(TITLES))]
    for group in groups:
        start = f"{group}/whole/"
        lines += [
            _row(found, ratios, group, name.removeprefix(start))
            for name in found
            if name.startswith(start) and "/" not in name.removeprefix(start)
        ]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    for group in groups:
        apart = found.get(f"{group}/largest_difference/exact")
        if apart is not None:
            share = 100 * max(found[f"{group}/off_by_more_than_1/exact"].samples)
            text += ["", f"Our exact frames and diffusers' differ by at most {max(apart.samples):.0f} of 255;"]
            text[-1] += f" at most {share:.2g} % of values by more than 1."
    left_out = {name.rsplit("/", 1)[1]: reason for name, reason in (report.missing | report.failures).items()}
    if left_out:
        text += ["", "Left out: " + "; ".join(f"{name} ({reason})" for name, reason in left_out.items()) + "."]
    return "\n".join(text)


def _row(found: dict[str, Measurement], ratios: dict[str, Comparison], group: str, name: str) -> tuple[str, ...]:
    def seconds(stage: str) -> str:
        return f"{found[f'{group}/{stage}/{name}'].spread.median:.3f}"

    def mean(metric: str, form: str) -> str:
        one = found.get(f"{group}/{metric}/{name}")
        return format(statistics.mean(one.samples), form) if one else ""

    ratio = ratios.get(f"{group}/whole/{name}")
    cpu = ratios.get(f"{group}/whole/{name}/cpu")
    peak = found.get(f"{group}/peak_bytes/{name}")
    return (
        f"`{name}`",
        seconds("whole"),
        f"{ratio.spread.median:.2f}x ({ratio.spread.q1:.2f}-{ratio.spread.q3:.2f})" if ratio else "",
        f"{cpu.spread.median:.2f}x" if cpu else "",
        seconds("encode"),
        seconds("denoise"),
        seconds("decode"),
        mean("psnr_pooled", ".1f"),
        mean("psnr_worst", ".1f"),
        mean("ssim_mean", ".4f"),
        mean("flicker", ".3f"),
        mean("spectrum", ".2f"),
        f"{peak.spread.median / 2**20:.0f}" if peak else "",
    )
