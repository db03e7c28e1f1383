"""The table of a result of `quality`, as the documents show it."""

from __future__ import annotations

import statistics

from ..record import Measurement, SuiteReport

TITLES = (
    "evaluations",
    "speed-up (quartiles)",
    "PSNR dB (quartiles)",
    "fewer steps'",
    "mean frame",
    "worst frame",
    "of motion",
    "SSIM",
    "SSIM p5",
    "flicker",
    "spectrum dB",
    "judge, worst",
    "state KiB",
)


def markdown(report: SuiteReport, only: str = "") -> str:
    """A row a way, means over prompts; only: of the ways whose names begin so ("cache=", "quantize=").

    fewer steps': PSNR of the exact model in as many steps as the way computes; judge, worst: points by which the worst
    of its scores lies above the exact clips'. A column of which nothing is known is left empty.
    """
    found = {one.name: one for one in report.measurements}
    ways = [name.split("/", 2)[2] for name in found if name.startswith("quality/psnr_pooled/")]
    rows = [_row(report, found, way) for way in ways if way.startswith(only)]
    lines = [("", *TITLES), ("---",) * (1 + len(TITLES)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(report: SuiteReport, found: dict[str, Measurement], way: str) -> tuple[str, ...]:
    def mean(metric: str) -> float:
        return statistics.mean(found[f"quality/{metric}/{way}"].samples)

    psnr = found[f"quality/psnr_pooled/{way}"].spread
    work = found[f"quality/evaluations/{way}"]
    speed = next((one.spread for one in report.comparisons if one.name == f"quality/denoise/{way}"), None)
    kind, _, value = way.partition("=")
    control = found.get(f"quality/psnr_pooled/steps={round(mean('evaluations'))}") if kind == "cache" else None
    state = float(work.labels.get("state_bytes", 0))
    return (
        f"{value} of {report.settings['steps']} steps" if kind == "steps" else f"`{value}`" if value else way,
        f"{mean('evaluations'):.1f}",
        f"{speed.median:.2f}x ({speed.q1:.2f}-{speed.q3:.2f})" if speed else "",
        f"{mean('psnr_pooled'):.1f} ({psnr.q1:.1f}-{psnr.q3:.1f})",
        f"{statistics.mean(control.samples):.1f}" if control else "",
        f"{mean('psnr_mean'):.1f}",
        f"{mean('psnr_worst'):.1f}",
        f"{mean('psnr_motion'):.1f}",
        f"{mean('ssim_mean'):.4f}",
        f"{mean('ssim_p5'):.4f}",
        f"{mean('flicker'):.3f}",
        f"{mean('spectrum'):.2f}",
        _judge(found, way),
        f"{state / 1024:.0f}" if state else "",
    )


def _judge(found: dict[str, Measurement], way: str) -> str:
    """On the same prompts: a run that ended early has fewer of some ways than of the exact clips."""
    its, exact = found.get(f"quality/judge/{way}"), found.get("quality/judge/exact")
    if its is None or exact is None or its.spread.n != exact.spread.n:
        return ""
    return f"{100 * min(float(its.labels[name]) - float(exact.labels[name]) for name in exact.labels):+.1f}"
