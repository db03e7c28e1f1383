"""Built artifacts on disk, found by what they were built of; shared by processes, bounded, never trusted unseen.

    <root>/<id>/            an artifact's files and its sidecar artifact.json
    <root>/<id>.lock        held while it is built
    <root>/<id>.failed.json why a build failed, and until when it is not tried again
    <root>/.building-<id>-* an unfinished build; what a crash has left of it is removed by the next builder

`id` is a digest of everything that the artifact depends on, so a changed weight, version, device or option finds
nothing and builds anew. A rename makes an artifact visible, whole or not at all; its files' digests are compared at
every load, so what was torn or altered on the disk is built again too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1
SIDECAR = "artifact.json"
MAX_BYTES = 20 * 2**30
RETRY_S = 24 * 3600.0  # after a build that broke, was killed or ran out of time
RETRY_SOON_S = 600.0  # after one that disk or memory had no room for, which somebody may be clearing


class BuildFailed(RuntimeError):
    """An artifact could not be built, now or a while ago; the message is the builder's own."""


@dataclass(frozen=True)
class Key:
    """What an artifact depends on; nested dictionaries of strings, numbers and lists."""

    fields: Mapping[str, Any]

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(json.dumps({"format": FORMAT, **self.fields}, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Artifact:
    folder: Path
    num_bytes: int
    build_s: float
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    reason: str
    until: float  # seconds since the epoch


class EngineCache:
    """`root` is written to where it can be; `shared` folders, baked into an image perhaps, are only read."""

    def __init__(self, root: Path, shared: Sequence[Path] = (), max_bytes: int = MAX_BYTES) -> None:
        self.root, self.shared, self.max_bytes = root, tuple(shared), max_bytes

    def find(self, key: Key) -> Artifact | None:
        """The artifact of this key, if there is a sound one."""
        for root in (self.root, *self.shared):
            folder = root / key.id
            try:
                artifact = _read(folder, key)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s is not used: %s", folder.name, error)
                self.discard(folder)
                continue
            with suppress(OSError):  # what is used stays; a shared folder cannot be told
                os.utime(folder / SIDECAR)
            return artifact
        return None

    def failure(self, key: Key) -> Failure | None:
        """Why there is no use in building it now."""
        try:
            found = json.loads(self._failed(key).read_text())
            failure = Failure(str(found["reason"]), float(found["until"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return failure if time.time() < failure.until else None

    def build(
        self, key: Key, build: Callable[[Path], None], *, again: bool = False, wait_s: float = 3600.0
    ) -> Artifact:
        """The artifact, built by `build(folder)` if nobody else has; `again` does not mind an earlier failure."""
        if not again:
            self._check_failure(key)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self.root / f"{key.id}.lock", wait_s):
                if (found := self.find(key)) is not None:  # whoever held the lock has built it
                    return found
                if not again:
                    self._check_failure(key)  # or has failed
                return self._build(key, build)
        except TimeoutError as error:
            raise BuildFailed(str(error)) from None
        except OSError as error:  # the folder cannot be written to at all: nothing to remember it by
            raise BuildFailed(f"{self.root} cannot be written to: {error.strerror or error}") from error

    def load(self, key: Key, build: Callable[[Path], None], load: Callable[[Path], T]) -> T:
        """What `load` makes of the artifact, which is built if there is none, and built again if it does not load."""
        artifact = self.find(key) or self.build(key, build)
        try:
            return load(artifact.folder)
        except Exception as error:
            logger.warning("%s does not load (%s) and is built again", artifact.folder.name, error)
        self.discard(artifact.folder)
        return load(self.build(key, build, again=True).folder)

    def fail(self, key: Key, reason: str, retry_s: float = RETRY_S) -> None:
        """Remember that a build failed."""
        text = json.dumps({"reason": reason, "until": time.time() + retry_s, "fields": key.fields}, indent=1)
        with suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
            write_whole(self._failed(key), text)

    def entries(self) -> list[Artifact]:
        """Every artifact whose sidecar can be read, of all folders, last used first."""
        found: list[tuple[float, Artifact]] = []
        for root in (self.root, *self.shared):
            for sidecar in root.glob(f"*/{SIDECAR}"):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    told = json.loads(sidecar.read_text())
                    size = sum(entry["bytes"] for entry in told["files"].values())
                    artifact = Artifact(sidecar.parent, size, told["build_s"], told["fields"])
                    found.append((sidecar.stat().st_mtime, artifact))
        return [artifact for _, artifact in sorted(found, key=lambda pair: -pair[0])]

    def _check_failure(self, key: Key) -> None:
        if (failure := self.failure(key)) is not None:
            minutes = (failure.until - time.time()) / 60
            raise BuildFailed(f"{failure.reason} (tried before; tried again in {minutes:.0f} min)")

    def _build(self, key: Key, build: Callable[[Path], None]) -> Artifact:
        for left in self.root.glob(f".building-{key.id}-*"):  # by a process that died with the lock
            shutil.rmtree(left, ignore_errors=True)
        unfinished = self.root / f".building-{key.id}-{os.getpid()}"
        began_s = time.monotonic()
        try:
            unfinished.mkdir()
            build(unfinished)
            _write_sidecar(unfinished, key, time.monotonic() - began_s)
            unfinished.rename(self.root / key.id)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            had_no_room = isinstance(error, OSError | MemoryError) or _tells_of_memory(str(error))
            self.fail(key, reason, RETRY_SOON_S if had_no_room else RETRY_S)
            raise BuildFailed(reason) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            self._failed(key).unlink(missing_ok=True)
        self._evict(keep=key.id)
        return _read(self.root / key.id, key)

    def _evict(self, keep: str) -> None:
        """Remove what was used longest ago until the rest fits."""
        own = [artifact for artifact in self.entries() if artifact.folder.parent == self.root]
        total = sum(artifact.num_bytes for artifact in own)
        for artifact in reversed(own):
            if total > self.max_bytes and artifact.folder.name != keep:
                logger.info("%s is removed: the cache holds %d bytes at most", artifact.folder.name, self.max_bytes)
                self.discard(artifact.folder)
                total -= artifact.num_bytes

    def discard(self, folder: Path) -> None:
        """Out of sight in one step, whoever is reading; what cannot be removed is left."""
        trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}-{time.monotonic_ns()}")
        with suppress(OSError):
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _failed(self, key: Key) -> Path:
        return self.root / f"{key.id}.failed.json"


def _tells_of_memory(text: str) -> bool:
    """Whether an error is that memory ran out, as torch ("CUDA out of memory") and TensorRT ("OutOfMemory") say it."""
    return "outofmemory" in text.lower().replace(" ", "")


@contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold a file's lock against other processes and threads; the kernel lets go of it when its process dies."""
    until_s = time.monotonic() + wait_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise TimeoutError(f"another process has held {path.name} for {wait_s:g} s") from None
                time.sleep(0.05)
        yield


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text in one step."""
    part = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        part.write_text(text + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_sidecar(folder: Path, key: Key, build_s: float) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    told = {"format": FORMAT, "fields": key.fields, "files": files, "build_s": round(build_s, 3)}
    (folder / SIDECAR).write_text(json.dumps(told, indent=1) + "\n")


def _read(folder: Path, key: Key) -> Artifact:
    """FileNotFoundError where there is none, ValueError where it is not what its sidecar and the key say."""
    told = json.loads((folder / SIDECAR).read_text())
    if Key(told["fields"]).id != key.id or folder.name != key.id:
        raise ValueError("its sidecar is another artifact's")
    for name, entry in told["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise ValueError(f"{name} is not what was built")
    return Artifact(folder, sum(e["bytes"] for e in told["files"].values()), told["build_s"], told["fields"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
