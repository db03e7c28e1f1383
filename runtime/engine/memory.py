"""Admission: whether a request fits beside the weights, and how much of the memory a tick may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..checkpoints.registry import EXPERTS
from ..core.config import Settings
from ..core.device import cache_bytes, memory_bytes
from ..core.events import RequestTooLarge
from ..memory.fit import Fit, Fitter, Needs, Size, nearest_of
from ..models.model import Model
from ..models.placement import chunks_of, peaks_of, tilings_of
from .holdings import needs_at

if TYPE_CHECKING:
    from .trajectory import Trajectory

Footprint = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class MemoryBudget:
    """What there is, and what of it a request needs.

    compiled: frames' width and height -> bytes that compiled coders hold, and that the work of one takes (`Decoders`).
    parallel: whether chunks are decoded beside steps, on a stream of their own.
    """

    fitter: Fitter
    parallel: bool = False
    compiled: Footprint = field(default=lambda width, height: (0, 0), compare=False)

    @property
    def available_bytes(self) -> int:
        """For requests, their work, and the parts of the model that move."""
        fitter = self.fitter
        taken = fitter.resident_bytes(fitter.moved or ()) + fitter.fixed_bytes + fitter.peaks.workspace
        return max(0, fitter.budget_bytes - taken)

    def fit(self, needs: Needs) -> Fit:
        """The cheapest way of running a request, with what compiled coders take."""
        held, work = self.compiled(needs.size.width, needs.size.height)
        return replace(self.fitter, fixed_bytes=self.fitter.fixed_bytes + held, coder_bytes=work).best(needs)

    def check(self, t: Trajectory) -> Fit:
        """How the request is run; RequestTooLarge if it cannot fit even with the engine to itself."""
        fit = self.fit(t.needs)
        if fit.fits:
            return fit

        def fits(size: Size) -> bool:
            return self.fit(needs_at(t, size)).fits

        raise RequestTooLarge(_refusal(fit, nearest_of(fits, fit.needs.size, t.model.limits)))

    def work_bytes(self, fits: Sequence[Fit]) -> int:
        """Of the most expensive piece of work among these requests, with the parts that are brought for it, and beside
        what the others keep from chunk to chunk.

        Where decoding goes on beside steps, of a step and a chunk together.
        """
        most = max((fit.most_bytes - fit.kept_bytes for fit in fits), default=0)
        if beside := self.beside(fits):
            step = max(fit.brought_bytes["step"] + fit.work_bytes["step"] for fit in fits)
            most = max(most, step + _most_decoding(beside))
        return most + sum(fit.kept_bytes for fit in fits) + self.coders_bytes(fits)

    def coders_bytes(self, fits: Sequence[Fit]) -> int:
        """What compiled coders hold for requests of these sizes."""
        return max((self.compiled(fit.needs.size.width, fit.needs.size.height)[0] for fit in fits), default=0)

    def beside(self, fits: Sequence[Fit]) -> list[Fit]:
        """The ones whose chunks are decoded while a step is under way."""
        return [fit for fit in fits if self.parallel and fit.overlaps]

    def pack_tokens(self, held_bytes: int, decoding: Sequence[Fit]) -> int:
        """Tokens of a pack whose step fits beside what is held, and beside a chunk of one of these if they overlap.

        held_bytes: with what is kept from chunk to chunk.
        """
        left = self.available_bytes - held_bytes - self.fitter.brought_bytes(self.fitter.moved or (), *EXPERTS)
        left -= _most_decoding(self.beside(decoding))
        return self.fitter.peaks.step.most(left)


def load_budget(model: Model, settings: Settings, compiled: Footprint = lambda width, height: (0, 0)) -> MemoryBudget:
    """The budget of this process; peaks are predicted or measured if no earlier start has stored them."""
    codec = model.codec
    fitter = Fitter(
        peaks=peaks_of(model, settings),
        parts=model.part_bytes,
        budget_bytes=memory_bytes(model.device, settings),
        factor=codec.spatial_factor,
        fixed_bytes=cache_bytes(model.device, settings),
        moved=model.residency.moved,
        chunks=chunks_of(settings),
        tilings=tilings_of(settings),
    )
    return MemoryBudget(fitter, codec.lane is not None, compiled)


def _most_decoding(fits: Sequence[Fit]) -> int:
    """Of one chunk, beside what is kept between two."""
    return max((fit.brought_bytes["decode"] + fit.work_bytes["decode"] - fit.kept_bytes for fit in fits), default=0)


def _refusal(fit: Fit, nearest: Sequence[Size]) -> str:
    size, stage = fit.needs.size, fit.blocked_by
    assert stage is not None
    asked = f"num_frames x height x width = {size.num_frames} x {size.height} x {size.width}"
    there = fit.always_bytes + fit.brought_bytes[stage]
    free = max(0, fit.budget_bytes - there)
    work = _gib(fit.work_bytes[stage])
    told = f"{asked} ({fit.needs.num_tokens} tokens a branch) does not fit: its {stage} takes {work}"
    fitting = " or ".join(map(str, nearest)) or "no size of this model"
    return (
        f"{told}, and {_gib(free)} are free beside {_gib(there)} of weights and what the request holds; {fitting} fits"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
