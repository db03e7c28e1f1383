"""Files that jobs leave behind, in a folder or a bucket: written once, read by ranges, removed by prefix.

Keys are `jobs/<id>/<epoch>/<name>`: every attempt writes under its own epoch, so nobody overwrites what another has
written, and the job's row decides which attempt's files are the job's.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

KEY = re.compile(r"[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9_.-]*)+")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """What was written, as the job's row keeps it."""

    key: str
    num_bytes: int
    sha256: str


class ArtifactStore:
    """`url`: a folder ("file:///data" or a path) or a bucket ("s3://bucket/prefix", with fsspec's options)."""

    def __init__(self, url: str, **options: Any) -> None:
        self.files, root = fsspec.core.url_to_fs(url, **options)
        self.root = root.rstrip("/")
        self.is_local = "file" in self.files.protocol

    def write(self, key: str, source: Path | bytes) -> Artifact:
        """Store a file's or a string's bytes under a new key. FileExistsError for one that is taken.

        On a disk the key appears when all bytes are there and synced; buckets do that by themselves.
        """
        path = self._path(key)
        if self.files.exists(path):
            raise FileExistsError(f"the artifact {key} is there already")
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        target = f"{path}.part" if self.is_local else path
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with self.files.open(target, "wb") as file:
                for chunk in _chunks(source):
                    digest.update(chunk)
                    num_bytes += len(chunk)
                    file.write(chunk)
                if self.is_local:
                    file.flush()
                    os.fsync(file.fileno())
            if self.is_local:
                self.files.mv(target, path)
        except BaseException:
            if self.is_local and self.files.exists(target):
                self.files.rm(target)
            raise
        return Artifact(key, num_bytes, digest.hexdigest())

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes [start, end) in pieces. FileNotFoundError at once, not at the first piece."""
        file = self.files.open(self._path(key), "rb")
        return _pieces(file, start, end)

    def size(self, key: str) -> int:
        """Bytes of a file; FileNotFoundError."""
        return int(self.files.size(self._path(key)))

    def keys(self, prefix: str) -> list[str]:
        """Every key under a folder of keys, such as "jobs/<id>"; none where there is no such folder."""
        self.files.invalidate_cache()
        return sorted(path.removeprefix(f"{self.root}/") for path in self.files.find(self._path(f"{prefix}/x")[:-2]))

    def remove(self, prefix: str) -> int:
        """Remove a folder of keys with everything in it; returns how many files went."""
        found = self.keys(prefix)
        path = self._path(f"{prefix}/x")[:-2]
        if self.files.exists(path):
            self.files.rm(path, recursive=True)
        return len(found)

    def _path(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(f"an artifact's key must be like jobs/ID/EPOCH/NAME, got {key[:80]!r}")
        return f"{self.root}/{key}"


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _pieces(file: Any, start: int, end: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = float("inf") if end is None else end - start
        while left > 0 and (piece := file.read(int(min(left, CHUNK_BYTES)))):
            left -= len(piece)
            yield piece
