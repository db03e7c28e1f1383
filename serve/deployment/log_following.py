"""Follows the files that the service's processes log to, and hands every line on as soon as it is whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from ..core.logs import SUFFIX

LOOK_S = 0.1


@dataclass
class Followed:
    """A file that is followed: `inode` tells when the process has begun another file under its name."""

    file: BufferedReader
    inode: int
    rest: bytes = b""

    def lines(self) -> list[str]:
        whole, newline, self.rest = (self.rest + self.file.read()).rpartition(b"\n")
        return whole.decode(errors="replace").splitlines() if newline else []


class LogFollower:
    """A thread that reads a folder until it is closed; `write` is called with one line at a time."""

    def __init__(self, folder: Path, write: Callable[[str], None]) -> None:
        self.folder, self.write = folder, write
        self._files: dict[str, Followed] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skylapse-logs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read the files once more, then stop."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S):
            self._look()
        self._look()
        for followed in self._files.values():
            followed.file.close()

    def _look(self) -> None:
        found = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                followed = self._files.get(path.name)
                if followed is None or path.stat().st_ino != followed.inode:
                    if followed is not None:  # it was renamed when it was full
                        found += followed.lines()
                        followed.file.close()
                    file = path.open("rb")
                    followed = self._files[path.name] = Followed(file, path.stat().st_ino)
                found += followed.lines()
            except FileNotFoundError:  # just now renamed: the next look finds the new one
                continue
        for line in sorted(found, key=_time):
            self.write(line)


def _time(line: str) -> str:
    """Return the time that a line begins with."""
    return line[:40]
