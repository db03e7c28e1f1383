"""One denoising step of many requests: who needs no model goes on alone, the others share a pack.

Shape letters: N tokens of a pack's sequences behind each other; latents and velocities are [C, T, H, W] a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..cache.first_block import FirstBlockCache
from ..cache.policy import State
from ..checkpoints.registry import EXPERTS
from ..core.threads import CpuThreads
from ..layers.pack import each_alone
from ..models.model import Model
from ..vae.preview import AnyPreviewer
from .pack_cache import Layouts, Place
from .trajectory import Trajectory

Tokens = dict[Place, Tensor]  # each sequence's [n, dim]


@dataclass(frozen=True)
class Outcome:
    """What a request's step came to; nothing of the request is changed before `take`, so a pack can be tried again."""

    velocities: tuple[Tensor, ...]  # [C, T, H, W] of each branch, or the guided one alone
    computed: bool
    state: State  # of its cache, after this step


@dataclass(frozen=True)
class Taken:
    """A step that a request has taken."""

    trajectory: Trajectory
    step: int  # how many it has taken with it
    total: Tensor  # sum of the latents after it: finite exactly if they are (fp32 is nowhere near overflow)


def skip_ahead(trajectories: Sequence[Trajectory]) -> tuple[list[Taken], dict[int, Exception]]:
    """Take the steps that need no model, as many in a row as the caches allow.

    Returns the steps, and the errors of those that failed, by ticket. Each round reads the indicators of all
    who need one from the device at once; static masks need no read.
    """
    stepped: list[Taken] = []
    failed: dict[int, Exception] = {}
    candidates = [t for t in trajectories if t.cache.policy.site == "velocity"]
    while candidates:
        _ask([t for t in candidates if t.cache.must_compute() is None], {})
        candidates = [t for t in candidates if not t.cache.must_compute()]
        for t in candidates:
            try:
                velocities = t.cache.predict(t.plan.sigma, (t.current,))
                stepped.append(take(t, Outcome(velocities, False, None)))
            except Exception as error:  # who fails, fails alone
                failed[t.ticket] = error
        candidates = [t for t in candidates if t.ticket not in failed and t.stage == "denoise" and not t.is_due]
    return stepped, failed


def pack_tokens(members: Sequence[Trajectory]) -> int:
    """Return the tokens of the next step of these requests, all branches."""
    return sum(t.num_tokens * t.plan.num_branches for t in members)


def measured_step(
    threads: CpuThreads | None, members: Sequence[Trajectory], is_first: bool
) -> AbstractContextManager[None]:
    """Return a context in which the next step of these requests runs with the best number of CPU threads."""
    return nullcontext() if threads is None else threads.step(pack_tokens(members), is_first)


def evaluate(model: Model, members: Sequence[Trajectory], layouts: Layouts, apart: bool = False) -> list[Outcome]:
    """The next step of requests that share an expert.

    All are embedded; whose mask says so leaves before the first block, whose probe says so behind its first blocks;
    the others go through all of them. The head is run for everyone. apart: sequences go through the blocks one after
    the other, with the activations of one at a time.
    """
    model.residency.require(EXPERTS[members[0].plan.expert])
    denoiser = model.experts[members[0].plan.expert]
    timesteps, modulations = number_timesteps(members)
    whole = layouts.get(members, modulations)
    inputs = {t.ticket: t.model_input() for t in members}
    embedding, modulation = layouts.time_embeddings.get(members[0].plan.expert, timesteps)
    held = [denoiser.embed([inputs[ticket] for ticket, _ in whole.order])]  # given away while the blocks work on them
    trunk = partial(each_alone, denoiser.trunk) if apart else denoiser.trunk
    keeps = any(t.cache.policy.site == "trunk" for t in members)  # otherwise nobody needs tokens again
    entry: Tokens = whole.split(held[0]) if keeps else {}
    bases, probes = dict(entry), cast(Tokens, {})  # bases: the tokens at which a skipped step leaves the blocks
    exits: Tokens = {}
    layout, running, done = whole, list(members), 0
    for depth in _depths(members, denoiser.config.num_layers):
        held.append(trunk(held.pop(), modulation, layout.pack, slice(done, depth)))
        if not keeps:
            break
        here, done = layout.split(held[0]), depth
        probing = [t for t in running if depth and _probe_depth(t) == depth]
        for place in (place for t in probing for place in t.places):
            bases[place], probes[place] = here[place], here[place] - entry[place]
        _ask([t for t in probing if t.cache.must_compute() is None], probes)
        leaving = {t.ticket for t in running if _probe_depth(t) == depth and t.cache.must_compute() is False}
        if leaving:
            for t in (t for t in running if t.ticket in leaving):
                predicted = t.cache.predict(t.plan.sigma, [bases[place] for place in t.places])
                exits.update(zip(t.places, predicted, strict=True))
            running = [t for t in running if t.ticket not in leaving]
            if not running:
                break
            layout = layouts.get(running, [m for t, m in zip(members, modulations, strict=True) if t in running])
            held = [torch.cat([here[place] for place in layout.order])]
    if keeps and running:
        exits.update(layout.split(held[0]))
    if layout is not whole or not running:
        held = [torch.cat([exits[place] for place in whole.order])]
    velocities = dict(zip(whole.order, denoiser.head(held.pop(), embedding, whole.pack), strict=True))
    return [_outcome(t, velocities, bases, exits, probes) for t in members]


def take(trajectory: Trajectory, outcome: Outcome, previewer: AnyPreviewer | None = None) -> Taken:
    """The request's own part of a step: its solver, and its cache. previewer: see `Trajectory.advance`."""
    latents, num_branches = trajectory.current, trajectory.plan.num_branches
    trajectory.advance(outcome.velocities, previewer)
    trajectory.account.stepped(num_branches if outcome.computed else 0)
    if outcome.computed:
        trajectory.cache.computed(outcome.state, latents)
    else:
        trajectory.cache.skipped(latents)
    return Taken(trajectory, trajectory.steps_done, trajectory.current.sum())


def number_timesteps(members: Sequence[Trajectory]) -> tuple[list[float], list[tuple[int, int]]]:
    """A pack's distinct timesteps, and for each member where in them its own lies and that of clean frames (0)."""
    numbers: dict[float, int] = {}
    modulations = []
    for t in members:
        own = numbers.setdefault(t.plan.timestep, len(numbers))
        clean = numbers.setdefault(0.0, len(numbers)) if any(t.frame_is_given) else own
        modulations.append((own, clean))
    return list(numbers), modulations


def _outcome(t: Trajectory, velocities: Tokens, bases: Tokens, exits: Tokens, probes: Tokens) -> Outcome:
    branches = tuple(velocities[place] for place in t.places)
    if t.cache.must_compute() is False:
        return Outcome(branches, False, None)
    sigma, policy = t.plan.sigma, t.cache.policy
    if policy.site == "velocity":
        kept = branches if policy.name == "none" else (t.guide(branches),)
        return Outcome(kept, True, t.cache.commit(sigma, (t.current,), kept))
    base, output, probe = ([part[place] for place in t.places if place in part] for part in (bases, exits, probes))
    return Outcome(branches, True, t.cache.commit(sigma, base, output, probe))


def _ask(asking: list[Trajectory], probes: Tokens) -> None:
    """Let caches decide by their indicators, all of them read from the device at once."""
    if not asking:
        return
    seen = [[probes[place] for place in t.places] if probes else [t.current] for t in asking]
    indicators = [t.cache.indicator(now) for t, now in zip(asking, seen, strict=True)]
    for t, value in zip(asking, torch.stack(indicators).tolist(), strict=True):
        t.cache.decide(value)


def _depths(members: Sequence[Trajectory], num_layers: int) -> list[int]:
    """Behind how many blocks someone may leave: 0 by a mask, a probe's depth, and all of them."""
    depths = {_probe_depth(t) for t in members if _probe_depth(t)}
    if any(t.cache.must_compute() is False and not _probe_depth(t) for t in members):
        depths.add(0)
    return sorted(depths | {num_layers})


def _probe_depth(trajectory: Trajectory) -> int:
    policy = trajectory.cache.policy
    return cast(FirstBlockCache, policy).depth if policy.needs == "probe" else 0
