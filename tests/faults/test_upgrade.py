"""The release before and this one take turns on one store: jobs that run meanwhile are completed, there and back."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import pytest
from postgres import own_postgres
from running import Running
from test_kills import check_completed, start_jobs, wait_until_stepping

PREVIOUS = "556e08d85b59eae852b5f3d2cb38fbc0a9eb33b0"  # before several models, the ledger, operators and traces


@pytest.fixture(scope="module")
def previous(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which `import skylapse` is the release before."""
    archive = subprocess.run(["git", "archive", PREVIOUS], cwd=root, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this checkout's history does not reach back to {PREVIOUS[:7]}")
    folder = tmp_path_factory.mktemp("previous")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder / "skylapse", filter="data")
    return folder


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    with own_postgres() if request.param == "postgres" else nullcontext() as server:
        yield {} if server is None else {"SKYLAPSE_DATABASE_URL": server.url}


def test_jobs_survive_an_upgrade_and_the_way_back(tmp_path: Path, previous: Path, store: dict[str, str]) -> None:
    before = {**store, "PYTHONPATH": str(previous), "RAY_AUTH_MODE": "disabled"}  # it set no token of its own
    jobs: list[str] = []
    for environment, has_next in ((before, True), (store, True), (before, False)):
        service = Running(tmp_path / "data", environment=environment)
        try:
            service.start()
            if jobs:
                check_completed(service, service.ended(jobs))
            if has_next:
                jobs = start_jobs(service)
                wait_until_stepping(service, jobs)
        finally:
            service.stop()  # gives back what does not fit into its drain
