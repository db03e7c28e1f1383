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


def memory_of(service: Running) -> dict[str, float]:
    """MiB of its processes by their titles, but for Ray's object store, whose 80 MiB are set aside at the start."""
    sizes: dict[str, float] = {}
    for pid, title in service.processes():
        with suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            parts = {name: int(kb) for name, kb in re.findall(r"^(Pss|Pss_Shmem):\s+(\d+) kB", text, re.MULTILINE)}
            sizes[f"{pid} {title[:60]}"] = (parts.get("Pss", 0) - parts.get("Pss_Shmem", 0)) / 1024
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
    grown = {title: mib - before.get(title, 0) for title, mib in after.items()}
    print(json.dumps({"grown_mib": {title: round(mib) for title, mib in grown.items() if abs(mib) > 5}}))
    assert sum(grown.values()) < 100, grown
    wait_for(lambda: not [*(strict.data / "scratch").iterdir()], 30.0, "the last file to be gone")
