"""A service's configuration and where each setting comes from: an option, the environment, the file, or the default.

One table for all three, made of `ServeConfig`'s fields: `lease_s` is `--lease-s`, SKYLAPSE_SERVE_LEASE_S and `lease_s`
in the file. An option goes before the environment, and that before the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ...runtime.core.config import SERVE_PREFIX
from .config import ServeConfig
from .field_words import allowed, fault, field_at, fields_of, near, shown

# Variables that there were before all fields had one, or that mean the same for the whole of a process.
SHORT = {
    "data": "SKYLAPSE_DATA",
    "database_url": "SKYLAPSE_DATABASE_URL",
    "webhook_secret": "SKYLAPSE_WEBHOOK_SECRET",
    "quantize": "SKYLAPSE_QUANTIZE",
    "offload": "SKYLAPSE_OFFLOAD",
}
SECRETS = ("database_url", "webhook_secret")  # replicas read them from their environment: arguments are shown by Ray
DEFAULT = "default"


@dataclass(frozen=True)
class Effective:
    """A configuration, its `sources` (field -> what has set it), and `hidden`: the environment's secrets, not in it."""

    config: ServeConfig
    sources: Mapping[str, str]
    hidden: Mapping[str, str]


def variable_of(field: str) -> str:
    return f"{SERVE_PREFIX}{field.upper()}"


def option_of(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, but: frozenset[str]) -> None:
    """Add an option for each field that has none of its own yet."""
    group = parser.add_argument_group("more settings", "docs/deploy.md explains them; the file and the environment too")
    for name, field in ServeConfig.model_fields.items():
        if name not in but:
            group.add_argument(option_of(name), metavar="VALUE", help=_help(name, field))


def load_config(options: argparse.Namespace, environ: Mapping[str, str]) -> Effective:
    """Load the configuration. Raises ValueError, in one line, for the first wrong setting. environ: SKYLAPSE_*."""
    fields: dict[str, Any] = {}
    sources: dict[str, str] = {}
    hidden: dict[str, str] = {}
    for name, value, source in _given(options, environ):
        if source in SHORT.values() and name in SECRETS:
            hidden[name] = value
            fields.pop(name, None)
        else:
            hidden.pop(name, None)
            fields[name] = value
        sources[name] = source
    try:
        config = ServeConfig(**fields)
    except ValidationError as error:
        raise ValueError(told(error, ServeConfig, sources)) from None
    return Effective(config, {name: sources.get(name, DEFAULT) for name in ServeConfig.model_fields}, hidden)


def _given(options: argparse.Namespace, environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """Yield (field, value, source), the weakest source first."""
    fields = ServeConfig.model_fields
    if options.config is not None:
        for name, value in read_file(Path(options.config)).items():
            yield name, value, options.config
    for name, variable in SHORT.items():
        if name in fields and environ.get(variable, "").strip() and name not in ("quantize", "offload"):
            yield name, environ[variable].strip(), variable  # engines read the other two by themselves
    for variable, text in environ.items():
        if variable.startswith(SERVE_PREFIX) and text.strip():
            name = variable.removeprefix(SERVE_PREFIX).lower()
            if name not in fields:
                meant = near(name, fields)
                hint = f"; did you mean {variable_of(meant)}?" if meant else ""
                raise ValueError(f"{variable}: no such setting{hint}")
            yield name, _value(fields[name], text.strip(), variable), variable
    for name, field in fields.items():
        if (value := getattr(options, name, None)) is not None:
            option = option_of(name)
            yield name, _value(field, value, option) if isinstance(value, str) else value, option


def _value(field: FieldInfo, text: str, source: str) -> Any:
    """Return the text itself for a field of text; for others what YAML reads: numbers, switches, lists, objects."""
    annotation = str(field.annotation)
    if field.annotation is str or annotation in ("str | None", "typing.Optional[str]"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{source} must be {allowed(field)}, got {shown(text)}") from None


class OneMeaning(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
    """YAML loader that refuses a repeated name; YAML itself keeps the last."""


def _mapping(loader: OneMeaning, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ValueError(f"line {line}: a setting's name must be text, got {shown(key)}")
        if key in found:
            raise ValueError(f"line {line}: {key} stands there twice")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


OneMeaning.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_file(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML or JSON file. The ValueError names the file, and the line if it is neither."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"config must be YAML or JSON in UTF-8, got {str(path)!r}") from None
    except FileNotFoundError:
        raise ValueError(f"config must be a file, got {str(path)!r}, which is not there") from None
    except IsADirectoryError:
        raise ValueError(f"config must be a file, got the folder {str(path)!r}") from None
    try:
        found = json.loads(text) if path.suffix == ".json" and "\t" in text else yaml.load(text, OneMeaning)
    except json.JSONDecodeError as error:
        raise ValueError(f"config must be YAML or JSON, and line {error.lineno} of {str(path)!r} is neither") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1} of " if mark else ""
        raise ValueError(f"config must be YAML or JSON, and {line}{str(path)!r} is neither") from None
    except yaml.YAMLError:
        raise ValueError(f"config must be YAML or JSON, and {str(path)!r} is neither") from None
    except ValueError as error:
        raise ValueError(f"config {str(path)!r}, {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"config must be an object of settings, got {str(path)!r}")
    return found


def told(error: ValidationError, model: type[BaseModel], sources: Mapping[str, str] | None = None) -> str:
    """Return one line for the first error: the setting, its source, what is allowed, its value."""
    found = error.errors(include_url=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])  # why another may be missing
    place, source = ".".join(map(str, first["loc"])), (sources or {}).get(str(first["loc"][0]) if first["loc"] else "")
    whence = f" ({source})" if source and source != option_of(place) else ""
    if first["type"] == "extra_forbidden":
        holder = field_at(model, first["loc"][:-1]) if len(first["loc"]) > 1 else model
        meant = near(str(first["loc"][-1]), fields_of(holder))
        hint = f"; did you mean {meant}?" if meant else ""
        return f"{place}: no such setting{whence}{hint}"
    wrong = fault(first, model)
    if not place:
        return wrong
    if first["type"] == "missing" or place in SECRETS or (first["type"] == "value_error" and ", got" in wrong):
        return f"{place} {wrong}{whence}"
    return f"{place} {wrong}, got {shown(first['input'])}{whence}"


def _help(name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=False)
    is_plain = default not in (None, "", PydanticUndefined) and not isinstance(default, dict | tuple | list)
    shown_default = f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    return f"{allowed(field) or 'see docs/deploy.md'}{shown_default if is_plain else ''}".replace("%", "%%")
