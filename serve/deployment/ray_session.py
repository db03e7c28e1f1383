"""The folder of one service's Ray: private, of a short path, gone with the service, or with the next one's start.

Ray keeps sockets, logs and the token of its cluster there. A socket's path has at most 107 bytes, of which Ray's own
names take 66, so a long TMPDIR cannot hold it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)
PREFIX, LOCK, TOKEN, LOGS = "skylapse-ray-", "service.lock", "token", "logs"
MAX_SOCKET_BYTES = 103  # macOS's, Linux has 107
RAY_BYTES = len("/session_2026-11-28_01-46-21_047521_4194304/sockets/plasma_store.1")
OURS_BYTES = len(f"/{PREFIX}12345678")
PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # where TMPDIR is too long or cannot be written
UNLOCKED_S = 86400.0  # a folder without a lock is one that is being made, unless it is as old as this


@dataclass(frozen=True)
class RaySession:
    """A session's folder; `lock` is held by this process, and released by the kernel when it ends."""

    folder: Path
    lock: int

    @property
    def logs(self) -> Path:
        """The folder to which the service's processes log: a file each."""
        return self.folder / LOGS

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of all processes that this service starts.

        The token opens this cluster alone, and Ray's default place for it, in the home folder, need not be there.
        """
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / TOKEN),
            "SKYLAPSE_LOG_TO": str(self.logs),
        }

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)


def open_session(places: Sequence[Path] | None = None) -> RaySession:
    """Make a new folder, after removing those of dead services. Raises ValueError if there is no place for one."""
    places = [*_places()] if places is None else places
    for place in places:
        remove_leftovers(place)
    room = MAX_SOCKET_BYTES - RAY_BYTES - OURS_BYTES
    for place in places:
        if len(os.fsencode(place)) > room:
            logger.info("Ray's sockets do not fit below %d bytes of TMPDIR; they go elsewhere", len(os.fsencode(place)))
            continue
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / LOGS).mkdir()
            token = os.open(folder / TOKEN, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
            with os.fdopen(token, "w") as file:
                file.write(secrets.token_hex(32))
            return RaySession(folder, lock)
    tried = ", ".join(map(str, places))
    raise ValueError(f"TMPDIR must be a folder that can be written, with a path of at most {room} bytes; tried {tried}")


def remove_leftovers(place: Path) -> int:
    """Remove folders of services that no longer live, and nothing else; return the number removed."""
    removed = 0
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            try:
                lock = os.open(folder / LOCK, os.O_RDWR)
            except FileNotFoundError:
                if time.time() - folder.stat().st_mtime < UNLOCKED_S:
                    continue
                lock = None
            try:
                if lock is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its service lives
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
            finally:
                if lock is not None:
                    os.close(lock)
    return removed


def _places() -> Iterator[Path]:
    with suppress(FileNotFoundError):  # there is no folder for temporary files at all
        yield Path(tempfile.gettempdir())
    yield from map(Path, PLACES)
