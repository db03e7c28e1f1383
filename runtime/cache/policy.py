"""What a cache policy is, and the trajectory that it decides about.

A policy is a frozen, hashable set of parameters without state; what one request's cache remembers is the policy's
`State`, an immutable value that a step replaces. Torch is only named here, so a policy can be parsed and refused
before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .calibration import Calibration

Site = Literal["velocity", "trunk"]
Needs = Literal["nothing", "latents", "probe"]
State = Any  # each policy's own; None before the first computed step
MAX_SKIPS = 4  # how many steps may be skipped behind each other; the published rules know no bound


@dataclass(frozen=True)
class Run:
    """What is known of a trajectory before its first step.

    sigmas: num_steps + 1 noise levels. restarts: steps at which nothing cached may be used, so they are computed: the
    first, a change of expert or of guidance, and the step after each checkpoint.
    """

    sigmas: tuple[float, ...]
    num_blocks: int
    guidance_scale: float = 0.0
    restarts: frozenset[int] = frozenset({0})
    calibration: Calibration | None = None  # of exactly this model, solver, step count and shift
    embedding_distances: tuple[float, ...] = ()  # relative L1, of each step's timestep embedding to the one before
    coefficients: tuple[float, ...] = ()  # TeaCache's, from the model's card
    missing: str = "a calibration"  # what to tell a policy's user when there is none

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def last(self) -> int:
        return self.num_steps - 1


class CachePolicy(Protocol):
    """A policy decides by a mask known from the start (`plan`), by the latents, or by the first blocks' output.

    site: where a prediction is put in: "velocity", the guided velocity of a request, a hit of which needs no model; or
        "trunk", the tokens behind the last block, of each guidance branch, a hit of which embeds and unpatchifies.
    needs: what the decision costs: nothing (a mask), the latents, or a probe of the first `probe_depth` blocks.
    """

    name: ClassVar[str]
    site: ClassVar[Site]
    needs: ClassVar[Needs]

    def plan(self, run: Run) -> tuple[bool, ...] | None:
        """Which steps are computed, where that is known from the start. ValueError if a calibration is missing."""
        ...

    def predict(self, state: State, sigma: float, base: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a skipped step takes instead of the model's output.

        base: the latents [C, T, H, W] (site velocity), or each branch's tokens [n, dim] at the point where the blocks
        are left out (site trunk).
        """
        ...

    def commit(
        self, state: State, sigma: float, base: Sequence[Tensor], output: Sequence[Tensor], probes: Sequence[Tensor]
    ) -> State:
        """The state after a computed step; base as in `predict`, output what the model made of it."""
        ...

    def state_tensors(self, state: State) -> list[Tensor]:
        """Everything that the state holds, to be counted in bytes."""
        ...

    @property
    def footprint(self) -> tuple[int, int]:
        """How many tensors it holds at most: of a request's latents, and of a branch's tokens."""
        ...


class Adaptive(CachePolicy, Protocol):
    """A policy that measures, step by step, how far the trajectory has moved since it was computed."""

    warmup: int | float
    max_skips: int
    threshold: float

    def is_ready(self, state: State) -> bool:
        """Whether enough steps were computed to measure by."""
        ...

    def indicator(self, state: State, now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
        """A fp32 scalar on the device, never read here.

        now: the latents, or the branches' probes; before: the latents of the step before (needs latents).
        """
        ...

    def decide(self, accumulated: float, value: float) -> tuple[bool, float]:
        """(whether to compute, what is accumulated after this step)."""
        ...


@dataclass(frozen=True)
class Point:
    """What was computed at a noise level: one tensor a request (velocity) or one a branch (trunk)."""

    sigma: float
    values: tuple[Tensor, ...]


def extrapolate(points: Sequence[Point], sigma: float, order: int) -> tuple[Tensor, ...]:
    """The polynomial in sigma through the newest order + 1 points (newest first), at `sigma`.

    Lagrange's form on the levels as they are: exact for polynomials up to `order` on any schedule, where forecasts
    that count steps (TaylorSeer as published) are exact on uniform ones alone. Fewer points lower the order.
    """
    used = points[: order + 1]
    if len(used) == 1:
        return used[0].values
    weights = []
    for j, point in enumerate(used):
        weight = 1.0
        for m, other in enumerate(used):
            if m != j:
                weight *= (sigma - other.sigma) / (point.sigma - other.sigma)
        weights.append(weight)
    totals = []
    for branch in range(len(used[0].values)):
        total = used[0].values[branch] * weights[0]
        for point, weight in zip(used[1:], weights[1:], strict=True):
            total = total.add(point.values[branch], alpha=weight)
        totals.append(total)
    return tuple(totals)


def relative_l1(now: Tensor, before: Tensor) -> Tensor:
    """mean|now - before| / mean|before| in fp32, a scalar on the device."""
    return (now - before).abs().float().mean() / before.abs().float().mean()


def warmup_steps(warmup: int | float, num_steps: int) -> int:
    """A number of steps, or below 1 a share of them."""
    return warmup if isinstance(warmup, int) else round(warmup * num_steps)


class Checked:
    """Parameters of a policy, a frozen dataclass, each within its range; ValueError names the one that is not."""

    name: ClassVar[str]
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "threshold": (0, 10),
        "max_skips": (1, 100),
        "warmup": (0, 1000),
        "interval": (1, 100),
        "order": (0, 3),
        "share": (0.05, 1),
    }

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low, high = self.ranges[name]
            if not low <= value <= high:
                raise ValueError(f"{name} of cache policy {self.name} must be from {low:g} to {high:g}, got {value:g}")
            if name == "warmup" and isinstance(value, float) and value >= 1:
                raise ValueError(f"warmup of cache policy {self.name} must be whole, or a share below 1, got {value}")
