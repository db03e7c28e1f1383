"""A component's config.json as the dataclass that its module is built from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Config = TypeVar("Config")

# Config fields without effect on inference.
IGNORED_FIELDS = ("dropout", "clip_output", "add_img_emb", "window_size")


def parse_config(config_class: Callable[..., Config], fields: dict[str, Any], component: str) -> Config:
    """A config.json as our dataclass; fields we do not know are an error unless they are switched off."""
    known = inspect.signature(config_class).parameters
    for name, value in fields.items():
        if (
            name not in known
            and not name.startswith("_")
            and name not in IGNORED_FIELDS
            and value not in (None, False, 0)
        ):
            raise ValueError(f"{component}/config.json: unknown field {name} = {value!r}")
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if name in known
    }
    return config_class(**given)
