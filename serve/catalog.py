"""What the service's models can do, read from their folders' JSON files: no weights, no torch, no engine asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..runtime.cache.spec import PRESETS
from ..runtime.config import load_settings
from ..runtime.models.hub import resolve_folder
from ..runtime.models.registry import ModelFolder, read_folder
from ..runtime.request import ModelDefaults, ModelLimits
from .config import ServeConfig
from .errors import ApiError


@dataclass(frozen=True)
class ServedModel:
    """A name that clients may ask for, and what is behind it."""

    name: str
    folder: ModelFolder

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
        """Of one branch of a clip."""
        temporal, side = self.limits.temporal_multiple, self.limits.size_multiple
        return ((num_frames - 1) // temporal + 1) * (height // side) * (width // side)

    def show(self) -> dict[str, Any]:
        """As GET /v1/models lists it."""
        defaults, limits = self.defaults, self.limits
        return {
            "id": self.name,
            "object": "model",
            "created": CREATED,
            "owned_by": "skylapse",
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
    """The service's model and its aliases."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config

    def find(self, name: str | None, param: str = "model") -> ServedModel:
        """ApiError 404 for a name that nobody has."""
        model = self.config.model_of(name)
        if model is None:
            raise ApiError(404, "There is no such model.", code="model_not_found", param=param)
        return ServedModel(name or self.config.model, _folder(model))

    def all(self) -> list[ServedModel]:
        return [self.find(name) for name in (self.config.model, *self.config.aliases)]


@lru_cache(maxsize=16)
def _folder(model: str) -> ModelFolder:
    return read_folder(resolve_folder(model, load_settings().cache_dir))
