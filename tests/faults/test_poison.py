"""A request that kills its engine fails alone, however often it takes its neighbours with it."""

from __future__ import annotations

import sys
from pathlib import Path

from running import Running

SCRIPT = str(Path(__file__).with_name("poisoned.py"))


def test_one_poison_and_five_good_jobs_in_one_pack_end_in_one_failure(tmp_path: Path) -> None:
    service = Running(tmp_path / "data", {"max_attempts": 2}, command=(sys.executable, SCRIPT))
    try:
        service.start()
        good = [service.create(num_inference_steps=40, seed=seed)["id"] for seed in range(3)]
        poison = service.create(prompt="a poison star", num_inference_steps=40)["id"]
        good += [service.create(num_inference_steps=40, seed=seed)["id"] for seed in range(3, 5)]
        videos = {video["id"]: video for video in service.ended([*good, poison], within_s=300)}
        assert [videos[job]["status"] for job in good] == ["completed"] * 5
        failed = videos[poison]
        assert (failed["status"], failed["error"]["code"], failed["attempts"]) == ("failed", "crashed", 2)
        assert [videos[job]["attempts"] for job in good] == [0] * 5
    finally:
        service.stop()
