"""Opens the store for an operator's commands: an existing one, never a new one."""

from __future__ import annotations

import argparse
import getpass
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import inspect, make_url
from sqlalchemy.exc import DatabaseError

from ...runtime.core.config import our_variables
from ..core.config import ServeConfig
from ..core.config_source import load_config
from ..jobs.services import Context, stand_on, with_secrets
from ..store.audit import Actor
from ..store.database import Database

HINT = "`skylapse serve` makes one, or --data or SKYLAPSE_DATA names another"


def add_place(*commands: argparse.ArgumentParser) -> None:
    """Add the options of every command: the store's place, and the form of the answer."""
    for command in commands:
        command.add_argument("--data", metavar="DIR", help="default: SKYLAPSE_DATA, or skylapse-data")
        command.add_argument(
            "--config", metavar="FILE", help="the service's, where database or artifacts are elsewhere"
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")


def find_config(options: argparse.Namespace) -> ServeConfig:
    """Return the service's configuration, with the secrets of the environment."""
    given = argparse.Namespace(config=options.config, data=options.data)
    return with_secrets(load_config(given, our_variables()).config)


@contextmanager
def open_store(options: argparse.Namespace, is_read_only: bool = False) -> Iterator[Context]:
    """Open a context on an existing store, closed at the block's end; create nothing. Raises ValueError without one.

    is_read_only: leave the tables as they are, of an older release or not.
    """
    config = find_config(options)
    database = find_database(config)
    if database is None:
        raise ValueError(f"no store at {place_of(config)}: {HINT}")
    with closing(database):
        if not is_read_only:
            database.migrate()
        yield stand_on(config, database)


def find_database(config: ServeConfig) -> Database | None:
    """Return the service's database; None without a file, or without tables of ours."""
    url = make_url(config.database)
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).is_file()):
        return None
    database = Database(config.database)
    try:
        with database.read() as connection:
            if inspect(connection).has_table("jobs"):
                return database
    except DatabaseError as error:
        database.close()
        what = str(error.orig or "").strip().partition("\n")[0][:200]
        raise RuntimeError(f"the database at {place_of(config)} cannot be read: {what}") from None
    database.close()
    return None


def place_of(config: ServeConfig) -> str:
    """Return the store's place, without its password."""
    return make_url(config.database_url).render_as_string() if config.database_url else str(config.folder)


def account() -> Actor:
    """Return the user who runs the command, as the audit names them."""
    try:
        return Actor(f"cli:{getpass.getuser()}")
    except (KeyError, OSError):  # a user id without a name, as containers have them
        return Actor(f"cli:{os.getuid()}")
