"""One request's step cache: which of its steps are computed, and what the others take instead."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .policy import Adaptive, CachePolicy, Run, State, warmup_steps
from .spec import Choice, policy_spec

logger = logging.getLogger(__name__)
CLOSE = 1e-4  # decisions nearer to the threshold than this may fall either way in a pack of other neighbours


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What caching did to a video.

    requested: what the request said; policy: what that came to, every parameter in it; reason: why no policy was taken
    although one was asked for. trace: a character a step, 1 where the model ran. close_calls: steps whose indicator
    lay within 1e-4 of the threshold.
    """

    requested: str
    policy: str
    reason: str | None
    num_evaluations: int
    trace: str
    close_calls: tuple[int, ...]
    peak_state_bytes: int

    @property
    def num_skipped(self) -> int:
        return len(self.trace) - self.num_evaluations


class StepCache:
    """Decides each step once; a step may be tried again (out of memory) until `computed` or `skipped` ends it."""

    def __init__(self, choice: Choice, run: Run) -> None:
        """ValueError where the policy needs a calibration that is not there."""
        self.choice = choice
        self.policy: CachePolicy = choice.policy
        self.run = run
        self.mask = self.policy.plan(run)
        self.state: State = None
        self.trace = ""
        self.close_calls: tuple[int, ...] = ()
        self.peak_state_bytes = 0
        self._skips = 0
        self._accumulated = 0.0
        self._decided: bool | None = None
        self._latents: Tensor | None = None  # of the step before, where the policy looks at latents

    @property
    def step(self) -> int:
        return len(self.trace)

    @property
    def num_evaluations_planned(self) -> int:
        """How often the model will run; an upper bound where that is decided on the way."""
        return sum(self.mask) if self.mask is not None else self.run.num_steps

    def must_compute(self) -> bool | None:
        """Whether this step is computed; None where the policy's indicator has to be asked."""
        if self._decided is not None:
            return self._decided
        if self.step in self.run.restarts:
            self.forget()
        if self.state is None:
            return True
        if self.mask is not None:
            return self.mask[self.step]
        policy = self._adaptive
        is_early = self.step < warmup_steps(policy.warmup, self.run.num_steps)
        if is_early or self.step == self.run.last or self._skips >= policy.max_skips or not policy.is_ready(self.state):
            return True
        return None

    def indicator(self, now: Sequence[Tensor]) -> Tensor:
        """The policy's scalar on the device: of the latents, or of the branches' probes."""
        before = () if self._latents is None else (self._latents,)
        return self._adaptive.indicator(self.state, now, before)

    def decide(self, value: float) -> bool:
        """Whether this step is computed, given its indicator as read from the device."""
        policy = self._adaptive
        distance = abs(self._accumulated * (policy.needs == "latents") + value - policy.threshold)
        if distance < CLOSE:
            self.close_calls += (self.step,)
            logger.info("step %d: indicator within %.0e of the threshold %g", self.step, CLOSE, policy.threshold)
        self._decided, self._accumulated = policy.decide(self._accumulated, value)
        return self._decided

    def predict(self, sigma: float, base: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.policy.predict(self.state, sigma, base)

    def commit(
        self, sigma: float, base: Sequence[Tensor], output: Sequence[Tensor], probes: Sequence[Tensor] = ()
    ) -> State:
        """The state after computing this step; `computed` takes it over."""
        return self.policy.commit(self.state, sigma, base, output, probes)

    def computed(self, state: State, latents: Tensor) -> None:
        """This step was computed; latents: what it started from."""
        self.state = state
        self.peak_state_bytes = max(self.peak_state_bytes, self.num_bytes)
        self._skips, self._accumulated = 0, 0.0
        self._end("1", latents)

    def skipped(self, latents: Tensor) -> None:
        self._skips += 1
        self._end("0", latents)

    def forget(self) -> None:
        """Drop everything cached; the next step will be computed."""
        self.state, self._latents, self._skips, self._accumulated, self._decided = None, None, 0, 0.0, None

    @property
    def num_bytes(self) -> int:
        held = [] if self.state is None else self.policy.state_tensors(self.state)
        return sum(tensor.nbytes for tensor in held) + (0 if self._latents is None else self._latents.nbytes)

    def report(self) -> CacheReport:
        return CacheReport(
            requested=self.choice.requested,
            policy=policy_spec(self.policy),
            reason=self.choice.reason,
            num_evaluations=self.trace.count("1"),
            trace=self.trace,
            close_calls=self.close_calls,
            peak_state_bytes=self.peak_state_bytes,
        )

    @property
    def _adaptive(self) -> Adaptive:
        assert self.policy.needs != "nothing"
        return self.policy  # type: ignore[return-value]

    def _end(self, mark: str, latents: Tensor) -> None:
        self.trace += mark
        self._decided = None
        self._latents = latents if self.policy.needs == "latents" else None
