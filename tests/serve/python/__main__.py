"""Runs the scenarios of OpenAI's Python SDK, sync and async; a program, so that any release of the SDK can run it.

    python tests/serve/python sync|async <facts.json

prints {"version": ..., "results": {scenario: null, or the traceback of what went wrong}}. `sdk.py` makes the facts.
A scenario is a coroutine function of one argument, `side`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import time
import traceback
import warnings
from typing import Any

import making
import openai
import reading
import refusals
import waiting
from side import Side

# OpenAI has ended its own service; the methods stay, and 3.x warns at each of their calls. That is the SDK's word about
# OpenAI and not about us. Every other warning is an error (`python -W error`).
warnings.filterwarnings("ignore", "The Sora API is scheduled to permanently shut down", DeprecationWarning)


async def run_all(is_async: bool, facts: dict[str, Any]) -> dict[str, str | None]:
    results: dict[str, str | None] = {}
    for module in (making, reading, waiting, refusals):
        for name, run in inspect.getmembers(module, inspect.iscoroutinefunction):
            if list(inspect.signature(run).parameters) != ["side"]:
                continue
            began_s = time.monotonic()
            try:
                await run(Side(is_async, facts))
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
            print(f"{time.monotonic() - began_s:.2f} s {name}", file=sys.stderr)
    return results


if __name__ == "__main__":
    results = asyncio.run(run_all(sys.argv[1] == "async", json.load(sys.stdin)))
    print(json.dumps({"version": openai.__version__, "results": results}))
