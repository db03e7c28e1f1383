"""Stores files that clients send on disk under our own names, counted and hashed, until the request ends."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .malloc_trim import trim


@dataclass(frozen=True)
class Upload:
    """A file that has arrived."""

    path: Path
    num_bytes: int
    sha256: str  # in hex


class Spool:
    """One request's files, in a folder that is made for the first of them and removed with all that is in it."""

    def __init__(self, parent: Path) -> None:
        self.files: dict[str, Upload] = {}
        self._parent = parent
        self._folder: Path | None = None
        self._arriving: list[Arriving] = []

    def create(self) -> Arriving:
        if self._folder is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="upload-", dir=self._parent))
        file = Arriving(self._folder / str(len(self._arriving)))
        self._arriving.append(file)
        return file

    def close(self) -> None:
        for file in self._arriving:
            file.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        trim()


class Arriving:
    """A file that is still being received."""

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._path = path
        self._file = path.open("xb", buffering=0)  # chunks come by the 64 KiB
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered write may write a part
            rest = rest[self._file.write(rest) :]
        self._digest.update(data)
        self.num_bytes += len(data)

    def finish(self) -> Upload:
        self.close()
        return Upload(self._path, self.num_bytes, self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()
