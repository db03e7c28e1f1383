"""The share of the host's memory that is in use, for engines on a CPU; a GPU's is in `serve/engine/gpu.py`."""

from __future__ import annotations

from pathlib import Path

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def host_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> dict[str, float]:
    """Return `memory_utilization`, within the container's limit where there is one; nothing where nobody counts."""
    limit, current = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and current.exists() and (text := limit.read_text().strip()).isdecimal():
        return {"memory_utilization": round(int(current.read_text()) / int(text), 4)}
    if not meminfo.exists():
        return {}
    lines = meminfo.read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {"memory_utilization": round(1 - kib["MemAvailable"] / kib["MemTotal"], 4)}
