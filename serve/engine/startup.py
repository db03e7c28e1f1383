"""An engine's start: the seconds it took and for what, the progress of downloads, and failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.model_entry import EngineGroup
from ..store.processes import ENGINE, FAILED, LOADING, READY, Process


@dataclass(frozen=True)
class StartTimes:
    """Seconds: to load weights and their like, to warm up, and in all from the replica's start until it took work."""

    load_s: float
    warm_up_s: float
    ready_s: float

    @property
    def facts(self) -> dict[str, float]:
        """The times as an engine's heartbeat carries them."""
        return {name: round(seconds, 3) for name, seconds in asdict(self).items()}


def in_words(facts: Mapping[str, Any]) -> str:
    """Return one line about a start from its `facts`."""
    parts = (f"{word} {facts[name]:.1f} s" for word, name in (("load", "load_s"), ("warm-up", "warm_up_s")))
    return f"engine ready in {facts['ready_s']:.1f} s: {', '.join(parts)}"


def find_failure(alive: Iterable[Process]) -> Exception | None:
    """Return the error of an engine that could not start: ValueError for an operator's mistake, else RuntimeError."""
    for process in alive:
        if process.kind == ENGINE and process.facts.get("state") == FAILED:
            reason = str(process.facts.get("error"))
            return ValueError(reason) if process.facts.get("is_mistake") else RuntimeError(reason)
    return None


def find_engines(groups: Iterable[EngineGroup], alive: Sequence[Process]) -> dict[str, Mapping[str, Any]] | None:
    """Return the facts of a ready engine for each group that has engines from the start; None while one is missing."""
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
    """Return model -> (bytes that are here, bytes of all) of those that are still downloading."""
    loading = (p.facts for p in alive if p.kind == ENGINE and p.facts.get("state") == LOADING)
    return {facts["model"]: (facts["bytes"], facts["total_bytes"]) for facts in loading if "bytes" in facts}
