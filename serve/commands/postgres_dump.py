"""Runs Postgres' own programs, pg_dump and pg_restore, for the tables of a store."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, make_url, text

from ...runtime.core.config import environment
from ..store.tables import metadata

if TYPE_CHECKING:
    from ..store.database import Database

DEBIAN = Path("/usr/lib/postgresql")  # keeps the programs of each version in a folder of its own, out of the PATH


@contextmanager
def snapshot(database: Database, target: Path) -> Iterator[Connection]:
    """Dump our tables as one transaction sees them, and give the connection of this transaction."""
    find("pg_dump")  # told before anything is asked of the database
    with database.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        name = connection.scalar(text("select pg_export_snapshot()"))
        there = set(inspect(connection).get_table_names())
        tables = [f"--table={table}" for table in metadata.tables if table in there]
        options = ("--format=custom", "--no-owner", "--no-privileges", f"--snapshot={name}", f"--file={target}")
        run("pg_dump", database.url, (*options, *tables))
        yield connection


def load(url: str, dump: Path) -> None:
    """Put the dumped tables in the place of those that are there, in one transaction."""
    options = ("--clean", "--if-exists", "--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error")
    run("pg_restore", url, (*options, str(dump)))


def run(program: str, url: str, options: Sequence[str]) -> None:
    """Run a program, its password in no command line, which others can read. Raises RuntimeError in its words."""
    parts = make_url(url)
    target = parts.set(drivername="postgresql", password=None).render_as_string()
    variables = {"LC_ALL": "C"} | ({} if parts.password is None else {"PGPASSWORD": str(parts.password)})
    command = (find(program), f"--dbname={target}", "--no-password", *options)
    ended = subprocess.run(command, env=environment(variables), capture_output=True, text=True)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
        raise RuntimeError(next((line for line in lines if "error:" in line), lines[-1])[:300])


def find(program: str) -> str:
    """Return the newest one of this machine. Raises ValueError if there is none."""
    folders = sorted((path for path in DEBIAN.glob("*/bin") if path.parent.name.isdecimal()), key=_version)
    found = [str(folder / program) for folder in reversed(folders) if (folder / program).is_file()]
    path = shutil.which(program) or next(iter(found), None)
    if path is None:
        what = "a Postgres store is backed up and restored by pg_dump and pg_restore"
        raise ValueError(f"{program} is not on this machine: {what}; install postgresql-client")
    return path


def _version(folder: Path) -> int:
    return int(folder.parent.name)
