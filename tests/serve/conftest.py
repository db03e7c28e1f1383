"""Stores for tests: SQLite in a folder, and a Postgres of the tests' own where Debian's is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.leases import Leases


def postgres_programs() -> Path | None:
    """Debian keeps them out of the PATH, a folder a version."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return folders[-1] if folders else None


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A cluster in a temporary folder, run by a user who is not root, on a free port of the loopback."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no Postgres under /usr/lib/postgresql")
    try:
        owner = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    except KeyError:
        pytest.skip("root cannot run Postgres, and there is no user postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="skylapse-postgres-")
    os.chown(folder, owner.pw_uid, owner.pw_gid)

    def run(*command: str) -> None:
        user, group = (owner.pw_uid, owner.pw_gid) if os.getuid() == 0 else (None, None)
        subprocess.run(command, check=True, capture_output=True, cwd=folder, user=user, group=group)

    try:
        run(str(programs / "initdb"), "-D", f"{folder}/data", "-U", "skylapse", "--auth=trust", "-N")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run(str(programs / "pg_ctl"), "-D", f"{folder}/data", "-l", f"{folder}/log", "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://skylapse@127.0.0.1:{port}/postgres"
        finally:
            run(str(programs / "pg_ctl"), "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    from skylapse.serve.store.tables import metadata

    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path}/jobs.db")
    else:
        database = Database(request.getfixturevalue("postgres_url"))
        metadata.drop_all(database.engine)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def leases(database: Database) -> Leases:
    return Leases(database, lease_s=60.0)
