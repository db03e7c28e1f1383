"""A function in a process of its own, whose start or memory is what is measured; what it returns comes back as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ...runtime.core.config import environment

TIMEOUT_S = 600.0
MARK = "skylapse apart: "  # before the answer, among whatever else is printed


class Died(RuntimeError):
    """The process did not answer."""


def run_apart(
    function: Callable[..., object],
    arguments: Mapping[str, object],
    changed: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Any:
    """What `function(**arguments)` returns in a fresh process. Died says with which words it ended instead.

    The function must stand in a module; arguments and result are JSON. changed: variables of its environment.
    """
    asked = {"module": function.__module__, "name": function.__qualname__, "arguments": dict(arguments)}
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment(changed or {}),
            cwd=Path.cwd(),
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise Died(f"not done within {timeout_s:g} s") from error
    answer = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(MARK)), None)
    if done.returncode or answer is None:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise Died(f"{how}: {words}")
    return json.loads(answer.removeprefix(MARK))


def seconds_until_main() -> float:
    """Of this process, from its birth until now: what a start costs before any of our lines ran.

    From /proc where it is; else 0, and a start seems that much quicker.
    """
    try:
        after_boot = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf(
            "SC_CLK_TCK"
        )
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot


def main() -> None:
    asked = json.loads(sys.argv[1])
    function = getattr(import_module(asked["module"]), asked["name"])
    print(MARK + json.dumps(function(**asked["arguments"])), flush=True)


if __name__ == "__main__":
    main()
