"""Plays a trace against a server: open loop (arrivals wait for nobody) or closed loop (so many at a time).

Open loop: a request's latency counts from when it was due, not from when the generator came to send it, so neither a
slow server nor a slow generator hides what a client would have waited (no coordinated omission). How late the
generator itself was is measured at each request; arrivals of a Poisson process see the time average of it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import aiohttp

from .client import Client, Outcome, clock
from .target import GaveUp, Target
from .traces import Arrival

GIVE_UP_ROW, GIVE_UP_S = 20, 5.0  # failures of the server in a row, over at least so long
LAG_S, LAG_SHARE = 0.02, 0.02  # of the generator's p99 that is borne: whichever is longer, seconds or of the median
SPIN_S = 0.0005  # what timers of the event loop may be early by


@dataclass
class Played:
    """outcomes: in order of arrival; span_s: from the run's beginning to its last end."""

    outcomes: list[Outcome] = field(default_factory=list)
    span_s: float = 0.0
    polls: int = 0

    @property
    def lags_s(self) -> list[float]:
        return [one.lag_s for one in self.outcomes if one.sent_s is not None]

    @property
    def latencies_s(self) -> list[float]:
        return [one.latency_s for one in self.outcomes if one.latency_s is not None]

    @property
    def distrust(self) -> str | None:
        """Why the figures are not to be trusted: the generator was itself too late. None where it was not."""
        lags = sorted(self.lags_s)
        if not lags:
            return None
        p99 = quantile(lags, 0.99)
        latencies = sorted(self.latencies_s)
        borne = max(LAG_S, LAG_SHARE * quantile(latencies, 0.5) if latencies else 0.0)
        if p99 <= borne:
            return None
        return f"the generator sent 1 % of the requests {p99:.3f} s late or later; {borne:.3f} s are borne"

    def ends(self) -> dict[str, int]:
        """How many ended how."""
        counted: dict[str, int] = {}
        for one in self.outcomes:
            counted[one.end] = counted.get(one.end, 0) + 1
        return dict(sorted(counted.items()))

    def reasons(self) -> dict[str, str]:
        """The first explanation of each kind of bad end."""
        found: dict[str, str] = {}
        for one in self.outcomes:
            if one.end != "ok" and one.why:
                found.setdefault(one.end, one.why)
        return found


class Watchdog:
    """Tells when the server has gone: nothing but failures, so many in a row and for so long."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.row, self.since_s = now, 0, 0.0

    def saw(self, outcome: Outcome) -> None:
        if outcome.end in ("ok", "rejected", "late", "unfinished") or outcome.end.startswith("failed:"):
            self.row = 0  # it answers, and by its rules
            return
        if not self.row:
            self.since_s = self.now()
        self.row += 1
        if self.row >= GIVE_UP_ROW and self.now() - self.since_s >= GIVE_UP_S:
            raise GaveUp(f"gave up: {self.row} requests in a row ended as {outcome.end} ({outcome.why})")


async def play(
    trace: Sequence[Arrival],
    target: Target,
    into: Played,
    *,
    concurrency: int | None = None,
    end_s: float | None = None,
    told: Callable[[Outcome], None] | None = None,
) -> None:
    """Fills `into` as requests end, so that a run that is interrupted leaves what it had.

    concurrency: closed loop of so many; None: open loop. end_s: what has not ended so long after the beginning is
    dropped here and at the server, as `late`. GaveUp where the server has gone.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0)
    timeout = aiohttp.ClientTimeout(total=target.http_timeout_s)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=target.headers, cookie_jar=jar
    ) as session:
        client = Client(session, target, clock())
        watchdog, gone = Watchdog(client.now), asyncio.get_running_loop().create_future()

        async def one(arrival: Arrival, outcome: Outcome) -> None:
            await client.run(arrival, outcome)
            if told is not None:
                told(outcome)
            try:
                watchdog.saw(outcome)
            except GaveUp as error:
                if not gone.done():
                    gone.set_exception(error)

        loop = (
            _open(trace, client, into, one) if concurrency is None else _closed(trace, client, into, one, concurrency)
        )
        work = asyncio.create_task(loop)
        try:
            await asyncio.wait({work, gone}, timeout=end_s, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
            else:
                work.result()
            if gone.done():
                gone.result()
            await _forget(client, into)
        finally:
            gone.cancel()
            work.cancel()
            into.span_s = max([client.now() if end_s is None else 0.0, *(one.done_s or 0.0 for one in into.outcomes)])
            into.polls = client.polls


One = Callable[[Arrival, Outcome], Coroutine[Any, Any, None]]


async def _open(trace: Sequence[Arrival], client: Client, into: Played, one: One) -> None:
    tasks: set[asyncio.Task[None]] = set()
    try:
        for index, arrival in enumerate(trace):
            wait_s = arrival.at_s - client.now()
            if wait_s > SPIN_S:
                await asyncio.sleep(wait_s)
            elif index % 32 == 31:
                await asyncio.sleep(0)  # a trace of all at once lets its first requests go out
            outcome = Outcome(index, arrival.kind, arrival.at_s, arrival.video_s)
            into.outcomes.append(outcome)
            task = asyncio.create_task(one(arrival, outcome))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
    finally:
        await _cancel(tasks)


async def _closed(trace: Sequence[Arrival], client: Client, into: Played, one: One, concurrency: int) -> None:
    numbers = count()

    async def worker() -> None:
        for index in numbers:
            if index >= len(trace):
                return
            arrival = trace[index]
            outcome = Outcome(index, arrival.kind, client.now(), arrival.video_s)
            into.outcomes.append(outcome)
            await one(arrival, outcome)
            if outcome.end in ("rejected", "refused"):
                await asyncio.sleep(max(0.1, outcome.retry_after_s))  # or it would ask as fast as it is turned away

    workers = {asyncio.create_task(worker()) for _ in range(min(concurrency, len(trace)))}
    try:
        for done in asyncio.as_completed(workers):
            await done
    finally:
        await _cancel(workers)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in list(tasks):
        task.cancel()
    if tasks:
        await asyncio.wait(set(tasks), timeout=5.0)


async def _forget(client: Client, into: Played) -> None:
    """What was waited for until the run's end is the server's to drop."""
    left = [one for one in into.outcomes if one.end == "unfinished"]
    for one in left:
        one.end, one.why = "late", "not done when the run ended"
    await asyncio.gather(*(client.forget(one) for one in left))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that at least this share of them does not exceed (no interpolation: a value that was seen)."""
    return ordered[max(1, math.ceil(share * len(ordered) - 1e-9)) - 1]
