"""Set the variables by which OpenMP waits and MKL adds up; both read them once, when torch is imported."""

from __future__ import annotations

import os

# Turns of a loop in which a thread waits for the others of its operation before it sleeps: 0.5 ms at 140 cycles a turn.
# libgomp's own 300,000 are 14 ms, for which a thread burns a core that the one it waits for may need
# (benchmarks/results/cpu/neighbours.json). None at all, as OMP_WAIT_POLICY=passive has it, costs much on some hosts.
SPINS = 10_000


def prepare() -> None:
    """Set those that the operator has not set. This has no effect once torch is imported.

    MKL then computes the same bits with any number of threads (Intel oneMKL, "Conditional numerical reproducibility";
    other processors would get its slowest code, and are left alone).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    if _is_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def mkl_is_strict() -> bool:
    return os.environ.get("MKL_CBWR", "").upper().endswith(",STRICT")


def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as facts:
            return "GenuineIntel" in facts.read(256)
    except OSError:
        return False
