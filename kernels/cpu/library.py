"""The operators' library: compiled once where a C++ compiler is, for every kind of processor that may run it.

What is compiled lies in the artifact that uses it, so that one baked into an image needs no compiler. An image keeps
the libraries too, beside the sources, and builds artifacts of other models without one:
`python -m skylapse.kernels.cpu.library` puts them there. An operator works on frames [T, H, W, C] of fp32;
`compile/native.py` says which there are and what each computes.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
READY = HERE / "ready"  # libraries that were compiled before, in a folder named by their digest
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-shared", "-fPIC")
TIMEOUT_S = 300.0
# torch's name of what a processor can do -> options; what it does not know runs none of these.
X86: dict[str, Sequence[str]] = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
ARM: dict[str, Sequence[str]] = {"NEON": ()}


def level() -> str | None:
    """Which of the libraries this processor runs."""
    levels = _levels()
    if levels is ARM:
        return "NEON"
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in levels else None


def compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def can_build() -> bool:
    """Whether there is a compiler, or every library is ready."""
    return compiler() is not None or all((READY / digest() / name_of(each)).is_file() for each in _levels())


def name_of(level: str) -> str:
    return f"operators-{level.lower()}.so"


@cache
def digest() -> str:
    """Of the sources and of how they are compiled."""
    texts = [path.read_bytes() for path in _sources()]
    return hashlib.sha256(b"".join([*texts, repr((FLAGS, X86, ARM)).encode()])).hexdigest()[:16]


def build(folder: Path) -> None:
    """Put a library for each level of this architecture into a folder; RuntimeError has the compiler's own words."""
    for each in _levels():
        (folder / name_of(each)).write_bytes(_compiled(each))


@cache
def _compiled(level: str) -> bytes:
    ready = READY / digest() / name_of(level)
    if ready.is_file():
        return ready.read_bytes()
    found = compiler()
    if found is None:
        raise RuntimeError("a C++ compiler is needed: install g++")
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / name_of(level)
        command = [found, *FLAGS, *_levels()[level], str(HERE / "operators.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{found} has not compiled the operators within {TIMEOUT_S:g} s") from None
        if done.returncode:
            raise RuntimeError(f"{found} cannot compile the operators: {done.stderr.strip()[-500:]}")
        return made.read_bytes()


def _levels() -> dict[str, Sequence[str]]:
    """Of this architecture, with the options of each."""
    machine = platform.machine()
    return X86 if machine in ("x86_64", "AMD64") else ARM if machine in ("aarch64", "arm64") else {}


def _sources() -> list[Path]:
    return sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the libraries now, into the folder beside the sources."""
    parser = argparse.ArgumentParser(prog="python -m skylapse.kernels.cpu.library", description=main.__doc__)
    parser.parse_args(arguments)
    folder = READY / digest()
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    print(*sorted(path.name for path in folder.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
