"""Make up results of runs that never were, and repositories of two commits, for tests that read them."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skylapse.benchmarks.harness import spread_of
from skylapse.benchmarks.record import (
    SCHEMA,
    Better,
    Check,
    Comparison,
    Contestant,
    Curve,
    KernelReport,
    LeaseReport,
    Measurement,
    Row,
    SuiteReport,
)

MACHINE = {
    "commit": "abc1234",
    "dirty": False,
    "python": "3.11.7",
    "torch": "2.13.0",
    "threads": 1,
    "cpus": 2,
    "processor": "made up",
    "device": "cpu",
}


def around(median: float, n: int = 24, noise: float = 0.02, seed: int = 0) -> list[float]:
    rng = random.Random(f"{seed} {median}")
    return [median * rng.uniform(1 - noise, 1 + noise) for _ in range(n)]


def measurement(name: str, samples: Sequence[float], unit: str = "s", better: Better = "lower", **labels: Any) -> Any:
    values = list(samples)
    return Measurement(name=name, unit=unit, better=better, spread=spread_of(values), samples=values, labels=labels)


def comparison(name: str, samples: Sequence[float], of: str = "exact", to: str = "ours") -> Comparison:
    return Comparison(name=name, of=of, to=to, spread=spread_of(list(samples)), samples=list(samples))


def report(
    benchmark: str,
    measurements: Sequence[Any] = (),
    comparisons: Sequence[Comparison] = (),
    curves: Sequence[Curve] = (),
    machine: Mapping[str, Any] | None = None,
    **fields: Any,
) -> SuiteReport:
    asked: dict[str, Any] = {"quick": False, "partial": None, "seed": 0, "model": "demo", "settings": {}} | fields
    return SuiteReport(
        schema=SCHEMA,
        benchmark=benchmark,
        suite="cpu",
        machine=MACHINE | dict(machine or {}),
        elapsed_s=12.5,
        measurements=list(measurements),
        comparisons=list(comparisons),
        curves=list(curves),
        **asked,
    )


def kernels(seconds: float = 1e-3, machine: Mapping[str, Any] | None = None) -> KernelReport:
    def took(median: float) -> Contestant:
        return Contestant(status="ok", seconds=spread_of(around(median)), roofline_share=0.5)

    contestants = {"skylapse": took(seconds), "torch": took(2 * seconds), "xformers": Contestant(status="missing")}
    return KernelReport(
        schema=SCHEMA,
        suite="cpu",
        quick=False,
        machine=MACHINE | dict(machine or {}),
        elapsed_s=3.0,
        partial=None,
        seed=0,
        limits={"bytes_per_s": spread_of([4e10] * 6), "operations_per_s": spread_of([9e10] * 6)},
        checks=[],
        rows=[
            Row(op=op, case="small", ours="skylapse", num_bytes=10**6, operations=operations, contestants=contestants)
            for op, operations in (("attention", 10**7), ("adaln", 10**5), ("patch_embed", 0))
        ],
    )


def goodput() -> SuiteReport:
    """Curves, and latencies of requests."""
    rng = random.Random(0)
    loads = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    curves = [
        Curve(
            name=f"goodput/seed0/{name}",
            x="offered load, req/s",
            y="goodput, req/s",
            points=[(load, min(load, best) * (1 if load <= best else 0.7)) for load in loads],
        )
        for name, best in (("skylapse", 1.0), ("ray_serve_diffusers", 0.5))
    ]
    curves += [
        Curve(name=f"{one.name}/trace{k}", x=one.x, y=one.y, points=[(x, y * (1 + 0.1 * k)) for x, y in one.points])
        for one in curves
        for k in (-1, 1)
    ]
    waits = {
        name: [mean * (0.4 + rng.expovariate(1.0)) for _ in range(60)]
        for name, mean in (("skylapse", 1.0), ("ray_serve_diffusers", 2.5))
    }
    found = [measurement(f"goodput/load0.8/{name}", samples) for name, samples in waits.items()]
    found.append(measurement("goodput/load0.8/lag/skylapse", around(0.002)))
    return report("goodput", found, [], curves)


def quality() -> SuiteReport:
    ways = {
        "cache=high": (48.4, 1.7),
        "cache=balanced": (40.4, 2.7),
        "cache=fast": (36.8, 3.3),
        "quantize=int8": (41.0, 1.05),
        "steps=20": (44.0, 1.5),
        "steps=12": (36.5, 2.5),
        "steps=9": (33.0, 3.3),
    }
    found = [measurement(f"quality/psnr_pooled/{way}", around(db), "dB", "higher") for way, (db, _) in ways.items()]
    ratios = [comparison(f"quality/denoise/{way}", around(faster), to=way) for way, (_, faster) in ways.items()]
    return report("quality", found, ratios)


def memory() -> SuiteReport:
    found = []
    for frames in (5, 9, 17, 33):
        found.append(measurement(f"memory/64x64x{frames}/exact", [frames * 1.1e6], "bytes"))
        found.append(measurement(f"memory/64x64x{frames}/exact/predicted", [frames * 1.2e6], "bytes", "neither"))
    return report("memory", found)


def lease() -> LeaseReport:
    """Return a report of a made-up GPU: kernels compared, two checks of which one is wrong, and predicted peaks."""
    of_kernels = kernels(machine={"device": "a synthetic GPU"})
    found = [measurement("blocks/14B, one branch/bf16", around(0.05))]
    for size, gib in (("480p", 3.0), ("720p", 7.0)):
        found.append(measurement(f"peaks/14B {size}, one branch/step", [gib * 2**30], "bytes"))
        found.append(measurement(f"peaks/14B {size}, one branch/step/predicted", [gib * 2**30], "bytes", "neither"))
    checks = [
        Check(op="adaln", case="bfloat16", status="ok", worst=0.01, tolerance=0.06, runs=20),
        Check(op="attention", case="head 64", status="wrong", worst=0.5, tolerance=0.06, runs=20),
    ]
    return LeaseReport(
        schema=SCHEMA,
        suite="a synthetic GPU",
        quick=False,
        machine=of_kernels.machine,
        elapsed_s=420.0,
        partial="not run: tune",
        seed=0,
        model="random weights",
        settings={},
        measurements=found,
        failures={"vae/decode": "OutOfMemoryError: CUDA out of memory"},
        limits=of_kernels.limits,
        checks=checks,
        rows=of_kernels.rows,
    )


def git(folder: Path, *words: str) -> str:
    settings = (
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b.c",
        "-c",
        "init.defaultBranch=main",
        "-c",
        "commit.gpgsign=false",
    )
    return subprocess.run(
        ["git", *settings, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def repository(folder: Path) -> Path:
    """Make a repository of two commits, each with a package of one line."""
    folder.mkdir()
    git(folder, "init")
    for version in ("first", "second"):
        (folder / "__init__.py").write_text(f'VERSION = "{version}"\n')
        git(folder, "add", ".")
        git(folder, "commit", "-m", version)
    return folder
