"""The service as events: the scheduler is the real one, queues are as long as theory has it, nothing is lost."""

from __future__ import annotations

import math
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import skylapse.runtime.engine.scheduler
from skylapse.benchmarks.load.traces import burst
from skylapse.benchmarks.load.workloads import mixed
from skylapse.benchmarks.simulate import model
from skylapse.benchmarks.simulate.cost import Shape, StepCost
from skylapse.benchmarks.simulate.model import simulate
from skylapse.benchmarks.simulate.service import LOOK_S, MAX_CALLS, UNCHECKED_S, Autoscaler, Ran, Service
from skylapse.benchmarks.suites.steps import StepWatch
from skylapse.benchmarks.suites.traffic import request_of
from skylapse.runtime.core.request import VideoRequest
from skylapse.runtime.engine.engine import Engine
from skylapse.runtime.engine.scheduler import Scheduler, SchedulerConfig
from skylapse.runtime.engine.trajectory import Trajectory

SMALL = Shape(name="small", tokens=96, num_steps=12, decode_s=(0.1, 0.2), finish_s=0.05)
LARGE = Shape(name="large", tokens=768, num_steps=12, decode_s=(0.4, 0.4))
COST = StepCost(fixed_s=0.01, request_s=0.002, token_s=0.0004)
CONFIG = SchedulerConfig(max_batch_tokens=384)


def trace(count: int, rate: float, seed: int = 0) -> list[tuple[float, Shape]]:
    rng = random.Random(seed)
    at_s, arrivals = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        arrivals.append((at_s, LARGE if rng.random() < 0.2 else SMALL))
    return arrivals


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.from_pretrained("demo")


# --- the scheduler ----------------------------------------------------------------------------------------------------


def test_every_pack_is_picked_by_the_runtimes_own_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    packs: list[int] = []

    def alone(self: Scheduler, works: Any, max_tokens: int | None = None) -> list[int]:
        packs.append(len(works))
        return [self.rank(works)[0].ticket]

    together = simulate(Service(dispatchers=None), COST, [(0.0, SMALL)] * 4)
    monkeypatch.setattr(skylapse.runtime.engine.scheduler.Scheduler, "pick", alone)
    apart = simulate(Service(dispatchers=None), COST, [(0.0, SMALL)] * 4)
    assert len(packs) == 4 * SMALL.num_steps and max(packs) == 4
    assert apart.span_s > together.span_s + 20 * COST.fixed_s  # nobody shared a step


def test_packs_are_those_of_the_real_engine(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four requests at once, which do not fit into one pack: the same tickets share the same steps in both."""
    picked: list[list[int]] = []
    tickets: list[int] = []
    pick = Scheduler.pick

    def recorded(self: Scheduler, *given: Any) -> list[int]:
        picked.append(sorted(pick(self, *given)))
        return picked[-1]

    monkeypatch.setattr(Scheduler, "pick", recorded)
    asked = [(9, 3), (17, 2), (9, 1), (9, 3)]
    requests = [
        VideoRequest(prompt="a red circle", width=64, height=64, num_frames=frames, num_inference_steps=steps, seed=k)
        for k, (frames, steps) in enumerate(asked)
    ]
    shapes = [
        Shape(name=str(k), tokens=2 * demo.prepare(request).num_tokens, num_steps=steps, decode_s=(0.0, 0.0))
        for k, (request, (_, steps)) in enumerate(zip(requests, asked, strict=True))
    ]
    config = SchedulerConfig(max_batch_tokens=demo.max_batch_tokens)
    assert sum(shape.tokens for shape in shapes) > config.max_batch_tokens
    for request in requests:
        tickets.append(demo.submit(request))
    while demo.has_work():
        demo.step()
    real, picked[:] = [[ticket - tickets[0] + 1 for ticket in pack] for pack in picked], []
    simulate(Service(slots=None, dispatchers=None, scheduler=config), COST, [(0.0, shape) for shape in shapes])
    assert len({len(pack) for pack in real}) > 1
    assert picked == real


def test_a_watch_sees_every_tick_of_an_engine_and_leaves_no_trace(demo: Engine) -> None:
    before, work = demo.pack_stats, Trajectory.work
    with StepWatch(demo) as watch:
        began = time.perf_counter()
        for seed in range(2):
            demo.submit(request_of("small", 2, seed))
        while demo.has_work():
            demo.step()
        took_s = time.perf_counter() - began
    packs, tokens = (after - before[k] for k, after in enumerate(demo.pack_stats))
    assert sum(watch.tokens) == tokens == 2 * 2 * 96
    assert sum(watch.requests) == 4 and sum(count > 0 for count in watch.tokens) == packs
    assert [len(watch.items_s[stage, "small"]) for stage in ("encode", "decode")] == [2, 4]
    items_s = sum(sum(values) for values in watch.items_s.values())
    assert min(watch.tick_s) > 0 and items_s > 0 and sum(watch.tick_s) + items_s <= took_s
    assert "step" not in vars(demo) and Trajectory.work is work


# --- queues -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_mean_wait_of_one_engine_with_one_slot_is_that_of_an_m_d_1_queue(load: float) -> None:
    shape = Shape(name="one", tokens=1, num_steps=1)
    rng, at_s, arrivals = random.Random(3), 0.0, []
    for _ in range(8000):
        at_s += rng.expovariate(load)
        arrivals.append((at_s, shape))
    ran = simulate(Service(slots=1, dispatchers=None), StepCost(fixed_s=1.0), arrivals)
    waits = [job.done_s - job.due_s - 1.0 for job in ran.jobs if job.done_s is not None]
    assert mean(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.08)  # Pollaczek and Khinchine


def test_a_request_alone_takes_its_work_and_what_hands_it_over() -> None:
    at_once = simulate(Service(dispatchers=None), COST, [(0.0, SMALL)]).outcomes[0].latency_s
    assert at_once == pytest.approx(SMALL.alone_s(COST) + SMALL.finish_s)
    looked = simulate(Service(), COST, [(0.03, SMALL)]).outcomes[0].latency_s
    assert looked == pytest.approx(SMALL.alone_s(COST) + SMALL.finish_s + 0.07)  # a dispatcher looks at 0.1 s


def test_one_dispatcher_keeps_256_jobs_going_however_many_engines_there_are() -> None:
    counts: list[int] = []
    for dispatchers in (1, 2):
        run = model._Run(Service(replicas=100, dispatchers=dispatchers), COST, [(0.0, SMALL)] * 400, 0)
        run.at(SMALL.alone_s(COST) / 2, lambda run=run: counts.append(run.num_running))  # type: ignore[misc]
        run.play()
    assert counts == [MAX_CALLS, 400]


def test_constants_are_those_of_the_service() -> None:
    folder = Path(model.__file__).parents[2] / "serve" / "deployment"
    text = (folder / "dispatcher.py").read_text() + (folder / "replica.py").read_text()
    found = {name: value for name, value in re.findall(r"^(LOOK_S|MAX_CALLS|UNCHECKED_S).*?= ([\d.]+)", text, re.M)}
    assert float(found["LOOK_S"]) == LOOK_S
    assert float(found["MAX_CALLS"]) == MAX_CALLS
    assert float(found["UNCHECKED_S"]) == UNCHECKED_S


# --- deaths, and engines that come and go -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_every_request_ends_once_though_engines_die(seed: int) -> None:
    service = Service(replicas=4, slots=3, scheduler=CONFIG, mtbf_s=20.0, load_s=5.0)
    arrivals = trace(200, 1.5, seed)
    ran = simulate(service, COST, arrivals, seed)
    assert ran.num_deaths > 5
    assert [job.due_s for job in ran.jobs] == [at_s for at_s, _ in arrivals]
    assert {job.end for job in ran.jobs} <= {"ok", "failed"}
    assert all(job.done_s is not None and job.done_s >= job.due_s for job in ran.jobs)
    assert sum(job.num_resumed for job in ran.jobs) > 0
    for job in ran.jobs:  # what a checkpoint saves is all that may be missing
        if job.end == "ok":
            assert job.steps_done == job.shape.num_steps


def test_deaths_make_requests_wait_longer() -> None:
    service = Service(replicas=4, slots=3, scheduler=CONFIG, load_s=5.0)
    calm = simulate(service, COST, trace(200, 1.5))
    shaken = simulate(replace(service, mtbf_s=20.0), COST, trace(200, 1.5))
    assert _mean_latency(shaken) > 1.1 * _mean_latency(calm)


def test_a_request_that_gets_nowhere_alone_fails_after_the_last_attempt() -> None:
    long = Shape(name="long", tokens=100, num_steps=4)  # its only checkpoint would come behind its last step
    service = Service(mtbf_s=2.0, load_s=1.0, max_attempts=3, dispatchers=None)
    ran = simulate(service, StepCost(fixed_s=50.0), [(0.0, long)], seed=1)
    assert ran.jobs[0].end == "failed" and ran.outcomes[0].latency_s is None
    assert ran.num_deaths >= 4  # one beside others, three alone


def test_a_checkpoint_carries_a_request_over_more_deaths_than_attempts() -> None:
    long = Shape(name="long", tokens=100, num_steps=200)
    service = Service(mtbf_s=30.0, load_s=1.0, checkpoint_every=1, dispatchers=None)
    ran = simulate(service, StepCost(fixed_s=1.0), [(0.0, long)], seed=1)
    assert ran.num_deaths > 3 and ran.jobs[0].end == "ok" and ran.jobs[0].num_resumed >= 3


def test_nobody_passes_a_suspect_and_it_is_alone() -> None:
    run = model._Run(Service(replicas=2, dispatchers=None), COST, [(0.0, SMALL)] * 4, 0)
    for _ in range(2):
        run.born()
    for job in run.jobs:
        run.enqueue(job)
    victim = next(engine for engine in run.replicas.values() if len(engine.held) > 0)
    other = next(engine for engine in run.replicas.values() if engine is not victim)
    held = len(other.held)
    for job in list(victim.held.values()):
        run.let_go(victim, job)
        job.is_suspect = True
        run.back(job)
    suspects = [job for job in victim.held.values()]
    assert len(suspects) == 1 and suspects[0].is_suspect
    assert len(other.held) == held  # a busy engine is given none


def test_engines_follow_the_backlog_and_nothing_is_lost_when_they_stop() -> None:
    asked = burst(1.2, mixed().ask(0), 5, requests=300)
    arrivals = [(one.at_s, LARGE if one.kind == "large" else SMALL) for one in asked]
    fast = Autoscaler(clear_in_s=5.0, max_replicas=6, upscale_delay_s=2.0, downscale_delay_s=5.0)
    service = Service(slots=4, scheduler=CONFIG, load_s=3.0, drain_s=2.0, autoscaler=fast)
    ran, fixed = (simulate(s, COST, arrivals) for s in (service, replace(service, replicas=6, autoscaler=None)))
    assert {job.end for job in ran.jobs} == {"ok"}
    assert 1 < ran.most_replicas <= 6
    assert ran.replica_s < 0.9 * fixed.replica_s
    assert _mean_latency(ran) > _mean_latency(fixed)


# --- seeds and bad input ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    service = Service(replicas=3, slots=3, scheduler=CONFIG, mtbf_s=60.0)
    first, again, other = (simulate(service, COST, trace(100, 1.0), seed) for seed in (1, 1, 2))
    assert [job.done_s for job in first.jobs] == [job.done_s for job in again.jobs]
    assert [job.done_s for job in first.jobs] != [job.done_s for job in other.jobs]


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace is empty"):
        simulate(Service(), COST, [])


@pytest.mark.parametrize("change", [{"slots": 0}, {"replicas": 0}, {"mtbf_s": 0.0}, {"mtbf_s": math.nan}])
def test_a_service_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(Service(), **change)


def _mean_latency(ran: Ran) -> float:
    return mean(one.latency_s for one in ran.outcomes if one.latency_s is not None)
