"""One service for the tests that leave it healthy behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two engines would hide how long one takes to come back, so there is one."""
    running = Running(tmp_path_factory.mktemp("service"), {"webhook_private": True})
    try:
        running.ready_s = running.start()  # type: ignore[attr-defined]
        yield running
    finally:
        running.stop()
