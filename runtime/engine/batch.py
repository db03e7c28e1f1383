"""The continuous batch: requests join before any step and leave after any; one tick advances all that fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ..checkpoints.registry import EXPERTS
from ..core.device import reset_peak
from ..core.events import (
    Checkpointed,
    DeadlineExceeded,
    Event,
    Failed,
    Finished,
    NotFinite,
    OutOfMemory,
    Preview,
    Ticket,
    is_device_lost,
    is_out_of_memory,
)
from ..core.threads import CpuThreads
from ..memory.fit import Fit
from ..models.model import Model
from ..vae.preview import AnyPreviewer
from .denoise import Outcome, Taken, evaluate, measured_step, pack_tokens, skip_ahead, take
from .memory import MemoryBudget
from .meter import Meter
from .nan_watch import FiniteWatch
from .pack_cache import Layouts
from .request_checkpoint import save_trajectory
from .scheduler import Scheduler, Work
from .trajectory import Trajectory

logger = logging.getLogger(__name__)
PREFETCH_STEPS = 3  # a copy takes 0.6 s (28.6 GB at 50 GB/s), less than a step of most sizes


class Batch:
    """Who is in, and what the next tick does for them; called from one thread at a time."""

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        memory: Callable[[], MemoryBudget],
        previewer: Callable[[], AnyPreviewer],
        threads: CpuThreads | None = None,
    ) -> None:
        self.model, self.scheduler, self.threads = model, scheduler, threads
        self.memory, self.previewer = memory, previewer
        self.waiting: dict[Ticket, Trajectory] = {}  # hold no memory yet
        self.active: dict[Ticket, Trajectory] = {}
        self.layouts = Layouts(model)
        self.meter = Meter(model.device)
        self.num_packs = self.num_pack_tokens = 0  # evaluated since the start, all branches
        self._finite = FiniteWatch(model.device)
        self._told: list[Event] = []  # of the tick that is running

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    def join(self, trajectory: Trajectory) -> None:
        if not len(self):
            reset_peak(self.model.device)  # what a video reports as its peak is of the time since nobody was there
        trajectory.arrived = self.scheduler.clock
        self.waiting[trajectory.ticket] = trajectory

    def leave(self, ticket: Ticket) -> None:
        """Forget a request and free what it holds; an unknown ticket is no error."""
        for there in (self.waiting, self.active):
            if (t := there.pop(ticket, None)) is not None:
                t.account.leave()
        self.layouts.forget(ticket)

    def tick(self) -> list[Event]:
        """A chunk of encoding, a chunk of decoding, and a step of as many requests as fit; whose caches carry them
        further without the model take several."""
        self.meter.begin()
        for event in self._stages():
            self._told.append(event)
        self.scheduler.forget_idle_tenants({t.terms.tenant for t in (*self.active.values(), *self.waiting.values())})
        return self._tell()

    def fail_all(self, error: Exception) -> list[Event]:
        """After an error that is nobody's own, a bug of ours: everyone who was under way fails, who waits goes on.

        With nobody under way it is they who fail, or the next tick would break as this one did, and the next, for ever.
        What the broken tick had done before is told too: who has finished in it is gone, and would be waited for.
        """
        return self._tell() + [self._fail(t, _typed(error)) for t in list((self.active or self.waiting).values())]

    def _tell(self) -> list[Event]:
        told, self._told = self._told, []
        return told

    def _stages(self) -> Iterator[Event]:
        """A tick's events as they come about."""
        yield from self._expire()
        self._activate()
        for stage in ("encode", "decode"):
            yield from self._work(stage)
        yield from self._denoise()

    # --- who is in ------------------------------------------------------------------------------------------------

    def _expire(self) -> list[Event]:
        now_s = time.monotonic()
        late = [t for t in (*self.waiting.values(), *self.active.values()) if t.is_late(now_s)]
        return [self._fail(t, DeadlineExceeded(f"not finished within {t.terms.deadline_s:g} s")) for t in late]

    def _activate(self) -> None:
        """Let the most deserving in while memory lasts; nobody overtakes the one that has to wait for it."""
        if not self.waiting:
            return
        memory = self.memory()
        held = sum(t.resident_bytes for t in self.active.values())
        fits = [self._fit(t) for t in self.active.values()]
        for work in self.scheduler.rank([_work(t) for t in self.waiting.values()]):
            t = self.waiting[work.ticket]
            fits.append(self._fit(t))
            held += t.resident_bytes
            if self.active and held + memory.work_bytes(fits) > memory.available_bytes:
                break
            self.active[t.ticket] = self.waiting.pop(t.ticket)

    def _fail_or_raise(self, t: Trajectory, error: Exception) -> Event:
        """What went wrong for one request is its own failure, unless the device is lost for all."""
        if is_device_lost(error):
            raise error
        return self._fail(t, _typed(error))

    def _fail(self, t: Trajectory, error: Exception) -> Event:
        self.leave(t.ticket)
        return Failed(t.ticket, error)

    # --- encoding and decoding ------------------------------------------------------------------------------------

    def _work(self, stage: str) -> list[Event]:
        """One bounded item of the most deserving request that is at this stage."""
        there = [t for t in self.active.values() if t.stage == stage]
        if not there:
            return []
        t = self.active[self.scheduler.rank([_work(t) for t in there])[0].ticket]
        fit = self._fit(t)
        part = "text" if t.branch_encoder.needs_text else stage
        self._reserve(fit.work_bytes[part] - (0 if part == "text" else fit.kept_bytes))  # these are among what is held
        try:
            t.work()
        except Exception as error:  # a request that fails, fails alone; the caller is told by event
            return [self._fail_or_raise(t, error)]
        finally:
            self._charge([t])
        if t.video is None:
            return []
        self.meter.read(wait=True)  # its frames are on the host, so the device has come so far
        self.leave(t.ticket)
        return [Finished(t.ticket, replace(t.video, metadata=replace(t.video.metadata, usage=t.account.usage)))]

    # --- denoising ------------------------------------------------------------------------------------------------

    def _denoise(self) -> Iterator[Event]:
        ready = [t for t in self.active.values() if t.stage == "denoise"]
        stepped, failed = skip_ahead(ready)
        self._charge([taken.trajectory for taken in stepped])
        for ticket, error in failed.items():
            yield self._fail_or_raise(self.active[ticket], error)
        # who is due has a preview or a checkpoint of the step just taken to come first
        paused = {taken.trajectory.ticket for taken in stepped if taken.trajectory.is_due}
        ready = [t for t in ready if t.stage == "denoise" and t.ticket not in {*paused, *failed}]
        if ready:
            works = {t.ticket: _work(t) for t in ready}
            chosen = self.scheduler.pick(list(works.values()), self._room())
            members = [self.active[ticket] for ticket in chosen]
            chunks = [fit.work_bytes["decode"] - fit.kept_bytes for fit in self.memory().beside(self._decoding)]
            self._reserve(self._step_bytes(members) + max(chunks, default=0))
            for t, outcome in self._evaluate(members):
                if isinstance(outcome, Exception):
                    yield self._fail(t, outcome)
                    continue
                try:
                    stepped.append(take(t, outcome, self.previewer() if t.previews_next else None))
                except Exception as error:
                    yield self._fail_or_raise(t, error)
            self.scheduler.served([works[ticket] for ticket in chosen])
            self._prefetch(members)
            self._charge(members)
        yield from self._report([taken for taken in stepped if taken.trajectory.ticket in self.active])

    def _charge(self, trajectories: Sequence[Trajectory]) -> None:
        """Their own work since the last charge (solvers, caches, frames), by tokens."""
        self.meter.charge([(t.account, t.num_tokens) for t in trajectories])

    def _charge_step(self, members: Sequence[Trajectory], outcomes: Sequence[Outcome]) -> None:
        """A step that was shared: by tokens times evaluations."""
        pairs = zip(members, outcomes, strict=True)
        weights = [(t.account, t.num_tokens * t.plan.num_branches * outcome.computed) for t, outcome in pairs]
        self.meter.charge(weights, is_step=True)

    def _evaluate(self, members: Sequence[Trajectory]) -> list[tuple[Trajectory, Outcome | Exception]]:
        """Outcomes of a pack; one that fails is split and tried again, until who is to blame fails alone.

        Whose memory does not suffice for its guidance branches together has one after the other from then on.
        """
        alone, fit = len(members) == 1, self._fit(members[0])
        apart = alone and fit.way.guidance == "apart"
        try:
            with measured_step(self.threads, members, is_first=not any(t.steps_done for t in self.active.values())):
                outcomes = evaluate(self.model, members, self.layouts, apart)
        except Exception as error:
            if is_device_lost(error):
                raise
            self._charge(members)
            failure = _typed(error)
        else:
            self._charge_step(members, outcomes)
            self.num_packs += 1
            self.num_pack_tokens += pack_tokens(members)
            return list(zip(members, outcomes, strict=True))
        splits = alone and not apart and isinstance(failure, OutOfMemory) and members[0].plan.num_branches > 1
        if alone and not splits:
            return [(members[0], failure)]
        what = "a request's guidance branches" if alone else f"a pack of {len(members)} requests"
        logger.warning("%s failed (%s) and is split", what, failure)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if alone:
            members[0].fit = replace(fit, way=replace(fit.way, guidance="apart"))
            return self._evaluate(members)
        half = len(members) // 2
        return self._evaluate(members[:half]) + self._evaluate(members[half:])

    # --- memory ---------------------------------------------------------------------------------------------------

    @property
    def _held_bytes(self) -> int:
        """Between two pieces of work: by requests, and by what codes their frames."""
        kept = sum(self._fit(t).kept_bytes for t in self.active.values() if t.stage != "denoise")
        coders = self.memory().coders_bytes([self._fit(t) for t in self.active.values()])
        return sum(t.resident_bytes for t in self.active.values()) + kept + coders

    @property
    def _decoding(self) -> list[Fit]:
        return [self._fit(t) for t in self.active.values() if t.stage == "decode"]

    def _fit(self, t: Trajectory) -> Fit:
        """How a request is run: as it was admitted, or as it would be now where nobody has asked."""
        if t.fit is None:
            t.fit = self.memory().fit(t.needs)
        return t.fit

    def _room(self) -> int:
        """Tokens that a pack may have, by configuration and by the memory that is left."""
        tokens = self.memory().pack_tokens(self._held_bytes, self._decoding)
        return max(1, min(self.scheduler.config.max_batch_tokens, tokens))

    def _step_bytes(self, members: Sequence[Trajectory]) -> int:
        """Of the step that these take together."""
        if len(members) == 1:
            return self._fit(members[0]).work_bytes["step"]
        return self.memory().fitter.peaks.step.at(pack_tokens(members))

    def _reserve(self, num_bytes: int) -> None:
        """Let parts of the model take no more than what requests and the next piece of work leave."""
        residency = self.model.residency
        if residency.moved:
            residency.budget_bytes = self.memory().available_bytes
            residency.reserve(self._held_bytes + num_bytes)

    def _prefetch(self, members: Sequence[Trajectory]) -> None:
        """Begin to bring the expert that one of these needs within a few steps, where there is room for both."""
        for t in members:
            coming = t.plans[t.steps_done : t.steps_done + PREFETCH_STEPS]
            for expert in {plan.expert for plan in coming} - {t.next_plan.expert}:
                self.model.residency.prefetch(EXPERTS[expert])

    def _report(self, stepped: Sequence[Taken]) -> Iterator[Event]:
        """Progress, previews and checkpoints of the steps taken, and failure of whose latents are not finite."""
        for taken in stepped:
            yield taken.trajectory.progress(taken.step)
        last = list({taken.trajectory.ticket: taken.trajectory for taken in stepped}.values())
        self._finite.watch(stepped)
        for ticket, step in self._finite.poll(wait=any(t.stage == "decode" for t in last)):
            if ticket in self.active:
                yield self._fail(self.active[ticket], NotFinite(f"latents are not finite after step {step}"))
        for t in (t for t in last if t.ticket in self.active):
            try:
                yield from self._deliver(t)
            except Exception as error:  # a full disk, a preview without memory: nobody else's
                yield self._fail_or_raise(t, error)
            if t.is_due:
                self._charge([t])

    def _deliver(self, t: Trajectory) -> Iterator[Event]:
        """The preview and the checkpoint that are due after the step just taken."""
        step, terms = t.steps_done, t.terms
        if t.pixels is not None:
            yield Preview(t.ticket, step, t.pixels.cpu().numpy())
        elif t.clean is not None:
            yield Preview(t.ticket, step, self.previewer()(t.clean))
        t.clean = t.pixels = None
        if terms.checkpoint_every and step % terms.checkpoint_every == 0 and step < t.num_steps:
            assert terms.checkpoint_dir is not None
            save_trajectory(t, terms.checkpoint_dir)
            self.meter.read()  # the latents are on the host, so the device has come so far
            yield Checkpointed(t.ticket, step, terms.checkpoint_dir, t.account.usage)


def _work(t: Trajectory) -> Work:
    """What the scheduler may know of a request."""
    runs_model = t.stage != "denoise" or t.cache.must_compute() is not False
    return Work(
        ticket=t.ticket,
        tokens=t.num_tokens * t.next_plan.num_branches if runs_model else 1,
        total_tokens=t.total_tokens,
        remaining_tokens=t.total_tokens * (t.num_steps - t.steps_done) // t.num_steps,
        arrived=t.arrived,
        weights=f"expert {t.next_plan.expert}",
        priority=t.terms.priority,
        tenant=t.terms.tenant,
    )


def _typed(error: Exception) -> Exception:
    """The error without what its traceback holds in memory, and with a name where it is out of memory."""
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory: {str(error).splitlines()[0]}")
    return error.with_traceback(None)
