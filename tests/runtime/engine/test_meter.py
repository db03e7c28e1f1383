"""Requests are charged with the time that their engine has worked, whoever shares it, skips, leaves or fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from skylapse.runtime.core.events import Checkpointed, Failed, Finished, Progress
from skylapse.runtime.core.request import VideoRequest
from skylapse.runtime.core.usage import Account, Usage
from skylapse.runtime.engine.engine import Engine
from skylapse.runtime.engine.meter import Meter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> Iterator[Engine]:
    engine = Engine.from_pretrained(str(demo_folder))
    _ = engine.memory
    yield engine
    engine.close()


def a_request(seed: int = 0, **fields: object) -> VideoRequest:
    given = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 4} | fields
    return VideoRequest(prompt="a red circle", seed=seed, **given)  # type: ignore[arg-type]


@contextmanager
def timed(engine: Engine) -> Iterator[list[float]]:
    """Give the seconds of each tick inside the block, by a clock of the test's own."""
    ticks: list[float] = []
    batch, tick = engine._batch, engine._batch.tick

    def measured() -> object:
        began_s = time.perf_counter()
        try:
            return tick()
        finally:
            ticks.append(time.perf_counter() - began_s)

    batch.tick = measured  # type: ignore[method-assign, assignment]
    try:
        yield ticks
    finally:
        del batch.tick  # type: ignore[method-assign]


MIXED = (
    a_request(1, num_frames=17, num_inference_steps=8),
    a_request(2, cache="fast", num_inference_steps=12),
    a_request(3, guidance_scale=1.0),
    a_request(4, width=48, height=80, num_frames=9, cache="high", num_inference_steps=10),
    a_request(5, num_inference_steps=3),
)


def test_shares_add_up_to_the_time_that_the_engine_worked(engine: Engine) -> None:
    """Mixed shapes and caches, one of them aborted on the way and one resumed."""

    async def run() -> list[Account]:
        accounts = [Account() for _ in MIXED]

        async def one(request: VideoRequest, account: Account) -> None:
            async for event in engine.stream(request, account=account):
                if request is MIXED[0] and isinstance(event, Progress) and event.step == 3:
                    return  # aborted

        await asyncio.gather(*(one(*pair) for pair in zip(MIXED, accounts, strict=True)))
        while any(account.is_open for account in accounts):
            await asyncio.sleep(0.01)
        return accounts

    busy_s = engine.meter.busy_s
    with timed(engine) as ticks:
        accounts = asyncio.run(run())
    charged_s = sum(account.usage.engine_seconds for account in accounts)
    assert charged_s == pytest.approx(sum(ticks), rel=0.02)
    assert charged_s == pytest.approx(engine.meter.busy_s - busy_s, rel=1e-9)
    assert all(account.usage.engine_seconds > 0 for account in accounts)


def test_a_video_tells_its_usage(engine: Engine) -> None:
    request = a_request(cache="fast", num_inference_steps=12)
    video = engine.generate(request)
    usage, cache = video.metadata.usage, video.metadata.cache
    assert usage is not None and cache is not None
    assert (usage.steps_computed, usage.steps_skipped) == (cache.num_evaluations, cache.num_skipped)
    assert usage.steps_skipped > 0
    assert usage.evaluations == 2 * usage.steps_computed  # guided: two branches
    alone = engine.generate(a_request(guidance_scale=1.0)).metadata.usage
    assert alone is not None and alone.evaluations == alone.steps_computed == 4


def test_progress_tells_what_has_been_used_so_far(engine: Engine) -> None:
    ticket = engine.submit(a_request())
    seen: list[Usage] = []
    ended = None
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Progress):
                assert event.usage is not None and event.usage.num_steps == event.step
                seen.append(event.usage)
            elif isinstance(event, Finished) and event.ticket == ticket:
                ended = event.video.metadata.usage
    seconds = [usage.engine_seconds for usage in seen]
    assert ended is not None and 0 < seconds[0] < seconds[-1] < ended.engine_seconds
    assert seconds == sorted(seconds)


def test_a_failed_request_has_used_what_it_had(engine: Engine) -> None:
    account = Account()

    async def run() -> None:
        async for event in engine.stream(a_request(num_inference_steps=500), account=account, deadline_s=0.5):
            ended = event
        assert isinstance(ended, Failed)

    asyncio.run(run())
    assert 0.2 < account.usage.engine_seconds < 2 and not account.is_open
    assert account.usage.steps_computed > 0


def test_a_request_that_is_refused_leaves_no_account_open(engine: Engine) -> None:
    account = Account()

    async def run() -> None:
        async for _ in engine.stream(a_request(num_frames=6), account=account):
            pass

    with pytest.raises(ValueError):
        asyncio.run(run())
    assert not account.is_open and account.usage == Usage()


def test_a_resumed_request_is_charged_with_what_this_engine_does(engine: Engine, tmp_path: Path) -> None:
    request = a_request(num_inference_steps=6)
    account, kept = Account(), None

    async def interrupted() -> Usage | None:
        async for event in engine.stream(request, account=account, checkpoint_every=3, checkpoint_dir=tmp_path):
            if isinstance(event, Checkpointed):
                return event.usage
        return None

    kept = asyncio.run(interrupted())
    assert kept is not None and (kept.num_steps, kept.evaluations) == (3, 6) and kept.engine_seconds > 0
    again = Account()

    async def resumed() -> None:
        async for _ in engine.stream_resumed(tmp_path, account=again):
            pass

    asyncio.run(resumed())
    assert (again.usage.num_steps, again.usage.evaluations) == (3, 6) and again.usage.engine_seconds > 0


def test_a_shared_step_is_split_by_tokens_times_evaluations() -> None:
    now = iter((0.0, 8.0, 9.0))
    meter = Meter(CPU, HostTimes(now))
    large, small, skipping = Account(), Account(), Account()
    meter.begin()
    meter.charge([(large, 300.0), (small, 100.0), (skipping, 0.0)], is_step=True)
    meter.charge([(small, 0.0), (skipping, 0.0)])  # nobody evaluated: equally
    assert [a.usage.engine_seconds for a in (large, small, skipping)] == [6.0, 2.5, 0.5]
    assert meter.busy_s == 9.0 and meter.step_times(0) == [8.0] and meter.step_times(1) == []


class HostTimes:
    def __init__(self, now: Iterator[float]) -> None:
        self.now = now

    def mark(self) -> float:
        return next(self.now)

    def seconds(self, begin: float, end: float, wait: bool) -> float:
        return end - begin


class Behind(HostTimes):
    """A device that the host runs ahead of, as CUDA: it tells the times of work that is done by `reached`."""

    reached = 0.0

    def seconds(self, begin: float, end: float, wait: bool) -> float:
        return end - begin if wait or end <= self.reached else None  # type: ignore[return-value]


def test_a_device_that_lags_behind_charges_who_gave_it_the_work() -> None:
    clock = Behind(iter((0.0, 5.0, 6.0)))
    meter = Meter(CPU, clock)
    first, second = Account(), Account()
    first.enter()
    meter.begin()
    meter.charge([(first, 1.0)], is_step=True)
    meter.charge([(second, 1.0)])
    first.leave()
    assert (first.is_open, first.usage) == (True, Usage())  # it has left, and what it used is not known yet
    clock.reached = 5.0
    meter.read()
    assert (first.is_open, first.usage, second.usage) == (False, Usage(5.0), Usage())
    meter.read(wait=True)
    assert second.usage.engine_seconds == 1.0 and meter.busy_s == 6.0
