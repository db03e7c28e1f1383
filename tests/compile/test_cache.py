"""The engine cache: what is altered, torn, stale, foreign or impossible is built again or remembered, never loaded."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from skylapse.compile import cache as module
from skylapse.compile.cache import Artifact, BuildFailed, EngineCache, Key

FIELDS = {"coder": "aaaa", "plan": {"size": [4, 6]}, "versions": {"runner": "1.0"}, "device": "cpu"}
KEY = Key(FIELDS)


class Builder:
    """A fake runner's builder: one file, and a count of how often it was asked."""

    def __init__(self, text: str = "a plan", error: Exception | None = None) -> None:
        self.text, self.error, self.calls = text, error, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "plan.bin").write_text(self.text)
        if self.error is not None:
            raise self.error


def text_of(artifact: Artifact | None) -> str | None:
    return None if artifact is None else (artifact.folder / "plan.bin").read_text()


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def names(cache: EngineCache) -> list[str]:
    """Of everything in the folder but locks, ordinary or not."""
    return sorted(path.name for path in cache.root.iterdir() if path.suffix != ".lock")


def test_built_once_and_found_by_the_next_process(cache: EngineCache) -> None:
    builder = Builder()
    assert cache.find(KEY) is None
    assert text_of(cache.build(KEY, builder)) == "a plan"
    again = EngineCache(cache.root)
    assert text_of(again.find(KEY)) == "a plan" and text_of(again.build(KEY, builder)) == "a plan"
    assert builder.calls == 1 and names(cache) == [KEY.id]


@pytest.mark.parametrize(
    "change",
    [
        {"coder": "bbbb"},
        {"device": "cuda H100 sm90"},
        {"versions": {"runner": "1.1"}},
        {"plan": {"size": [8, 6]}},
        {"options": {"level": 5}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_was_built_of_something_else_is_not_found(cache: EngineCache, change: dict[str, object]) -> None:
    cache.build(KEY, Builder("of the old"))
    other = Key({**FIELDS, **change})
    assert cache.find(other) is None
    assert text_of(cache.build(other, Builder("of the new"))) == "of the new"
    assert text_of(cache.find(KEY)) == "of the old"


@pytest.mark.parametrize("damage", ["altered", "torn", "gone", "sidecar"])
def test_damaged_artifact_is_built_again(cache: EngineCache, damage: str) -> None:
    plan = cache.build(KEY, Builder()).folder / "plan.bin"
    if damage == "altered":
        plan.write_text("b plan")  # as long as before
    elif damage == "torn":
        plan.write_text("a")
    elif damage == "gone":
        plan.unlink()
    else:
        (plan.parent / "artifact.json").write_text("{")
    assert cache.find(KEY) is None and names(cache) == []
    assert text_of(cache.build(KEY, Builder("new"))) == "new"


def test_another_artifact_in_its_place_is_not_loaded(cache: EngineCache) -> None:
    """A folder renamed by hand: every file is sound, and it is of other weights."""
    other = Key({**FIELDS, "coder": "bbbb"})
    cache.build(other, Builder("of others")).folder.rename(cache.root / KEY.id)
    assert cache.find(KEY) is None
    assert text_of(cache.build(KEY, Builder("its own"))) == "its own"


def test_artifact_that_does_not_load_is_built_again_once(cache: EngineCache) -> None:
    cache.build(KEY, Builder("made by another version"))
    builder = Builder("good")

    def load(folder: Path) -> str:
        text = (folder / "plan.bin").read_text()
        if text != "good":
            raise RuntimeError("cannot deserialize")
        return text

    assert cache.load(KEY, builder, load) == "good" and builder.calls == 1
    with pytest.raises(RuntimeError, match="cannot deserialize"):
        cache.load(Key({**FIELDS, "coder": "cccc"}), Builder("bad"), load)


def test_failed_build_leaves_nothing_and_is_not_tried_again_for_a_while(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = Builder(error=RuntimeError("no tactic for node 7"))
    with pytest.raises(BuildFailed, match="RuntimeError: no tactic for node 7"):
        cache.build(KEY, builder)
    assert names(cache) == [f"{KEY.id}.failed.json"]
    with pytest.raises(BuildFailed, match=r"node 7 \(tried before; tried again in 1440 min\)"):
        EngineCache(cache.root).build(KEY, builder)
    assert builder.calls == 1
    later_s = time.time() + module.RETRY_S + 1
    monkeypatch.setattr(time, "time", lambda: later_s)
    assert cache.failure(KEY) is None
    assert text_of(cache.build(KEY, Builder())) == "a plan"
    assert names(cache) == [KEY.id]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("the builder needs 40 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB"),
        RuntimeError("TensorRT's build failed: no plan came of it; Error Code 2: OutOfMemory (Requested size was 9)"),
    ],
    ids=["host", "torch", "tensorrt"],
)
def test_build_that_ran_out_of_memory_is_tried_again_soon(cache: EngineCache, error: Exception) -> None:
    with pytest.raises(BuildFailed):
        cache.build(KEY, Builder(error=error))
    failure = cache.failure(KEY)
    assert failure is not None and failure.until - time.time() <= module.RETRY_SOON_S < module.RETRY_S


def test_who_asks_for_it_builds_again_at_once(cache: EngineCache) -> None:
    cache.fail(KEY, "killed by signal 9")
    assert text_of(cache.build(KEY, Builder(), again=True)) == "a plan"
    assert cache.failure(KEY) is None


def test_full_disk_fails_the_build_alone(cache: EngineCache) -> None:
    cache.build(Key({**FIELDS, "coder": "other"}), Builder())
    with pytest.raises(BuildFailed, match="No space left on device"):
        cache.build(KEY, Builder(error=OSError(errno.ENOSPC, "No space left on device")))
    failure = cache.failure(KEY)
    assert failure is not None and failure.until - time.time() <= module.RETRY_SOON_S
    assert not [name for name in names(cache) if name.startswith(".")]
    assert cache.find(Key({**FIELDS, "coder": "other"})) is not None


def test_disk_that_is_full_for_the_note_too_is_told(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(BuildFailed, match="No space left"):
        cache.build(KEY, Builder(error=OSError(errno.ENOSPC, "No space left on device")))
    assert names(cache) == []


def test_two_builders_at_once_build_once(cache: EngineCache) -> None:
    """The second waits for the first, and takes what it has made."""
    begun, go_on, built = threading.Event(), threading.Event(), []

    def slow(folder: Path) -> None:
        begun.set()
        assert go_on.wait(30)
        (folder / "plan.bin").write_text("the first's")

    first = threading.Thread(target=lambda: built.append(text_of(cache.build(KEY, slow))))
    first.start()
    assert begun.wait(30)
    second = Builder("the second's")
    waiting = threading.Thread(target=lambda: built.append(text_of(EngineCache(cache.root).build(KEY, second))))
    waiting.start()
    with pytest.raises(BuildFailed, match="another process has held"):
        cache.build(KEY, second, wait_s=0.1)
    assert cache.find(KEY) is None  # nothing is seen of an unfinished one
    go_on.set()
    first.join(30)
    waiting.join(30)
    assert built == ["the first's"] * 2 and second.calls == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from skylapse.compile.cache import EngineCache, Key

def build(folder):
    (folder / "plan.bin").write_text("half a pl")
    os.kill(os.getpid(), signal.SIGKILL)

EngineCache(Path(sys.argv[1])).build(Key(eval(sys.argv[2])), build)
"""


def test_process_killed_in_mid_write_leaves_no_artifact_and_no_lock(cache: EngineCache) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache.root), repr(FIELDS)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name for name in names(cache) if name.startswith(".building")]  # what it has left
    assert cache.find(KEY) is None
    assert text_of(cache.build(KEY, Builder(), wait_s=5)) == "a plan"
    assert names(cache) == [KEY.id]


def test_read_only_shared_folder_is_read_and_never_written_to(tmp_path: Path) -> None:
    baked = EngineCache(tmp_path / "baked")
    sidecar = baked.build(KEY, Builder("baked")).folder / "artifact.json"
    before = sidecar.stat().st_mtime_ns, names(baked)
    for path in (baked.root / KEY.id, baked.root):
        path.chmod(0o555)
    try:
        cache = EngineCache(tmp_path / "own", shared=[baked.root])
        assert text_of(cache.find(KEY)) == "baked" and not cache.root.exists()
        other = Key({**FIELDS, "coder": "bbbb"})
        assert text_of(cache.build(other, Builder("own"))) == "own"
        assert names(baked) == before[1]
        assert text_of(cache.find(other)) == "own"
    finally:
        for path in (baked.root, baked.root / KEY.id):
            path.chmod(0o755)


def test_damaged_shared_artifact_is_hidden_by_one_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    baked = EngineCache(tmp_path / "baked")
    (baked.build(KEY, Builder("baked")).folder / "plan.bin").write_text("altered")
    cache = EngineCache(tmp_path / "own", shared=[baked.root])
    monkeypatch.setattr(EngineCache, "discard", lambda self, folder: None)  # as a read-only folder lets it
    assert cache.find(KEY) is None
    assert text_of(cache.build(KEY, Builder("own"))) == "own" and text_of(cache.find(KEY)) == "own"


def test_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BuildFailed, match="file/engines cannot be written to: Not a directory"):
        EngineCache(tmp_path / "file" / "engines").build(KEY, Builder())


def test_what_was_used_longest_ago_leaves_when_it_is_full(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, max_bytes=25)
    keys = [Key({**FIELDS, "coder": str(index)}) for index in range(3)]
    for age, key in zip((30, 20), keys, strict=False):
        folder = cache.build(key, Builder("ten bytes.")).folder
        os.utime(folder / "artifact.json", (time.time() - age, time.time() - age))
    assert cache.find(keys[0]) is not None  # used now, so the second has waited longest
    cache.build(keys[2], Builder("ten bytes."))
    assert [cache.find(key) is not None for key in keys] == [True, False, True]
    assert len(cache.entries()) == 2
    alone = EngineCache(tmp_path / "small", max_bytes=5)
    assert alone.build(KEY, Builder("ten bytes.")).num_bytes == 10  # the newest stays, however large


def test_sidecar_tells_what_it_was_built_of(cache: EngineCache) -> None:
    told = json.loads((cache.build(KEY, Builder()).folder / "artifact.json").read_text())
    assert told["fields"] == FIELDS and told["files"]["plan.bin"]["bytes"] == 6 and told["build_s"] >= 0
