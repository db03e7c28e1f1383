"""All bad requests against a real `skylapse serve`: each is refused, and after each a good job completes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from running import KEY, Running, wait_for

from skylapse.tests.serve.bad_requests import CASES
from skylapse.tests.serve.raw_http import Client

MIB = 2**20
SMALL = dict(num_frames=1, num_inference_steps=1, size="64x64")


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Running]:
    """Webhooks to private addresses are refused here."""
    running = Running(tmp_path / "data", {"creates_per_minute": 100_000})
    try:
        running.start()
        yield running
    finally:
        running.stop()


def memory_of(service: Running) -> dict[str, int]:
    """Bytes of its processes by their titles, what they share counted once (PSS)."""
    sizes: dict[str, int] = {}
    for pid, title in service.processes():
        with suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            sizes[f"{pid} {title[:60]}"] = 1024 * int(found[1]) if found else 0
    return sizes


def test_no_bad_request_does_any_harm(strict: Running) -> None:
    client = Client(strict.url, KEY)
    mine = strict.create(**SMALL)["id"]
    strict.ended([mine])
    for _ in range(20):  # what a service takes when it begins to work is no growth
        strict.ended([strict.create(**SMALL)["id"]])
    before = memory_of(strict)
    problems = []
    for case in CASES:
        if (problem := case.problem(case.send(client, mine=mine))) is not None:
            problems.append(problem)
        (video,) = strict.ended([strict.create(**SMALL)["id"]], 60.0)
        assert video["status"] == "completed", f"after {case.id}: {video}"
    assert not problems, "\n".join(problems)
    after = memory_of(strict)
    grown = {title: round((size - before.get(title, 0)) / MIB) for title, size in after.items()}
    print(json.dumps({"grown_mib": {title: mib for title, mib in grown.items() if abs(mib) > 5}}))
    of_rays_proxy = sum(mib for title, mib in grown.items() if "ProxyActor" in title)  # keeps what it has passed on
    assert sum(grown.values()) - of_rays_proxy < 100 and of_rays_proxy < 300, grown
    wait_for(lambda: not [*(strict.data / "scratch").iterdir()], 30.0, "the last file to be gone")
