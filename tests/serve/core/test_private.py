"""Stored files are private to their owner, in folders that are made and in those that were there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from skylapse.serve.core.private import make_folder
from skylapse.serve.jobs.services import Context, open_context


@pytest.fixture(autouse=True)
def open_to_all() -> Iterator[None]:
    """Set an open umask, as many machines have it; the modes must not depend on it."""
    old = os.umask(0)
    yield
    os.umask(old)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in sorted(folder.rglob("*"))}


def filled(folder: Path) -> Context:
    """A store with a job, its file, and a write-ahead log beside the database."""
    context = open_context({"data": str(folder)})
    job = context.jobs.create("a", {"prompt": "a secret"})
    context.artifacts.write(f"jobs/{job.id}/1/video.mp4", b"frames", replace=True)
    context.keys.create("a")
    return context


def test_a_new_store_is_private(tmp_path: Path) -> None:
    context = filled(tmp_path / "deep" / "data")
    found = modes(tmp_path)
    assert {"deep/data/jobs.db-wal", "deep/data/jobs.db-shm", "deep/data/scratch"} <= set(found)
    assert [name for name, mode in found.items() if mode & 0o077] == []
    context.database.close()


def test_a_store_that_others_could_read_becomes_private(tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = filled(data)  # stays open, so that its log stays there
    for path in [*data.rglob("*"), data]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    (data / "notes.txt").write_text("somebody else's")
    second = filled(data)
    assert {name for name, mode in modes(data).items() if mode & 0o077} == {"notes.txt"}
    assert stat.S_IMODE(data.stat().st_mode) == 0o777  # may be a folder for other things as well
    for context in (first, second):
        context.database.close()


def test_a_folder_of_somebodys_own_is_left_as_it_is(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "films").mkdir(mode=0o755)
    context = open_context({"data": str(tmp_path / "data"), "artifacts_url": str(shared)})
    assert modes(shared) == {"films": 0o755, "jobs": 0o700}
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755
    context.database.close()


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        make_folder(tmp_path / "data")
