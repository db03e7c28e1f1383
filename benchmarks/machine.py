"""What a result was measured on, so that it can be read later."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PEERS = ("triton", "diffusers", "cache-dit", "onnxruntime", "xformers", "flash_attn_3")


def in_words(machine: Mapping[str, Any]) -> str:
    """Return a machine's device and its threads, as a report's titles name it."""
    threads = machine.get("threads")
    return f"{machine.get('device')}, {threads} thread{'' if threads == 1 else 's'}"


def describe() -> dict[str, Any]:
    """Commit, versions (None: not installed), threads and device."""
    cuda = torch.cuda.is_available()
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: _version(name) for name in PEERS},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "load_before": [round(value, 2) for value in os.getloadavg()],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a machine without git, which a copy of the tree was sent to
        return ""
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()
