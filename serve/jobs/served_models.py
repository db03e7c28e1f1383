"""The served models and their limits, read from their folders' JSON files: no weights, no torch, no engine asked.

A hub's models are looked up in the background when an ingress starts. It is not ready before, and no request waits.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.cache.spec import PRESETS
from ...runtime.checkpoints.hub import HubUnreachable, cached_folder, local_folder, pin, resolve_configs
from ...runtime.checkpoints.registry import ModelFolder, read_folder
from ...runtime.core.config import load_settings
from ...runtime.core.fingerprint import fingerprint
from ...runtime.core.request import ModelDefaults, ModelLimits
from ..core.config import ServeConfig
from ..core.model_entry import EngineGroup, ModelEntry, is_of_canary
from ..store.tables import CANARY
from ..wire.errors import ApiError

logger = logging.getLogger(__name__)
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 30.0


@dataclass(frozen=True)
class ServedModel:
    """A name that clients may ask for, and the model behind it."""

    name: str
    folder: ModelFolder
    served: str = ""  # the model's own name, whatever alias was asked for
    revision: str | None = None
    canary: tuple[float, str | None] | None = None  # its share of the jobs, and its revision

    def assign(self, job_id: str) -> tuple[str | None, str | None]:
        """Return (variant, revision) for a new job."""
        if self.canary is not None and is_of_canary(job_id, self.canary[0]):
            return CANARY, self.canary[1]
        return None, self.revision

    @property
    def defaults(self) -> ModelDefaults:
        return self.folder.defaults

    @property
    def limits(self) -> ModelLimits:
        return self.folder.limits

    @property
    def native_sizes(self) -> list[tuple[int, int]]:
        return self.folder.native_sizes

    @property
    def takes_image(self) -> bool:
        return "image-to-video" in self.folder.tasks

    @property
    def needs_image(self) -> bool:
        return "text-to-video" not in self.folder.tasks

    def tokens(self, width: int, height: int, num_frames: int) -> int:
        """Return the number of tokens of one branch of a clip."""
        temporal, side = self.limits.temporal_multiple, self.limits.size_multiple
        return ((num_frames - 1) // temporal + 1) * (height // side) * (width // side)

    def show(self) -> dict[str, Any]:
        """Return the model as GET /v1/models lists it."""
        defaults, limits = self.defaults, self.limits
        return {
            "id": self.name,
            "object": "model",
            "created": CREATED,
            "owned_by": "skylapse",
            "root": self.served,
            "revision": self.revision,
            "tasks": self.folder.tasks,
            "native_sizes": [f"{width}x{height}" for width, height in self.native_sizes],
            "default_size": f"{defaults.width}x{defaults.height}",
            "default_seconds": f"{defaults.num_frames / defaults.fps:g}",
            "max_seconds": limits.max_num_frames / defaults.fps,
            "max_frames": limits.max_num_frames,
            "fps": defaults.fps,
            "default_steps": defaults.num_inference_steps,
            "default_guidance": defaults.guidance_scale,
            "cache_presets": ["none", *PRESETS],
        }


CREATED = 1_764_000_000  # OpenAI's field; of skylapse's first release, whatever the model


class Catalog:
    """The service's models and their aliases."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._folders: dict[str, ModelFolder] = {}  # of each served model
        self._reasons: dict[str, str] = {}  # of those that are not resolved
        self._closing = threading.Event()
        self._groups = config.groups
        waiting = []
        for group in self._groups:
            if group.is_canary:
                continue  # it has the stable one's sizes and limits; its engines tell if it does not fit
            try:
                is_here = local_folder(group.model) is not None
            except ValueError as error:
                is_here = True
                self._reasons[group.name] = str(error)
            if not is_here:
                self._reasons[group.name] = f"model {group.name!r} is being looked up"
                waiting.append(group)
            elif group.name not in self._reasons:
                self._resolve(group)
        self._thread = threading.Thread(target=self._resolve_all, args=(waiting,), name="skylapse-catalog", daemon=True)
        if waiting:
            self._thread.start()

    @property
    def reason(self) -> str | None:
        """The reason why jobs cannot be taken for every model yet; None once all are resolved."""
        return next(iter([*self._reasons.values()]), None)

    def find(self, name: str | None, param: str = "model") -> ServedModel:
        """Return the model of this name. Raises ApiError 404 for an unknown name, 503 for a model not resolved yet."""
        served = self.config.model_of(name)
        if served is None:
            names = ", ".join(self.names)
            message = f"There is no model {str(name)[:200]!r}; there are: {names}."
            raise ApiError(404, message, code="model_not_found", param=param)
        folder = self._folders.get(served)
        if folder is None:
            message = f"The model {served!r} cannot be used yet: the service is still looking up what it can do."
            raise ApiError(503, message, code="model_not_ready", type="server_error", param=param, retry_after_s=2)
        groups = [group for group in self._groups if group.name == served]
        entry = next(entry for entry in self.config.entries if entry.served_name == served)
        canary = None if entry.canary is None else (entry.canary.share, groups[1].revision)
        return ServedModel(name or served, folder, served, groups[0].revision, canary)

    @property
    def names(self) -> list[str]:
        """All names that clients may use."""
        return list(dict.fromkeys((*self.config.model_names, *self.config.aliases)))

    def all(self) -> list[ServedModel]:
        """Return the resolved models, one for each of their names."""
        return [self.find(name) for name in self.names if self.config.model_of(name) in self._folders]

    def close(self) -> None:
        """Stop looking up the models that are not resolved."""
        self._closing.set()

    def _resolve_all(self, groups: list[EngineGroup]) -> None:
        pause_s = FIRST_RETRY_S
        while groups := [group for group in groups if not self._resolve(group)]:
            if self._closing.wait(pause_s):
                return
            pause_s = min(LONGEST_RETRY_S, 2 * pause_s)

    def _resolve(self, group: EngineGroup) -> bool:
        try:
            self._folders[group.name] = _read(group)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            if reason != self._reasons.get(group.name):
                logger.error("model %r cannot be used: %s", group.name, reason)
            self._reasons[group.name] = reason
            return False
        self._reasons.pop(group.name, None)
        return True


def check_models(config: ServeConfig) -> None:
    """Raise ValueError with one line for the first model or canary whose JSON files are missing or not a model's.

    Also for weights on this machine that do not match the model's `fingerprint`.
    """
    cache_dir = load_settings().cache_dir
    for group in config.groups:
        _read(group)
        folder = local_folder(group.model) or cached_folder(group.model, cache_dir, group.revision)
        if folder is not None:
            check_fingerprint(group, folder)


def check_fingerprint(group: EngineGroup, folder: Path) -> None:
    """Raise ValueError if a folder's weights differ from the configured fingerprint."""
    if group.fingerprint is not None and (found := fingerprint(folder)) != group.fingerprint:
        raise ValueError(f"fingerprint of model {group.name!r} must be {group.fingerprint}, got {found}")


def pin_revisions(config: ServeConfig) -> ServeConfig:
    """Return the configuration with its revisions resolved to commits, so that all parts of the service use the same.

    Raises ValueError for a model that does not exist; if a hub does not answer, the part that needs it waits for it.
    """
    if config.models:
        pinned: dict[str, Any] = {"models": tuple(_pinned(entry) for entry in config.models)}
    else:
        entry = _pinned(config.entries[0])
        pinned = {"revision": entry.revision, "canary": entry.canary}
        pinned = {name: value for name, value in pinned.items() if value != getattr(config, name)}
    return config.model_copy(update=pinned)


def _read(group: EngineGroup) -> ModelFolder:
    return read_folder(resolve_configs(group.model, load_settings().cache_dir, group.revision), group.model)


def _pinned(entry: ModelEntry) -> ModelEntry:
    canary = entry.canary
    if canary is not None:
        revision = _commit(canary.model or entry.model, canary.revision)
        canary = canary.model_copy(update={"revision": revision})
    return entry.model_copy(update={"revision": _commit(entry.model, entry.revision), "canary": canary})


def _commit(model: str, revision: str | None) -> str | None:
    if local_folder(model) is not None:
        if revision is not None:
            raise ValueError(f"revision is a hub id's, and {model!r} is a folder, got revision {revision!r}")
        return None
    try:
        return pin(model, load_settings().cache_dir, revision)
    except HubUnreachable as error:
        logger.warning("revisions are not pinned: %s", error)
        return revision
