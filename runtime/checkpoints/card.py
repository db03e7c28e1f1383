"""Check skylapse.json, in which a folder's author tells of a model what its configs do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cache.spec import PRESETS, parse_policy
from ..core.json_file import hints_of, shown, typed, typed_value, within
from ..core.request import VideoRequest

if TYPE_CHECKING:
    from .registry import ModelFolder

FILE = "skylapse.json"
FIELDS = ("defaults", "native_sizes", "limits", "cache", "teacache", "distilled")
DEFAULTS: dict[str, Any] = {  # what `WanPipeline.__call__` has
    "width": 832,
    "height": 480,
    "num_frames": 81,
    "fps": 16,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "guidance_scale_2": None,
}


@dataclass(frozen=True)
class Limits:
    """The "limits" of a skylapse.json."""

    max_num_frames: int = 1025
    max_pixels: int = 3840 * 2176

    def __post_init__(self) -> None:
        within(self, 1, 1025, "max_num_frames")
        within(self, 256, 4096 * 4096, "max_pixels")


def check_fields(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return a skylapse.json's fields without nulls; ValueError names a field that is unknown or of another type."""
    given = {name: value for name, value in extra.items() if value is not None}
    try:
        _check_names(given, FIELDS, "")
        for name in ("defaults", "limits", "cache"):
            if not isinstance(found := given.get(name, {}), dict):
                raise ValueError(f"{name} must be an object, got {shown(found)}")
        _check_names(given.get("defaults", {}), DEFAULTS, "defaults: ")
        _check_names(given.get("limits", {}), hints_of(Limits), "limits: ")
        _check_names(given.get("cache", {}), PRESETS, "cache: ")
        for preset, policy in given.get("cache", {}).items():
            parse_policy(typed_value(f"cache.{preset}", policy, str))
        if (coefficients := given.get("teacache")) is not None:
            typed_value("teacache", coefficients, Sequence[float])
        typed_value("distilled", given.get("distilled", False), bool)
        sizes = given.get("native_sizes", [])
        if not isinstance(sizes, list) or not all(isinstance(size, list) and len(size) == 2 for size in sizes):
            raise ValueError(f"native_sizes must be a list of pairs [width, height], got {shown(sizes)}")
    except ValueError as error:
        raise ValueError(f"{FILE}: {error}") from None
    typed(Limits, given.get("limits", {}), f"{FILE}: limits")
    return given


def check_shapes(folder: ModelFolder) -> None:
    """Raise ValueError for a default or a native size that the model cannot make."""
    width, height = folder.defaults.width, folder.defaults.height
    defaults = {name: value for name, value in folder.extra.get("defaults", {}).items() if value is not None}
    asked = [("defaults", defaults), ("defaults", {"width": width, "height": height})]
    asked += [("native_sizes", {"width": w, "height": h}) for w, h in folder.extra.get("native_sizes", [])]
    for field, fields in asked:
        try:
            VideoRequest(prompt="any", **fields).resolved(folder.defaults, folder.limits)
        except ValueError as error:
            raise ValueError(f"{FILE}: {field}: {error}") from None


def _check_names(given: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any], where: str) -> None:
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"{where}unknown field {unknown[0]!r} (known: {', '.join(known)})")
