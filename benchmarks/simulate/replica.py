"""One engine of the model: the ticks of `engine/batch.py`, driven by the real scheduler, with a cost for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...runtime.engine.scheduler import Scheduler, SchedulerConfig, Work
from .cost import Shape, StepCost


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way. steps_done: in the engine that has it; checkpoint_step: where another one goes on."""

    index: int
    due_s: float
    shape: Shape
    work_s: float  # of one engine, alone
    done_s: float | None = None
    end: str = "unfinished"
    steps_done: int = 0
    checkpoint_step: int = 0
    attempts: int = 0
    is_suspect: bool = False  # its engine died under it
    num_resumed: int = 0
    ticket: int = 0  # of the engine that has it
    arrived: int = 0  # that engine's clock
    items_done: int = 0  # of the stage that it is in

    def seen(self) -> Work:
        """What the scheduler may know, as `batch._work` has it of a request without a cache."""
        shape = self.shape
        total = shape.tokens * shape.num_steps
        return Work(
            ticket=self.ticket,
            tokens=shape.tokens,
            total_tokens=total,
            remaining_tokens=total * (shape.num_steps - self.steps_done) // shape.num_steps,
            arrived=self.arrived,
        )


@dataclass(slots=True, eq=False)
class Replica:
    """Ticks are begun and ended apart: what happens in between finds the steps not taken yet.

    Memory is taken to hold whoever has a slot. `held`: jobs that have one, by index, those whose file is being written
    too.
    """

    number: int
    cost: StepCost
    config: SchedulerConfig
    checkpoint_every: int = 5
    held: dict[int, Job] = field(default_factory=dict)
    scheduler: Scheduler = field(init=False)
    is_ticking: bool = False
    is_gone: bool = False  # dead, or stopped
    is_stopping: bool = False
    has_suspect: bool = False
    began_s: float = 0.0
    busy_s: float = 0.0
    num_ticks: int = 0
    _tickets: int = 0
    _stages: tuple[dict[int, Job], dict[int, Job], dict[int, Job]] = field(init=False)
    _works: dict[int, Work] = field(default_factory=dict)  # of who denoises
    _stepping: list[int] = field(default_factory=list)
    _ended: Job | None = None

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self._stages = ({}, {}, {})  # encode, denoise, decode

    @property
    def has_work(self) -> bool:
        return any(self._stages)

    def join(self, job: Job) -> None:
        """From its checkpoint; its text is encoded anew."""
        self._tickets += 1
        job.ticket, job.arrived, job.items_done, job.steps_done = (
            self._tickets,
            self.scheduler.clock,
            0,
            job.checkpoint_step,
        )
        self._stages[0][job.ticket] = job

    def leave(self, job: Job) -> None:
        for stage in self._stages:
            stage.pop(job.ticket, None)
        self._works.pop(job.ticket, None)

    def begin_tick(self) -> float:
        """An item of encoding, an item of decoding and a step of as many as fit; how many seconds they take."""
        encoding, denoising, decoding = self._stages
        items_s = 0.0
        if encoding:
            job = encoding[self._first(encoding)]
            items_s += job.shape.encode_s[job.items_done]
            job.items_done += 1
            if job.items_done == len(job.shape.encode_s):
                del encoding[job.ticket]
                denoising[job.ticket] = job
                self._works[job.ticket] = job.seen()
        if decoding:
            job = decoding[self._first(decoding)]
            items_s += job.shape.decode_s[job.items_done]
            job.items_done += 1
            if job.items_done == len(job.shape.decode_s):
                del decoding[job.ticket]
                self._ended = job
        tokens, pairs = 0, 0.0
        if denoising:
            self._stepping = self.scheduler.pick(list(self._works.values()))
            for ticket in self._stepping:
                shape = denoising[ticket].shape
                tokens += shape.tokens
                pairs += shape.pairs
        self.is_ticking = True
        self.num_ticks += 1
        tick_s = items_s + self.cost.seconds(tokens, len(self._stepping), pairs)
        self.busy_s += tick_s
        return tick_s

    def end_tick(self) -> tuple[list[Job], Job | None]:
        """(who has taken a step, whose last frame has come out)."""
        _, denoising, decoding = self._stages
        chosen = [ticket for ticket in self._stepping if ticket in denoising]
        self.scheduler.served([self._works[ticket] for ticket in chosen])
        stepped = [denoising[ticket] for ticket in chosen]
        for job in stepped:
            job.steps_done += 1
            if job.steps_done == job.shape.num_steps:
                del denoising[job.ticket], self._works[job.ticket]
                job.items_done = 0
                decoding[job.ticket] = job
                continue
            self._works[job.ticket] = job.seen()
            if job.steps_done % self.checkpoint_every == 0:
                job.checkpoint_step, job.attempts = job.steps_done, 0
                if job.is_suspect:  # it has got further than its engine did
                    job.is_suspect = self.has_suspect = False
        if not self.has_work:
            self.scheduler.forget_idle_tenants(set())
        ended, self._ended, self._stepping, self.is_ticking = self._ended, None, [], False
        return stepped, ended

    def eta_s(self, job: Job) -> float:
        """Until its last step, at the pace of who is there; unknown before the first one."""
        if job.ticket not in self._works or job.steps_done == job.checkpoint_step == 0:
            return 0.0 if job.steps_done == job.shape.num_steps else math.inf
        return (job.shape.num_steps - job.steps_done) * sum(
            self.cost.seconds(one.shape.tokens, 1, one.shape.pairs) for one in self._stages[1].values()
        )

    def _first(self, there: dict[int, Job]) -> int:
        return self.scheduler.rank([job.seen() for job in there.values()])[0].ticket
