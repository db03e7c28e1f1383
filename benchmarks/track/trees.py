"""Two trees as packages of the same name, and a process for each that runs its workloads in turns with the other."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
START_S = 300.0  # for a process to import and load a model; 25 s on a machine with 5 busy processes a core
RUN_S = 120.0  # for a workload, of about a tenth of a second
# Memory that was freed is kept and used again. As glibc has it, each large tensor is mapped and unmapped, or not, by
# what happened before: decoders of one and the same tree differed by up to 7 % in CPU time, and by 0.5 % with these.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "67108864"}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Broken(Exception):
    """A tree that does not run: its name, None where it is both, and why."""

    def __init__(self, tree: str | None, why: str) -> None:
        super().__init__(why)
        self.tree = tree


@dataclass(frozen=True)
class Tree:
    """path: a folder whose only entry is the package, called `skylapse` whatever its folder is called."""

    name: str
    path: Path


# --- the trees --------------------------------------------------------------------------------------------------------


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """What it prints; None where it fails, as outside a repository and without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def merge_base(root: Path = ROOT) -> str | None:
    """Where this branch left main; the commit before on main itself. None where the history is too shallow to tell."""
    head = git("rev-parse", "HEAD", root=root)
    base = git("merge-base", "HEAD", "origin/main", root=root) or git("merge-base", "HEAD", "main", root=root)
    if base is None or base != head:
        return base
    return git("rev-parse", "--verify", "--quiet", "HEAD^", root=root)


def commit_of(revision: str, root: Path = ROOT) -> str | None:
    return git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", root=root)


@contextmanager
def trees(baseline: str, root: Path = ROOT) -> Iterator[tuple[Tree, Tree]]:
    """(the baseline, the working tree); baseline: a folder with a tree, or a commit, which is unpacked.

    A commit comes out of `git archive` into a temporary folder, so the repository is left as it was, however this ends.
    """
    folder = Path(baseline)
    commit = None if folder.is_dir() else commit_of(baseline, root)
    if commit is None and not (folder / "__init__.py").is_file():
        raise ValueError(f"baseline must be a commit or a folder with a tree of skylapse, got {baseline!r}")
    with tempfile.TemporaryDirectory(prefix="skylapse-gate-") as temporary:
        base, ours = Path(temporary) / "base", Path(temporary) / "tree"
        base.mkdir()
        ours.mkdir()
        (ours / "skylapse").symlink_to(root, target_is_directory=True)
        if commit is None:
            (base / "skylapse").symlink_to(folder.resolve(), target_is_directory=True)
        else:
            unpack(commit, base, root)
        yield Tree(commit[:12] if commit else folder.name, base), Tree("this tree", ours)


def unpack(commit: str, into: Path, root: Path) -> None:
    archive = ["git", "archive", "--format=tar", "--prefix=skylapse/", commit]
    with subprocess.Popen(archive, cwd=root, stdout=subprocess.PIPE) as packing:
        subprocess.run(["tar", "-x", "-C", str(into)], stdin=packing.stdout, check=True)
    if packing.returncode != 0:
        raise ValueError(f"baseline must be a commit that git can unpack, got {commit}")


# --- their processes --------------------------------------------------------------------------------------------------


class Pair:
    """Both trees' processes, that take turns; ended by `close`."""

    def __init__(self, both: tuple[Tree, Tree], model: str, names: Sequence[str]) -> None:
        self.both = both
        settings = {
            "SKYLAPSE_THREADS": "1",
            "SKYLAPSE_DECODER": "eager",  # or a build of another decoder would run beside what is measured
            "SKYLAPSE_PROFILE_DIR": "profiles",  # in the folder of each
            "PYTHONHASHSEED": "0",
            **dict.fromkeys(THREADS, "1"),
            **MALLOC,
        }
        command = ["env", *(f"{name}={value}" for name, value in settings.items())]
        # -P: the folder of worker.py is no place for imports, its statistics.py is not the standard library's.
        command += [sys.executable, "-P", str(WORKER), model, *(str(tree.path) for tree in both), *names]
        self._log = both[0].path.parent / "stderr"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self._unread = b""

    def ready(self) -> dict[str, str]:
        """Waits for the models; each workload that one of them cannot do, with which one and why."""
        missing: dict[str, str] = {}
        told = self._answer(START_S)
        for tree, side in zip(self.both, told, strict=True):
            if side is None:
                raise self._broken(tree, "ended")
            if Path(side["package"]) != (tree.path / "skylapse").resolve():
                raise Broken(tree.name, f"{tree.name} imported skylapse from elsewhere")
            for name, reason in side["workloads"].items():
                if reason is not None:
                    missing.setdefault(name, f"{tree.name}: {reason}")
        return missing

    def run(self, side: int, name: str, slower: float = 0.0) -> float:
        """CPU seconds of one run of a workload."""
        assert self._process.stdin is not None
        told = json.dumps({"side": side, "run": name, "slower": slower}) + "\n"
        with suppress(BrokenPipeError):
            self._process.stdin.write(told.encode())
            self._process.stdin.flush()
        answer = self._answer(RUN_S)
        if answer is None:
            raise self._broken(self.both[side], f"ended in {name}")
        return float(answer["cpu_s"])

    def close(self) -> None:
        """Its forks end with it: what they are asked by closes."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, within_s: float) -> Any:
        out = self._process.stdout
        assert out is not None
        until = time.monotonic() + within_s
        while b"\n" not in self._unread:
            if not select.select([out], [], [], max(0.0, until - time.monotonic()))[0]:
                raise self._broken(None, f"said nothing for {within_s:g} s")
            read = os.read(out.fileno(), 65536)
            if not read:
                raise self._broken(None, f"ended with {self._process.wait()}")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _broken(self, tree: Tree | None, what: str) -> Broken:
        log = self._log if tree is None else tree.path / "stderr"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        name = "both trees" if tree is None else tree.name
        return Broken(
            tree.name if tree else None, f"the process of {name} {what}{f': {lines[-1][:300]}' if lines else ''}"
        )


@contextmanager
def processes(both: tuple[Tree, Tree], model: str, names: Sequence[str]) -> Iterator[Pair]:
    pair = Pair(both, model, names)
    try:
        yield pair
    finally:
        pair.close()
