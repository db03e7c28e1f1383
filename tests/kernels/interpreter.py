"""Runs a script with Triton's interpreter, in a process of its own: kernels take to it when they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def interpret(script: Path, *arguments: str) -> str:
    """What the script prints; it must succeed."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
