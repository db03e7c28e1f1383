"""Files that jobs leave behind, in a folder or a bucket: written once, read by ranges, removed by prefix.

Keys are `jobs/<id>/<epoch>/<name>`: every attempt writes under its own epoch, so nobody overwrites what another has
written, and the job's row decides which attempt's files are the job's.
"""

from __future__ import annotations

import hashlib
import mimetypes
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from ..core.private import FOLDER, make_folder, restrict

KEY = re.compile(r"[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9_.-]*)+")
CHUNK_BYTES = 1 << 20
S3_OPTIONS = {
    "use_listings_cache": False,  # others write, too: a file that an older listing lacks must not count as missing
    "config_kwargs": {"signature_version": "s3v4"},  # botocore signs URLs by its forerunner, which many stores refuse
}
READ_AHEAD_BYTES = 4 << 20  # s3fs' own 50 MiB would be fetched for every range that a player asks for


@dataclass(frozen=True)
class Artifact:
    """A file that was written, as the job's row keeps it."""

    key: str
    num_bytes: int
    sha256: str


class ArtifactStore:
    """A file store. url: a folder ("file:///data" or a path) or a bucket ("s3://bucket/prefix", fsspec's options)."""

    def __init__(self, url: str, **options: Any) -> None:
        self.files, root = fsspec.core.url_to_fs(url, **{**(S3_OPTIONS if url.startswith("s3") else {}), **options})
        self.root = root.rstrip("/")
        self.is_local = "file" in self.files.protocol

    def prepare(self) -> None:
        """Create the folder and make its files private; the rights of a bucket are set by its owner."""
        if self.is_local:
            root = Path(self.root)
            make_folder(root)
            make_folder(root / "jobs", is_ours=True)
            if os.listdir(root) == ["jobs"]:  # else an operator keeps something else there, too
                restrict(root, FOLDER)

    def write(self, key: str, source: Path | bytes | Iterator[bytes], replace: bool = False) -> Artifact:
        """Store bytes, a file or pieces under a new key. Raises FileExistsError if the key is taken.

        replace: put it in the place of what an earlier try of the same caller may have left.
        The key appears when all bytes are there, and on a disk when they are synced.
        """
        path = self._path(key)
        if not replace and self.files.exists(path):
            raise FileExistsError(f"the artifact {key} is there already")
        digest, num_bytes = hashlib.sha256(), 0
        with self._new_file(path) as file:
            for chunk in _chunks(source):
                digest.update(chunk)
                num_bytes += len(chunk)
                file.write(chunk)
        return Artifact(key, num_bytes, digest.hexdigest())

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield bytes [start, end) in pieces. Raises FileNotFoundError at once, not at the first piece."""
        file = self.files.open(self._path(key), "rb", block_size=READ_AHEAD_BYTES)
        return _pieces(file, start, end)

    def copy(self, source: str, target: str) -> Artifact:
        """Store a file's bytes under another key as well. Raises FileNotFoundError."""
        return self.write(target, self.read(source), replace=True)

    def sign(self, key: str, seconds: float) -> str | None:
        """Return an URL that reads a file for `seconds` without a key of ours; None for a folder, which has none."""
        try:
            return str(self.files.sign(self._path(key), expiration=int(seconds)))
        except NotImplementedError:
            return None

    def size(self, key: str) -> int:
        """Return the bytes of a file. Raises FileNotFoundError."""
        return int(self.files.size(self._path(key)))

    def keys(self, prefix: str) -> list[str]:
        """Return every key under a folder of keys, such as "jobs/<id>"; an empty list if there is no such folder."""
        self.files.invalidate_cache()
        return sorted(path.removeprefix(f"{self.root}/") for path in self.files.find(self._path(f"{prefix}/x")[:-2]))

    def folders(self, prefix: str, older_than_s: float = 0.0) -> list[str]:
        """Return the names of the folders under `prefix` to which nothing has been written for `older_than_s`."""
        self.files.invalidate_cache()
        written_s: dict[str, float] = {}  # of the newest file: a bucket's folders have no times of their own
        root = f"{self.root}/{prefix}"
        for path, entry in self.files.find(root, withdirs=True, detail=True).items():
            name = path.removeprefix(root).strip("/").partition("/")[0]
            if KEY.fullmatch(f"{prefix}/{name}"):  # what has another name is none of ours
                written_s[name] = max(written_s.get(name, 0.0), _written_s(entry))
        return sorted(name for name, latest_s in written_s.items() if latest_s < time.time() - older_than_s)

    def remove_one(self, key: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self.files.rm_file(self._path(key))
            if self.is_local:  # buckets have no folders
                with suppress(OSError):
                    os.rmdir(self._path(key).rpartition("/")[0])

    def remove(self, prefix: str) -> int:
        """Remove a folder of keys with everything in it; return the number of files removed."""
        found = self.keys(prefix)
        path = self._path(f"{prefix}/x")[:-2]
        if self.files.exists(path):
            self.files.rm(path, recursive=True)
        return len(found)

    @contextmanager
    def _new_file(self, path: str) -> Iterator[Any]:
        """Open a file that appears when it is complete; if writing fails, there is no file."""
        if self.is_local:
            make_folder(Path(path).parent)
            try:
                with self.files.open(f"{path}.part", "wb") as file:
                    restrict(Path(f"{path}.part"))
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                self.files.mv(f"{path}.part", path)
            except BaseException:
                if self.files.exists(f"{path}.part"):
                    self.files.rm(f"{path}.part")
                raise
            return
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        file = self.files.open(path, "wb", autocommit=False, **self._told(path))
        try:
            with file:
                yield file
        except BaseException:
            file.discard()  # what was uploaded so far; closing alone would keep it under the key
            raise
        file.commit()

    def _told(self, path: str) -> dict[str, str]:
        """Return the content type to store with a file in a bucket; readers of its signed URL receive it."""
        media_type = mimetypes.guess_type(path)[0] if "s3" in self.files.protocol else None
        return {"ContentType": media_type} if media_type else {}

    def _path(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(f"an artifact's key must be like jobs/ID/EPOCH/NAME, got {key[:80]!r}")
        return f"{self.root}/{key}"


def _written_s(entry: dict[str, Any]) -> float:
    """Return when a file was written, in seconds since 1970, as disks, buckets and memory name it; 0 if unknown."""
    told = entry.get("mtime") or entry.get("LastModified") or entry.get("created") or 0.0
    return told.timestamp() if isinstance(told, datetime) else float(told)


def _chunks(source: Path | bytes | Iterator[bytes]) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    if not isinstance(source, Path):
        yield from source
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
