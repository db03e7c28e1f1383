"""Artifacts: written once, whole or not at all, read by ranges, and never outside their folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from skylapse.serve import artifacts
from skylapse.serve.artifacts import ArtifactStore

KEY = "jobs/video_1/1/video.mp4"
DATA = bytes(range(256)) * 20


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    """A folder, and fsspec's file system in memory, which has no rename and no folders, as buckets have none."""
    store = ArtifactStore(str(tmp_path) if request.param == "folder" else f"memory://{tmp_path}")
    yield store
    store.remove("jobs")


def test_what_was_written_is_read_whole_and_in_ranges(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(DATA)
    for key, source in ((KEY, DATA), ("jobs/video_1/2/video.mp4", tmp_path / "clip")):
        artifact = store.write(key, source)
        assert (artifact.key, artifact.num_bytes, artifact.sha256) == (key, 5120, hashlib.sha256(DATA).hexdigest())
        assert b"".join(store.read(key)) == DATA and store.size(key) == 5120
        assert b"".join(store.read(key, 100, 300)) == DATA[100:300]
        assert b"".join(store.read(key, 5000, 9000)) == DATA[5000:] and b"".join(store.read(key, 6000)) == b""


def test_a_key_is_written_once(store: ArtifactStore) -> None:
    store.write(KEY, b"right")
    with pytest.raises(FileExistsError, match=KEY):
        store.write(KEY, b"wrong")
    assert b"".join(store.read(KEY)) == b"right"


def test_large_files_come_in_pieces(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 1000)
    store.write(KEY, DATA)
    assert [len(piece) for piece in store.read(KEY, 10, 2510)] == [1000, 1000, 500]


def test_a_file_that_is_not_there_is_not_found_before_the_first_piece(store: ArtifactStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.read(KEY)
    with pytest.raises(FileNotFoundError):
        store.size(KEY)


def test_a_jobs_files_are_listed_and_removed_and_nobody_elses(store: ArtifactStore) -> None:
    for key in ("jobs/video_1/1/a", "jobs/video_1/2/b", "jobs/video_12/1/c"):
        store.write(key, b"x")
    assert store.keys("jobs/video_1") == ["jobs/video_1/1/a", "jobs/video_1/2/b"]
    assert store.remove("jobs/video_1") == 2 and store.remove("jobs/video_1") == 0
    assert store.keys("jobs") == ["jobs/video_12/1/c"]


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(str(tmp_path))

    def breaks(source: object) -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "_chunks", breaks)
    with pytest.raises(OSError, match="No space left"):
        store.write(KEY, b"")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    store.write(KEY, b"now")
    assert b"".join(store.read(KEY)) == b"now"


@pytest.mark.parametrize(
    "key",
    ["", "x", "/etc/passwd", "../x", "jobs/../x", "jobs/./x", "jobs//x", "jobs/x\0", "jobs/X", "jobs/.x", "a/"],
)
def test_keys_that_lead_elsewhere_are_refused(key: str, tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    for call in (store.read, store.size, lambda key: store.write(key, b"x")):
        with pytest.raises(ValueError, match="an artifact's key must be like"):
            call(key)
