"""The service as discrete events: arrivals, dispatchers, engines, an autoscaler and deaths, in one heap by time.

As in serve/: a dispatcher looks ten times a second and makes as many calls as there are unfinished jobs, up to its
most; Serve sends a call to the less busy of two engines with a free slot; the engine claims whoever is first by then,
and keeps the slot until the file is written. A suspect (its engine died under it) is claimed by an idle engine alone,
and nobody passes it. Left out: the store's and the router's own time, tenants, priorities, caches, limits of memory.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence

from ...serve.deployment.autoscaling import num_engines
from ...serve.store.backlog import Backlog
from .cost import Shape, StepCost
from .replica import Job, Replica
from .service import LOOK_S, MAX_CALLS, POLL_S, UNCHECKED_S, Ran, Service


def simulate(service: Service, cost: StepCost, arrivals: Sequence[tuple[float, Shape]], seed: int = 0) -> Ran:
    """Until every request has ended, each exactly once. arrivals: (second, what is asked for)."""
    if not arrivals:
        raise ValueError("the trace is empty: there is nothing to simulate")
    return _Run(service, cost, arrivals, seed).play()


class _Run:
    def __init__(self, service: Service, cost: StepCost, arrivals: Sequence[tuple[float, Shape]], seed: int) -> None:
        self.service, self.cost, self.rng = service, cost, random.Random(seed)
        alone_s = {shape: shape.alone_s(cost) for shape in {shape for _, shape in arrivals}}
        ordered = sorted(arrivals, key=lambda arrival: arrival[0])
        self.jobs = [Job(index, at_s, shape, alone_s[shape]) for index, (at_s, shape) in enumerate(ordered)]
        self.now_s, self.heap, self._order = 0.0, list[tuple[float, int, Callable[[], None]]](), itertools.count()
        self.queue: list[tuple[int, Job]] = []  # by age
        self.calls = self.num_running = self.num_deaths = self.num_ended = 0
        self.backlog_s = self.replica_s = self.busy_s = 0.0
        self.num_ticks = self.num_replicas = self.most_replicas = self._numbers = 0
        self.replicas: dict[int, Replica] = {}  # that are loaded and not gone
        self.open: list[Replica] = []  # with a slot for a call
        self._places: dict[int, int] = {}  # number -> place in `open`
        self.idle: dict[int, Replica] = {}  # of those, who hold nothing
        self._coming = 0  # the next of the trace
        self._looks = False  # whether a look is to come
        self._wants_since: tuple[int, float] | None = None  # the autoscaler's direction, and since when

    def play(self) -> Ran:
        service = self.service
        first = service.replicas
        if service.autoscaler is not None:
            first = min(max(first, service.autoscaler.min_replicas), service.autoscaler.max_replicas)
            self.at(POLL_S, self.scale)
        for _ in range(first):
            self.num_replicas += 1
            self.born()
        self.at(self.jobs[0].due_s, self.arrive)
        while self.num_ended < len(self.jobs):
            assert self.heap, "requests are left and nothing is to come"
            self.now_s, _, event = heapq.heappop(self.heap)
            event()
        for engine in list(self.replicas.values()):
            self.gone(engine)
        return Ran(
            self.jobs,
            max(job.done_s for job in self.jobs if job.done_s is not None),
            self.replica_s,
            self.busy_s,
            self.num_ticks,
            self.num_deaths,
            self.most_replicas,
        )

    def at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (at_s, next(self._order), event))

    # --- jobs and who gets them -----------------------------------------------------------------------------------

    def arrive(self) -> None:
        """Whoever is due, and then wait for the next one."""
        while self._coming < len(self.jobs) and self.jobs[self._coming].due_s <= self.now_s:
            job = self.jobs[self._coming]
            self._coming += 1
            self.backlog_s += job.work_s
            self.enqueue(job)
        if self._coming < len(self.jobs):
            self.at(self.jobs[self._coming].due_s, self.arrive)

    def enqueue(self, job: Job) -> None:
        heapq.heappush(self.queue, (job.index, job))
        if self.service.dispatchers is None:
            self.calls = len(self.queue) + self.num_running
            self.hand_out()
        else:
            self.look_soon()

    def look_soon(self) -> None:
        """At the next look of a dispatcher, if there is a call to be made."""
        count = self.service.dispatchers
        if count is None or self._looks or self.calls >= min(MAX_CALLS * count, len(self.queue) + self.num_running):
            return
        every_s = LOOK_S / count
        self._looks = True
        self.at((self.now_s // every_s + 1) * every_s, self.look)

    def look(self) -> None:
        assert self.service.dispatchers is not None
        self._looks = False
        most = MAX_CALLS * self.service.dispatchers
        self.calls = max(self.calls, min(most, len(self.queue) + self.num_running))
        self.hand_out()

    def hand_out(self) -> None:
        """A job for each call that finds a slot."""
        while self.queue and self.calls > self.num_running and self.open:
            job = self.queue[0][1]
            if job.is_suspect:
                if not self.idle:
                    return
                engine = next(iter(self.idle.values()))
            else:
                engine = self.less_busy()
            heapq.heappop(self.queue)
            self.num_running += 1
            engine.has_suspect = job.is_suspect
            job.num_resumed += job.checkpoint_step > 0
            engine.held[job.index] = job
            engine.join(job)
            self.offer(engine)
            if not engine.is_ticking:
                engine.is_ticking = True  # who comes in the same instant is in the same tick
                self.at(self.now_s, lambda engine=engine: self.tick(engine))  # type: ignore[misc]

    def less_busy(self) -> Replica:
        """The power of two choices, as Serve's router has it."""
        if len(self.open) == 1:
            return self.open[0]
        one, other = self.rng.sample(self.open, 2) if len(self.open) < 3 else self.two()
        return other if len(other.held) < len(one.held) else one

    def two(self) -> tuple[Replica, Replica]:
        first = self.rng.randrange(len(self.open))
        second = self.rng.randrange(len(self.open) - 1)
        return self.open[first], self.open[second + (second >= first)]

    def offer(self, engine: Replica) -> None:
        """Whether calls may go to it, after what has changed."""
        slots = self.service.slots
        is_open = not (engine.is_gone or engine.is_stopping or engine.has_suspect)
        is_open = is_open and (slots is None or len(engine.held) < slots)
        place = self._places.get(engine.number)
        if is_open and place is None:
            self._places[engine.number] = len(self.open)
            self.open.append(engine)
        elif not is_open and place is not None:
            last = self.open.pop()
            del self._places[engine.number]
            if last is not engine:
                self.open[place], self._places[last.number] = last, place
        if is_open and not engine.held:
            self.idle[engine.number] = engine
        else:
            self.idle.pop(engine.number, None)

    # --- engines --------------------------------------------------------------------------------------------------

    def tick(self, engine: Replica) -> None:
        if not engine.is_gone:
            self.at(self.now_s + engine.begin_tick(), lambda: self.ticked(engine))

    def ticked(self, engine: Replica) -> None:
        if engine.is_gone:
            return
        had_suspect = engine.has_suspect
        stepped, last = engine.end_tick()
        for job in stepped:
            self.backlog_s -= job.work_s / job.shape.num_steps
        if last is not None and last.index in engine.held:
            if last.shape.finish_s:
                self.at(self.now_s + last.shape.finish_s, lambda: self.written(engine, last))
            else:
                self.written(engine, last)
        if had_suspect and not engine.has_suspect:
            self.offer(engine)
            self.hand_out()
        if engine.has_work and not engine.is_ticking:
            self.tick(engine)

    def written(self, engine: Replica, job: Job) -> None:
        if engine.held.get(job.index) is job:  # else its engine died over it
            self.let_go(engine, job)
            self.ended(job, "ok")
            self.look_soon()
            self.hand_out()

    def let_go(self, engine: Replica, job: Job) -> None:
        del engine.held[job.index]
        engine.leave(job)
        self.num_running -= 1
        self.calls -= 1
        if job.is_suspect:
            engine.has_suspect = False
        self.offer(engine)
        if engine.is_stopping and not engine.held:
            self.gone(engine)

    def ended(self, job: Job, end: str) -> None:
        assert job.end == "unfinished", "a request ends once"
        job.done_s, job.end = self.now_s, end
        self.num_ended += 1

    def back(self, job: Job) -> None:
        """To the queue, to go on from its checkpoint."""
        self.backlog_s += job.work_s * (job.steps_done - job.checkpoint_step) / job.shape.num_steps
        job.steps_done = job.checkpoint_step
        self.enqueue(job)

    # --- engines come and go --------------------------------------------------------------------------------------

    def born(self) -> None:
        self._numbers += 1
        engine = Replica(self._numbers, self.cost, self.service.scheduler, self.service.checkpoint_every)
        engine.began_s = self.now_s
        self.replicas[engine.number] = engine
        self.most_replicas = max(self.most_replicas, len(self.replicas))
        if math.isfinite(self.service.mtbf_s):
            self.at(self.now_s + self.rng.expovariate(1 / self.service.mtbf_s), lambda: self.die(engine))
        self.offer(engine)
        self.hand_out()

    def load(self) -> None:
        """A replica that works when its weights are there."""
        self.replica_s += self.service.load_s
        self.at(self.now_s + self.service.load_s, self.born)

    def gone(self, engine: Replica) -> None:
        engine.is_gone = True
        del self.replicas[engine.number]
        self.replica_s += self.now_s - engine.began_s
        self.busy_s += engine.busy_s
        self.num_ticks += engine.num_ticks
        self.offer(engine)

    def die(self, engine: Replica) -> None:
        """Its jobs are suspects; one that was alone and got nowhere fails in the end. Serve starts another replica."""
        if engine.is_gone:
            return
        self.num_deaths += 1
        is_replaced = not engine.is_stopping
        engine.is_stopping = False
        for job in list(engine.held.values()):
            attempts = job.attempts + int(job.is_suspect)
            self.let_go(engine, job)
            job.attempts, job.is_suspect = attempts, True
            if attempts >= self.service.max_attempts:
                self.backlog_s -= job.work_s * (1 - job.steps_done / job.shape.num_steps)
                self.ended(job, "failed")
            else:
                self.at(self.now_s + self.service.detect_s, lambda job=job: self.back(job))  # type: ignore[misc]
        self.gone(engine)
        if is_replaced:
            self.load()

    # --- the autoscaler -------------------------------------------------------------------------------------------

    def scale(self) -> None:
        """Serve acts on what the policy has wanted for as long as the delay of that direction."""
        auto = self.service.autoscaler
        assert auto is not None
        self.at(self.now_s + POLL_S, self.scale)
        jobs = len(self.queue) + self.num_running
        wanted = num_engines(Backlog(jobs, max(0.0, self.backlog_s)), auto.clear_in_s)
        wanted = min(max(wanted, auto.min_replicas), auto.max_replicas)
        direction = (wanted > self.num_replicas) - (wanted < self.num_replicas)
        if direction == 0:
            self._wants_since = None
            return
        if self._wants_since is None or self._wants_since[0] != direction:
            self._wants_since = (direction, self.now_s)
        delay_s = auto.upscale_delay_s if direction > 0 else auto.downscale_delay_s
        if self.now_s - self._wants_since[1] < delay_s:
            return
        self._wants_since = None
        for _ in range(wanted - self.num_replicas):
            self.load()
        there = sorted((e for e in self.replicas.values() if not e.is_stopping), key=lambda e: (len(e.held), -e.number))
        for engine in there[: max(0, self.num_replicas - wanted)]:
            self.stop(engine)
        self.num_replicas = wanted

    def stop(self, engine: Replica) -> None:
        """As `Worker.drain`: what fits is finished, the rest is given back, which counts against nobody."""
        engine.is_stopping = True
        self.offer(engine)
        if not engine.held:
            self.gone(engine)
            return
        budget_s = 0.7 * self.service.drain_s
        self.at(self.now_s + UNCHECKED_S, lambda: self.give_back(engine, budget_s / 2))
        self.at(self.now_s + UNCHECKED_S + budget_s, lambda: self.give_back(engine, -1.0))

    def give_back(self, engine: Replica, within_s: float) -> None:
        for job in list(engine.held.values()):
            if engine.eta_s(job) > within_s:
                self.let_go(engine, job)
                self.back(job)
