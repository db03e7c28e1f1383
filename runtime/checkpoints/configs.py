"""A component's config.json as the dataclass that its module is built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ..core.json_file import hints_of, shown, typed

Config = TypeVar("Config")

# Config fields without effect on inference.
IGNORED_FIELDS = ("dropout", "clip_output", "add_img_emb", "window_size")


def parse_config(config_class: type[Config], fields: Mapping[str, Any], component: str) -> Config:
    """A config.json as our dataclass; null means the default, as a field that is not there.

    Raises ValueError naming the file, the field, its value and what is allowed: for a field that we do not know unless
    it is switched off, and for what `typed` refuses.
    """
    file = f"{component}/config.json"
    known = hints_of(config_class)
    for name, value in fields.items():
        is_off = value is None or (isinstance(value, int | float) and not value)
        if name not in known and not name.startswith("_") and name not in IGNORED_FIELDS and not is_off:
            raise ValueError(f"{file}: unknown field {name} = {shown(value)}")
    return typed(config_class, fields, file)
