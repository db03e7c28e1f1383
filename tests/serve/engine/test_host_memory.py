"""The share of the host's memory in use: of the machine, or of the container's limit."""

from __future__ import annotations

from pathlib import Path

from skylapse.serve.engine.host_memory import host_memory

MEMINFO = (
    "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   18000000 kB\nHugePages_Total:       0\n"
)


def test_it_is_what_is_not_available_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert host_memory(tmp_path / "meminfo", tmp_path) == {"memory_utilization": 0.25}


def test_a_containers_limit_comes_first(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "memory.current").write_text("3000\n")
    for limit, share in (("4000\n", 0.75), ("max\n", 0.25)):
        (tmp_path / "memory.max").write_text(limit)
        assert host_memory(tmp_path / "meminfo", tmp_path) == {"memory_utilization": share}


def test_nothing_is_told_where_nobody_counts(tmp_path: Path) -> None:
    assert host_memory(tmp_path / "meminfo", tmp_path) == {}


def test_this_machine_tells_a_share() -> None:
    assert all(0 < share < 1 for share in host_memory().values())
