"""What the load generator can do on one core, against a stub in a process of its own, and how honest it is.

    python -m skylapse.benchmarks.load.selftest --rate 500

1. It is held to one core and plays Poisson arrivals at `--rate`: how many it sent, how late, what it measured.
2. The stub is stopped (SIGSTOP) for a while and woken: whoever was due meanwhile must have waited until then. The same
   stop under a closed loop shows what coordinated omission would have reported instead.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from ..sheet import Sheet, suite_parser
from .play import Played, play, quantile
from .target import Target, detected
from .traces import Arrival, at_once, poisson

SERVICE_S, STOP_S = 0.05, 0.5
FIELDS = {"prompt": "a red circle", "size": "64x64", "seconds": "2"}


def ask(number: int) -> tuple[str, dict[str, str], float]:
    return "stub", FIELDS, 2.0


@contextmanager
def stub(service_s: float = SERVICE_S, core: int | None = None) -> Iterator[tuple[str, int]]:
    """(URL, process id) of a stub that ends with the block."""
    command = [sys.executable, "-m", "skylapse.benchmarks.load.stub", "--service", str(service_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the stub server did not start")
        yield url, process.pid
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def target_of(url: str) -> Target:
    """Asks often, since its clips take milliseconds."""
    return replace(detected(Target(url)), poll_share=0.2, poll_least_s=0.02, poll_rate=1e6, timeout_s=30.0)


def stopped(trace: Sequence[Arrival], target: Target, pid: int, at_s: float, concurrency: int | None) -> Played:
    """A run in which the server stands still for STOP_S."""
    played = Played()

    async def run() -> None:
        async def freeze() -> None:
            await asyncio.sleep(at_s)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(STOP_S)
            os.kill(pid, signal.SIGCONT)

        freezing = asyncio.create_task(freeze())
        await play(trace, target, played, concurrency=concurrency)
        await freezing

    asyncio.run(run())
    return played


def main(arguments: Sequence[str] | None = None) -> int:
    parser = suite_parser("load_selftest", "the load generator against a stub server", model="stub")
    parser.add_argument("--rate", type=float, default=500.0, help="requests a second; default: 500")
    parser.add_argument("--duration", type=float, default=10.0, metavar="S", help="of each part; default: 10")
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    duration_s = options.duration if not options.quick else min(options.duration, 3.0)
    settings = {"rate": options.rate, "duration_s": duration_s, "service_s": SERVICE_S, "stop_s": STOP_S}
    sheet = Sheet("load_selftest", options, settings | {"cores_of_the_generator": 1 if cores else 0})
    if cores:
        os.sched_setaffinity(0, {cores[0]})
    with sheet.running(), stub(core=cores[-1] if len(cores) > 1 else None) as (url, pid):
        target = target_of(url)
        rate(sheet, poisson(options.rate, ask, options.seed, duration_s=duration_s), target, duration_s)
        honesty(sheet, target, pid, options.rate / 5, options.seed)
    return sheet.status


def rate(sheet: Sheet, trace: Sequence[Arrival], target: Target, duration_s: float) -> None:
    """How many requests a second, and what the generator's one core had left."""
    played = Played()
    cpu_s, began_s = time.process_time(), time.perf_counter()
    asyncio.run(play(trace, target, played))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
    ok = played.latencies_s
    sheet.measured("load_selftest/rate", "req/s", [len(ok) / max(duration_s, played.outcomes[-1].due_s)], "higher")
    over = [latency_s - SERVICE_S for latency_s in ok]
    resolutions = [one.resolution_s for one in played.outcomes]
    for name, values in (("lag", played.lags_s), ("over_service", over), ("resolution", resolutions)):
        sheet.measured(f"load_selftest/{name}", "s", values)
        sheet.measured(f"load_selftest/{name}/p99", "s", [quantile(sorted(values), 0.99)])
    sheet.measured("load_selftest/cpu", "cores", [cpu_s / wall_s])
    sheet.measured("load_selftest/exchanges", "1/s", [(len(trace) + played.polls) / duration_s], "higher")
    bad = {end: number for end, number in played.ends().items() if end != "ok"}
    if bad:
        sheet.failed("load_selftest/ends", f"{bad}: {played.reasons()}")
    if min(over, default=0.0) < 0:
        sheet.failed("load_selftest/honest", f"a latency is {-min(over):.4f} s shorter than the server's own work")
    if reason := played.distrust:
        sheet.failed("load_selftest/trusted", reason)


def honesty(sheet: Sheet, target: Target, pid: int, requests_per_s: float, seed: int) -> None:
    """A server that stands still, seen by the open loop, and by a closed one that omits who was not sent."""
    at_s, length_s = 1.0, 3.0
    trace = poisson(requests_per_s, ask, seed + 1, duration_s=length_s)
    seen = stopped(trace, target, pid, at_s, None)
    due = [one for one in seen.outcomes if at_s + 0.1 < one.due_s < at_s + STOP_S]
    waited = [(one.latency_s or 0.0) - (at_s + STOP_S - one.due_s) for one in due]
    sheet.measured("load_selftest/stop/least_beyond_the_wait", "s", [min(waited)], "neither", {"requests": len(due)})
    if min(waited) < -0.01:
        sheet.failed("load_selftest/stop", "a request that was due in the stop was told to have waited less")
    omitting = stopped(at_once(ask, len(trace)), target, pid, at_s, max(1, round(requests_per_s * SERVICE_S)))
    for name, played in (("open", seen), ("closed", omitting)):
        slow = [one for one in played.latencies_s if one > SERVICE_S + STOP_S / 2]
        share = len(slow) / max(1, len(played.latencies_s))
        sheet.measured(f"load_selftest/stop/share_of_slow/{name}", "share", [share], "neither")


if __name__ == "__main__":
    sys.exit(main())
