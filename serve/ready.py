"""How long an engine took until it was ready, and for what: its facts, and the same in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
