"""Cache policies by name: "easy", "easy:0.1", "easy:threshold=0.1,max_skips=3", and the presets of a model.

Source of the syntax: none; it is meant to fit an HTTP field and a command line.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .budget import Budget
from .easy import EasyCache
from .first_block import FirstBlockCache
from .magcache import MagCache
from .none import NoCache
from .policy import CachePolicy
from .taylorseer import TaylorSeer
from .teacache import TeaCache

logger = logging.getLogger(__name__)
POLICIES: dict[str, type[CachePolicy]] = {
    policy.name: policy for policy in (NoCache, EasyCache, FirstBlockCache, TeaCache, MagCache, TaylorSeer, Budget)
}
PRESETS = ("high", "balanced", "fast")
# What a Wan checkpoint gets that says nothing of its own (skylapse.json, "cache"): EasyCache's published thresholds
# for Wan, .05 its default, .1 about 2x, .2 about 3x.
WAN_PRESETS = {"high": "easy:0.05", "balanced": "easy:0.1", "fast": "easy:0.2"}
FEWEST_STEPS = 9  # with fewer, every step matters and a preset means no caching


@dataclass(frozen=True)
class Choice:
    """What a request's `cache` came to. reason: why, where it is not what was asked for by name."""

    requested: str
    policy: CachePolicy
    reason: str | None = None


def parse_policy(text: str) -> CachePolicy:
    """A policy from its name and parameters; ValueError names what is wrong."""
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"cache must be {', '.join((*PRESETS, *POLICIES))}, got {text[:80]!r}")
    policy = POLICIES[name]
    fields = {f.name: f for f in dataclasses.fields(policy)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for position, part in enumerate(filter(None, rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals and position == 0 and fields:
            key, value = next(iter(fields)), key
        if key not in fields:
            raise ValueError(
                f"cache policy {name} has no parameter {key[:40]!r} (it has: {', '.join(fields) or 'none'})"
            )
        if key in given:
            raise ValueError(f"{key} of cache policy {name} is given twice")
        given[key] = _number(f"{key} of cache policy {name}", value, whole=fields[key].type == "int")
    return policy(**given)


def policy_spec(policy: CachePolicy) -> str:
    """The text that `parse_policy` reads as this policy, every parameter in it."""
    given = dataclasses.asdict(policy)  # type: ignore[call-overload]
    return policy.name + (":" + ",".join(f"{name}={value:g}" for name, value in given.items()) if given else "")


def check_cache(text: str) -> None:
    """ValueError unless `text` is a preset or a policy."""
    if text not in PRESETS:
        parse_policy(text)


def choose(text: str, num_steps: int, presets: Mapping[str, str], distilled: bool) -> Choice:
    """The policy of a request. A preset means none where it would do harm; a policy by name is taken, and logged."""
    reason = None
    if distilled:
        reason = "this checkpoint is distilled: every step matters"
    elif num_steps < FEWEST_STEPS:
        reason = f"{num_steps} steps are too few to skip any (fewest: {FEWEST_STEPS})"
    if text in PRESETS:
        return Choice(text, NoCache(), reason) if reason else Choice(text, parse_policy(presets[text]))
    policy = parse_policy(text)
    if reason and not isinstance(policy, NoCache):
        logger.warning("cache %s was asked for by name and is used, although %s", text, reason)
    return Choice(text, policy)


def _number(name: str, text: str, whole: bool) -> int | float:
    try:
        return int(text) if whole or text.isdecimal() else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind}, got {text[:40]!r}") from None
