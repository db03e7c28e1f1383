"""From start to ready: how long an engine took and for what, how far downloads are, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .model_entry import EngineGroup
from .store.processes import ENGINE, FAILED, LOADING, READY, Process


@dataclass(frozen=True)
class StartTimes:
    """Seconds: weights and what goes with them, the warm-up, and all from the replica's start until it took work."""

    load_s: float
    warm_up_s: float
    ready_s: float

    @property
    def facts(self) -> dict[str, float]:
        """As an engine's sign of life carries them."""
        return {name: round(seconds, 3) for name, seconds in asdict(self).items()}


def in_words(facts: Mapping[str, Any]) -> str:
    """One line of what `facts` tells of a start."""
    parts = (f"{word} {facts[name]:.1f} s" for word, name in (("load", "load_s"), ("warm-up", "warm_up_s")))
    return f"engine ready in {facts['ready_s']:.1f} s: {', '.join(parts)}"


def find_failure(alive: Iterable[Process]) -> Exception | None:
    """What an engine that could not start has left as its reason: a mistake of the operator's, or a failure."""
    for process in alive:
        if process.kind == ENGINE and process.facts.get("state") == FAILED:
            reason = str(process.facts.get("error"))
            return ValueError(reason) if process.facts.get("is_mistake") else RuntimeError(reason)
    return None


def find_engines(groups: Iterable[EngineGroup], alive: Sequence[Process]) -> dict[str, Mapping[str, Any]] | None:
    """Of each group that has engines from the start, the facts of one that takes work; None while one is missing."""
    found: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        of_group = (
            process.facts
            for process in alive
            if process.kind == ENGINE
            and process.facts.get("state", READY) == READY
            and process.facts.get("model", group.name) == group.name
            and process.facts.get("canary", False) == group.is_canary
        )
        facts = next(of_group, None)
        if facts is not None:
            found[group.deployment] = facts
        elif group.min_engines:
            return None
    return found


def find_downloads(alive: Iterable[Process]) -> dict[str, tuple[int, int]]:
    """Model -> (bytes that are here, bytes of all) of those whose files are on their way."""
    loading = (p.facts for p in alive if p.kind == ENGINE and p.facts.get("state") == LOADING)
    return {facts["model"]: (facts["bytes"], facts["total_bytes"]) for facts in loading if "bytes" in facts}
