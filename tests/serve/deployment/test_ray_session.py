"""Ray's folder: private, of a short path, and gone with its service; nobody else's is touched."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from skylapse.serve.deployment import ray_session
from skylapse.serve.deployment.ray_session import MAX_SOCKET_BYTES, PREFIX, RAY_BYTES, open_session, remove_leftovers


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose path is short enough for sockets, as pytest's own are not."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="p-") as folder:
        yield Path(folder)


def test_it_is_nobody_elses_and_gone_afterwards(place: Path) -> None:
    session = open_session([place])
    assert stat.S_IMODE(session.folder.stat().st_mode) == 0o700
    token = Path(session.variables["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    assert session.logs.is_dir() and len(os.fsencode(session.folder)) + RAY_BYTES <= MAX_SOCKET_BYTES
    session.remove()
    assert [*place.iterdir()] == []


def test_a_long_tmpdir_and_one_that_cannot_be_written_are_passed_over(place: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    session = open_session([long, place / "not-there", place])
    assert session.folder.parent == place and [*long.iterdir()] == []
    session.remove()
    with pytest.raises(
        ValueError, match=r"^TMPDIR must be a folder that can be written, with a path of at most \d+ bytes;"
    ):
        open_session([long])


def test_a_dead_services_folder_is_removed_and_a_living_ones_is_not(place: Path) -> None:
    """The other one is a process of its own, which is killed."""
    script = "from skylapse.serve.deployment.ray_session import *; import sys; from pathlib import Path\n"
    script += f"print(open_session([Path({str(place)!r})]).folder, flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdin
    theirs = Path(other.stdout.readline().strip())
    assert remove_leftovers(place) == 0 and theirs.is_dir()
    other.kill()
    other.wait()
    other.stdout.close()
    other.stdin.close()
    session = open_session([place])
    assert not theirs.exists() and session.folder.is_dir()
    session.remove()


def test_what_is_not_ours_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "session_latest").mkdir()
    (place / f"{PREFIX}file").write_text("")
    (place / f"{PREFIX}new").mkdir()  # is being made: it has no lock yet
    (place / f"{PREFIX}link").symlink_to(place / "session_latest")
    assert remove_leftovers(place) == 0
    assert len([*place.iterdir()]) == 4
    monkeypatch.setattr(ray_session, "UNLOCKED_S", -1.0)
    assert remove_leftovers(place) == 1 and not (place / f"{PREFIX}new").exists()
