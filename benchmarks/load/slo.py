"""Service level objectives: what was promised, how many requests had it, and what that costs.

Goodput counts requests (and seconds of video) that ended well within their own class's limit, over the time in which
they arrived. A request that was rejected, failed or late took infinitely long: a server does not look better for
turning work away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .client import Outcome
from .play import quantile

TERM = re.compile(r"(?:(?P<kind>[^:=,]+):)?(?P<what>p\d{1,2}(?:\.\d+)?|mean)=(?P<limit>\d+(?:\.\d+)?)(?P<unit>ms|s|m)")
UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class Slo:
    """Of one class, or of all requests where kind is None; share: 0.95 for p95, None for the mean."""

    kind: str | None
    share: float | None
    limit_s: float

    @property
    def name(self) -> str:
        what = "mean" if self.share is None else f"p{100 * self.share:g}"
        return f"{f'{self.kind}:' if self.kind else ''}{what}={self.limit_s:g}s"

    def reached_s(self, outcomes: Sequence[Outcome]) -> float:
        """What the outcomes came to; infinite where too many of them never ended well. NaN where there are none."""
        values = sorted(
            math.inf if one.latency_s is None else one.latency_s
            for one in outcomes
            if self.kind is None or one.kind == self.kind
        )
        if not values:
            return math.nan
        return sum(values) / len(values) if self.share is None else quantile(values, self.share)

    def is_met(self, outcomes: Sequence[Outcome]) -> bool:
        return self.reached_s(outcomes) <= self.limit_s


def parse_slo(text: str) -> list[Slo]:
    """`p95=30s`, `large:p95=60s,small:p50=5s`. ValueError says what is wrong."""
    found = []
    for term in text.split(","):
        match = TERM.fullmatch(term.strip())
        if match is None:
            raise ValueError(f"slo must be like p95=30s, mean=500ms or large:p99=2m, got {term.strip()!r}")
        limit_s = float(match["limit"]) * UNIT_S[match["unit"]]
        share = None if match["what"] == "mean" else round(float(match["what"][1:]) / 100, 6)
        if not limit_s > 0:
            raise ValueError(f"slo must have a limit above 0, got {term.strip()!r}")
        if share is not None and not 0 < share < 1:
            raise ValueError(f"slo must have a percentile above p0, got {term.strip()!r}")
        found.append(Slo(match["kind"], share, limit_s))
    return found


def check_kinds(slos: Sequence[Slo], kinds: Sequence[str]) -> None:
    """ValueError for a class that the workload does not have: it would be met by nobody's requests."""
    for slo in slos:
        if slo.kind is not None and slo.kind not in kinds:
            raise ValueError(f"slo must name a class of the workload ({', '.join(kinds)}), got {slo.kind!r}")


def limit_of(slos: Sequence[Slo], kind: str) -> float:
    """Within which a request of this class counts as good: its class's strictest, else everybody's."""
    own = [slo.limit_s for slo in slos if slo.kind == kind] or [slo.limit_s for slo in slos if slo.kind is None]
    return min(own, default=math.inf)


@dataclass(frozen=True)
class Good:
    """Of the requests that were due in a window. Rates of what was done; `good`: done within the class's limit."""

    requests: int
    ok: int
    good: int
    requests_per_s: float
    good_per_s: float
    video_s_per_s: float
    good_video_s_per_s: float
    mean_s: float  # latency of what was done

    @property
    def share(self) -> float:
        return self.good / self.requests if self.requests else 0.0


def goodput(
    outcomes: Sequence[Outcome], slos: Sequence[Slo], window_s: float, first_s: float = 0.0, doubt: bool = False
) -> Good:
    """window_s: in which they arrived, from first_s on. What was done is over the time until the last was done.

    An overloaded server goes on working behind the window; to divide that by the window would give it the offered load
    as its throughput. doubt: good is also who may have been done in time, between two polls.
    """
    ok = [one for one in outcomes if one.latency_s is not None]
    good = [one for one in ok if (one.latency_s or 0.0) - doubt * one.resolution_s <= limit_of(slos, one.kind)]
    over = max(window_s, 1e-9)
    until_s = max([over, *(one.done_s - first_s for one in ok if one.done_s is not None)])
    return Good(
        requests=len(outcomes),
        ok=len(ok),
        good=len(good),
        requests_per_s=len(ok) / until_s,
        good_per_s=len(good) / over,
        video_s_per_s=sum(one.video_s for one in ok) / until_s,
        good_video_s_per_s=sum(one.video_s for one in good) / over,
        mean_s=sum(one.latency_s or 0.0 for one in ok) / max(1, len(ok)),
    )


def cost_per_video_s(price_per_hour: float, video_s_per_s: float) -> float | None:
    """In the price's currency; None where there was no video."""
    return price_per_hour / 3600 / video_s_per_s if video_s_per_s > 0 else None
