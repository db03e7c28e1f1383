"""Who shares the next denoising step: pure bookkeeping, without torch and without a clock.

Time is counted in tokens that the engine has served, so what is picked depends on what was submitted between which
steps and on nothing else, and a run can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

POLICIES = ("fair", "fifo", "shortest")
SWITCHES_EARN = 4  # at most a fifth of the time is spent on bringing weights while others wait for them


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """max_batch_tokens: of one pack, all branches together; a request larger than that runs alone.

    tenant_weights: share of the service that a tenant gets while others wait, against 1 for a tenant not named.
    switch_tokens: what bringing other weights costs, in tokens that could have been served meanwhile; 0: nothing.
    """

    policy: str = "fair"
    max_batch_tokens: int = 4096
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    switch_tokens: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"scheduler policy must be {' or '.join(POLICIES)}, got {self.policy!r}")
        if self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {self.max_batch_tokens}")
        for tenant, weight in self.tenant_weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of tenant {tenant!r} must be a positive number, got {weight}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the scheduler knows of a request.

    tokens: of its next model evaluation, all branches; total_tokens: of all its evaluations; remaining_tokens: of
    those to come. weights: packs never mix two of these (expert, adapters, dtype). arrived: the clock at submission.
    """

    ticket: int
    tokens: int
    total_tokens: int
    remaining_tokens: int
    arrived: int
    weights: str = ""
    priority: int = 0
    tenant: str = ""


class Scheduler:
    """Ranks requests and fills packs.

    `fair` gives a request a claim of waiting time / size squared, anew at every step: a short one overtakes a long one,
    and as every claim grows without bound, none starves. (Highest response ratio next, Brinch Hansen 1971, has the size
    itself: all are slowed down by the same factor, which cost small requests twice the p95 latency in mixed traffic.)
    `shortest` (least remaining work) has the lowest mean latency and lets long requests starve under load; `fifo` lets
    short ones wait behind long ones.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.clock = 0  # tokens served
        self._key: Callable[[Work], tuple[float, ...]] = {
            "fair": self._claim,
            "fifo": lambda work: (work.arrived, work.ticket),
            "shortest": lambda work: (work.remaining_tokens, work.ticket),
        }[config.policy]
        self._weights, self._since = "", 0  # of the last pack, and the clock when they came
        self._served: dict[str, float] = {}  # tenant -> tokens served, divided by its weight

    def weigh(self, tenant_weights: Mapping[str, float]) -> None:
        """Take other weights for tenants, from the next pick on. ValueError for one that is no positive number."""
        if tenant_weights != self.config.tenant_weights:
            self.config = replace(self.config, tenant_weights=dict(tenant_weights))

    def rank(self, works: Iterable[Work]) -> list[Work]:
        """Most deserving first: by priority, then in turn between tenants by their weights, then by policy."""
        ordered = sorted(works, key=lambda work: (-work.priority, *self._key(work)))
        tenants = {work.tenant for work in ordered}
        if len(tenants) < 2:
            return ordered
        served = self._fair_shares(tenants)
        ranked = []
        while ordered:
            level = ordered[0].priority
            waiting = {w.tenant: w for w in reversed(ordered) if w.priority == level}  # the first of each tenant
            work = min(waiting.values(), key=lambda w: (served[w.tenant], ordered.index(w)))
            served[work.tenant] += work.tokens / self._weight(work.tenant)
            ordered.remove(work)
            ranked.append(work)
        return ranked

    def pick(self, works: Sequence[Work], max_tokens: int | None = None) -> list[int]:
        """Tickets that share the next step: the first in rank, and whoever of the others fits beside it.

        max_tokens: what memory allows, where that is less than `max_batch_tokens`.
        """
        chosen: list[Work] = []
        room = min(self.config.max_batch_tokens, max_tokens or self.config.max_batch_tokens)
        for work in self._sticky(self.rank(works)):
            if not chosen or (work.tokens <= room and work.weights == chosen[0].weights):
                chosen.append(work)
                room -= work.tokens
        return [work.ticket for work in chosen]

    def served(self, works: Iterable[Work]) -> None:
        """These had their step: the clock goes on, and their tenants' accounts with it."""
        for work in works:
            if work.weights != self._weights:
                self._weights, self._since = work.weights, self.clock
            self.clock += work.tokens
            self._served[work.tenant] = self._served.get(work.tenant, 0.0) + work.tokens / self._weight(work.tenant)

    def forget_idle_tenants(self, active: set[str]) -> None:
        """A tenant that has nothing waiting keeps no account; it starts level with the least served when it returns."""
        self._served = {tenant: tokens for tenant, tokens in self._served.items() if tenant in active}

    def _sticky(self, ranked: list[Work]) -> list[Work]:
        """The ones whose weights are there first, until these have earned what a switch costs, several times."""
        if self.clock - self._since >= SWITCHES_EARN * self.config.switch_tokens:
            return ranked
        return sorted(ranked, key=lambda work: work.weights != self._weights)  # stable: ranks stay within

    def _claim(self, work: Work) -> tuple[float, ...]:
        waited = self.clock - work.arrived
        return (-waited / work.total_tokens**2, work.total_tokens, work.ticket)

    def _fair_shares(self, tenants: set[str]) -> dict[str, float]:
        known = [self._served[tenant] for tenant in tenants if tenant in self._served]
        least = min(known, default=0.0)
        for tenant in tenants:
            self._served.setdefault(tenant, least)
        return {tenant: self._served[tenant] for tenant in tenants}

    def _weight(self, tenant: str) -> float:
        return self.config.tenant_weights.get(tenant, 1.0)
