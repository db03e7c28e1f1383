"""A Postgres of the tests' own, where Debian's is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def postgres_programs() -> Path | None:
    """Debian keeps them out of the PATH, a folder a version."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return folders[-1] if folders else None


class Postgres:
    """A cluster in a temporary folder, run by a user who is not root, on a free port of the loopback."""

    def __init__(self, programs: Path, owner: pwd.struct_passwd) -> None:
        self.programs, self.owner = programs, owner
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql+psycopg://skylapse@127.0.0.1:{self.port}/postgres"
        self.folder = tempfile.mkdtemp(prefix="skylapse-postgres-")
        os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self.run("initdb", "-D", f"{self.folder}/data", "-U", "skylapse", "--auth=trust", "-N")

    def run(self, program: str, *options: str) -> None:
        user, group = (self.owner.pw_uid, self.owner.pw_gid) if os.getuid() == 0 else (None, None)
        command = (str(self.programs / program), *options)
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, user=user, group=group)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-l", f"{self.folder}/log", "-w", "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "-w", "stop")


@contextmanager
def own_postgres() -> Iterator[Postgres]:
    """Started; the test skips where it cannot be."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no Postgres under /usr/lib/postgresql")
    try:
        owner = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    except KeyError:
        pytest.skip("root cannot run Postgres, and there is no user postgres")
    server = Postgres(programs, owner)
    try:
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(server.folder, ignore_errors=True)
