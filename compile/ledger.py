"""What this machine has found out about a coder's backends: which are right, how fast they are, which are demoted."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from .cache import locked, write_whole
from .footprint import Footprint

logger = logging.getLogger(__name__)
Size = tuple[int, int]


class Ledger:
    """One file a machine and coder, in the cache's folder. Where that is read-only, this process alone remembers.

    checks: artifact -> its greatest error against eager. times: size -> backend -> seconds a clip.
    bytes: size -> backend -> what it holds, and what a clip takes on top.
    demoted: artifact -> backend, reason, time.
    """

    def __init__(self, root: Path, machine: str, threads: int, coder_digest: str) -> None:
        name = hashlib.sha256(f"{machine} {threads} {coder_digest}".encode()).hexdigest()[:24]
        self.path = root / f"{name}.ledger.json"
        self._machine = machine
        self._own: dict[str, dict[str, Any]] = {"checks": {}, "times": {}, "bytes": {}, "demoted": {}}

    def read(self) -> dict[str, dict[str, Any]]:
        """Everything that this process and others have written."""
        found: dict[str, Any] = {}
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s): it is measured again", self.path.name, error)
        return {part: found.get(part, {}) | own for part, own in self._own.items()}

    def write(self, part: str, name: str, value: Any) -> None:
        self._own[part][name] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path.with_suffix(".lock"), 10.0):
                write_whole(self.path, json.dumps({"machine": self._machine, **self.read()}, indent=1))
        except OSError as error:
            logger.info("%s cannot be written (%s): this process alone knows", self.path.name, error)

    def pardon(self, artifact: str) -> None:
        """Forget that an artifact was demoted: it has been built again."""
        if artifact in self.read()["demoted"]:
            self.write("demoted", artifact, None)

    def checked(self, artifact: str) -> float | None:
        """Its error, if it has been found right."""
        error: float | None = self.read()["checks"].get(artifact)
        return error

    def demoted(self) -> dict[str, dict[str, Any]]:
        return {artifact: told for artifact, told in self.read()["demoted"].items() if told}

    def demote(self, artifact: str, backend: str, reason: str) -> None:
        self.write("demoted", artifact, {"backend": backend, "reason": reason, "at": round(time.time())})

    def times(self, size: Size) -> dict[str, float]:
        return dict(self.read()["times"].get(_name(size), {}))

    def timed(self, size: Size, times: dict[str, float]) -> None:
        self.write("times", _name(size), self.times(size) | times)

    def footprint(self, size: Size, backend: str) -> Footprint | None:
        """Of the size closest in area at which this backend has been weighed."""
        found = []
        for name, told in self.read()["bytes"].items():
            if backend in told:
                height, _, width = name.partition("x")
                held_bytes, work_bytes = told[backend]
                found.append(Footprint(held_bytes, work_bytes, int(height) * int(width)))
        return min(found, key=lambda one: abs(one.area - size[0] * size[1]), default=None)

    def is_weighed(self, size: Size, backend: str) -> bool:
        return backend in self.read()["bytes"].get(_name(size), {})

    def weighed(self, size: Size, backend: str, footprint: Footprint) -> None:
        others = self.read()["bytes"].get(_name(size), {})
        self.write("bytes", _name(size), others | {backend: [footprint.held_bytes, footprint.work_bytes]})

    def nearest(self, size: Size, backends: set[str]) -> tuple[Size, dict[str, float]] | None:
        """The measured size closest in area to `size` at which all these backends have been timed."""
        found = []
        for name, times in self.read()["times"].items():
            height, _, width = name.partition("x")
            if backends <= times.keys():
                found.append(((int(height), int(width)), dict(times)))
        area = size[0] * size[1]
        return min(found, key=lambda entry: abs(entry[0][0] * entry[0][1] - area), default=None)


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
