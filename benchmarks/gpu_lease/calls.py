"""The calls of a lease in their order, and the command of each on the device machine."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "skylapse.benchmarks.gpu_lease"
LIMIT_S = 540  # of a call that may take 600: what is left is for writing
TIMEOUT_S = 600
HELD = ".lease"  # a folder of the checkout that git ignores: journals of earlier calls, carried to each
WHEELS = ".whl"  # another one, where there are peers to bring: wheels that are installed before a call


@dataclass(frozen=True)
class Call:
    """A script of this folder."""

    name: str
    what: str


CALLS = (
    Call("checks", "doctor, and every kernel against float64; captured launches replayed"),
    Call("attention", "attention at Wan's shapes by every backend that can be had, which `bench pick` reads"),
    Call("memory_bound", "memory-bound operations and linear layers, bf16 and 8 bits"),
    Call("blocks", "random 14B blocks at 32,760 and 75,600 tokens: time, peak bytes, model FLOPs use"),
    Call("vae", "the VAEs at real width: seconds, peak bytes, bf16's error"),
    Call("engine", "the engine with random 1.3B weights at 480p: admission, peak, overlap of decoding and steps"),
    Call("tune", "launches of this architecture, the most used first"),
)


def call_named(name: str) -> Call:
    return next(call for call in CALLS if call.name == name)


def device_command(call: Call) -> str:
    """Return the command for the checkout's root there: it makes the root the package, and imports nothing else of it.

    Python puts the working directory on its path unless told not to, and this root has folders called `kernels`,
    `compile` and `runtime`, names under which other packages look for their own.
    """
    words = [
        f'mkdir -p /tmp/pkg && ln -sfn "$PWD" /tmp/pkg/skylapse && mkdir -p {HELD}',
        f"if ls {WHEELS}/*.whl >/dev/null 2>&1; then python3 -m pip install -q --no-index --no-deps --no-compile "
        f"--no-cache-dir --upgrade --target /tmp/pkg {WHEELS}/*.whl; fi",
        f"PYTHONPATH=/tmp/pkg PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 python3 -m {PACKAGE}.{call.name} "
        f'--out "$OUT" --resume {HELD} --limit-s {LIMIT_S}{_commit()}',
    ]
    return "; ".join(words)


def listing() -> str:
    """Return the calls for people: what to run, with what, and what to keep."""
    parts = [
        f"Each call: timeout_s {TIMEOUT_S}, carry {HELD} (journals of earlier calls; it may be empty), and "
        f"{WHEELS} if wheels of peers lie there: none is needed. Behind each "
        f"call copy what came back into {HELD}, so that the next call and a repeated one know what is done:",
        f"    mkdir -p {HELD} && echo /{HELD}/ >> .git/info/exclude && cp -f FILES_AT/* {HELD}/",
        "At the end: python -m skylapse.benchmarks.gpu_lease --merge .lease --out bench-results",
    ]
    for number, call in enumerate(CALLS, start=1):
        parts += ["", f"# {number}. {call.name}: {call.what}", f"# carry: {HELD}"]
        parts.append(device_command(call))
    return "\n".join(parts)


def _commit() -> str:
    """Return the option that names the commit, since the machine's copy may lack git; "" where files differ from it."""
    done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or done.stdout.strip():
        return ""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return f" --commit {shlex.quote(head.stdout.strip())}"
