"""`skylapse serve --print-config` and `--check`: the effective configuration, and reasons why a start would fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ...runtime.core.config import Settings
from ..core.config import ONE_MODELS, ServeConfig
from ..core.config_source import SECRETS, Effective

MASK = "***"
SECRET_WORDS = ("secret", "token", "password", "key")  # in names of a file system's options


def effective_lines(effective: Effective) -> Iterator[str]:
    """Yield a line of YAML for each setting, followed by its source; secrets are masked."""
    values = effective.config.model_dump(mode="json")
    for name, source in effective.sources.items():
        value = masked(name, effective.hidden.get(name, values[name]))
        is_an_entrys = effective.config.models and name in ONE_MODELS  # which a file with `models` may not have
        line = f"{'# ' if is_an_entrys else ''}{name}: {flow(value)}"
        yield f"{line:<56} # {source}"


def flow(value: Any) -> str:
    """Return a value as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()


def masked(name: str, value: Any) -> Any:
    """Return `value` with its secrets masked."""
    if name == "database_url" and value:
        with suppress(ArgumentError):
            return make_url(value).render_as_string(hide_password=True)
        return MASK
    if isinstance(value, Mapping):
        return {key: masked(str(key), inner) for key, inner in value.items()}
    is_secret = name in SECRETS or any(name.lower().endswith(word) for word in SECRET_WORDS)
    return MASK if value and is_secret and isinstance(value, str) else value


def problems(effective: Effective, settings: Settings, checks: Mapping[str, Callable[[], object]]) -> Iterator[str]:
    """Yield a line for each reason why a start would be refused; nothing is written.

    checks: a further condition -> a call that raises if it does not hold.
    """
    config = effective.config
    every: dict[str, Callable[[], object]] = {
        "data": lambda: check_folder(config.folder, "data"),
        "store": lambda: check_store(effective.hidden.get("database_url") or config.database),
        "artifacts": lambda: check_artifacts(config),
        "gpus": lambda: check_cards(config, settings),
        **checks,
    }
    for name, check in every.items():
        try:
            check()
        except ValueError as error:
            yield str(error)
        except Exception as error:
            yield f"{name} cannot be checked: {type(error).__name__}"


def check_folder(folder: Path, name: str) -> None:
    """Raise ValueError if the folder could neither be made nor written."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{name} must be a folder, and {str(there)!r} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must be a folder that can be written, got {str(folder)!r}")


def check_store(url: str) -> None:
    """Raise ValueError if the database does not answer. A file that does not exist yet is made at the start."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ValueError("database_url must be like postgresql+psycopg://user:password@host/name") from None
    where = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() == "sqlite":
        path = Path(parsed.database or "")
        if not path.exists():
            return check_folder(path.parent, "database_url's folder")
        url = f"sqlite:///file:{quote(str(path))}?immutable=1&uri=true"  # else files appear beside one in WAL mode
    try:
        engine = create_engine(url)
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1 FROM sqlite_master" if "immutable" in url else "SELECT 1"))
        finally:
            engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        raise ValueError(f"the store does not answer: {where} ({type(error).__name__})") from None


def check_artifacts(config: ServeConfig) -> None:
    """Raise ValueError if files could not be stored."""
    if "://" not in config.artifacts:
        return check_folder(Path(config.artifacts), "artifacts_url") if config.artifacts_url else None
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(config.artifacts, **config.artifacts_options)
        files.exists(path)
    except Exception as error:  # each file system has its own
        raise ValueError(f"artifacts_url: {config.artifacts} does not answer ({type(error).__name__})") from None


def check_cards(config: ServeConfig, settings: Settings) -> None:
    """Raise ValueError if the engines have too few GPUs."""
    import torch

    from ..core.placement import check_gpus

    check_gpus(config, float(torch.cuda.device_count()), settings.memory_bytes)
