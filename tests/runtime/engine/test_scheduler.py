"""The scheduler: who goes first, who shares a pack, and that nobody waits for ever."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest

from skylapse.runtime.engine.scheduler import SWITCHES_EARN, Scheduler, SchedulerConfig, Work


def work(ticket: int, tokens: int = 10, steps: int = 10, **fields: object) -> Work:
    total = tokens * steps
    given = dict(total_tokens=total, remaining_tokens=total, arrived=0) | fields
    return Work(ticket=ticket, tokens=tokens, **given)  # type: ignore[arg-type]


def scheduler(policy: str = "fair", max_batch_tokens: int = 100, **weights: float) -> Scheduler:
    return Scheduler(SchedulerConfig(policy=policy, max_batch_tokens=max_batch_tokens, tenant_weights=weights))


def serve(s: Scheduler, works: dict[int, int], sizes: dict[int, Work], until: int) -> list[int]:
    """Play steps until `until` is done; works: ticket -> steps left. Returns who finished, in order."""
    finished: list[int] = []
    while until not in finished:
        picked = s.pick([sizes[ticket] for ticket in works])
        s.served([sizes[ticket] for ticket in picked])
        for ticket in picked:
            works[ticket] -= 1
            if not works[ticket]:
                del works[ticket]
                finished.append(ticket)
    return finished


def test_a_pack_is_filled_up_to_its_budget_and_no_further() -> None:
    assert scheduler("fifo").pick([work(1, 60), work(2, 50), work(3, 40)]) == [1, 3]
    assert scheduler("fifo").pick([work(1, 60), work(2, 30)], max_tokens=70) == [1]


def test_a_request_larger_than_the_budget_runs_alone() -> None:
    assert scheduler("fifo").pick([work(1, 500), work(2, 10)]) == [1]


def test_packs_never_mix_weights() -> None:
    works = [work(1, weights="expert 0"), work(2, weights="expert 1"), work(3, weights="expert 0")]
    assert scheduler("fifo").pick(works) == [1, 3]


def test_short_requests_overtake_long_ones_under_fair_and_not_under_fifo() -> None:
    order = {}
    for policy in ("fair", "fifo"):
        s = scheduler(policy, max_batch_tokens=80)
        sizes = {1: work(1, 80, 50), 2: work(2, 10, 5, arrived=160)}
        works = {1: 50}
        for _ in range(2):  # the long one is under way when the short one comes
            s.served([sizes[1]])
        works[2] = 5
        order[policy] = serve(s, works, sizes, until=1)
    assert order == {"fair": [2, 1], "fifo": [1]}


@pytest.mark.parametrize("policy", ["fair", "fifo"])
def test_a_long_request_does_not_starve_under_endless_short_ones(policy: str) -> None:
    s = scheduler(policy, max_batch_tokens=80)
    long = work(0, 80, 10)
    left, ticket, short = 10, 0, None
    for served in range(20_000):
        if short is None:
            ticket += 1
            short = work(ticket, 10, 2, arrived=s.clock)
        picked = s.pick([long, short])
        s.served([w for w in (long, short) if w.ticket in picked])
        if 0 in picked:
            left -= 1
            if not left:
                break
        elif served % 2:
            short = None
    assert left == 0


def test_shortest_goes_by_the_work_that_is_left() -> None:
    works = [work(1, 10, 50), work(2, 10, 5), work(3, 10, 50, remaining_tokens=20)]
    assert [w.ticket for w in scheduler("shortest").rank(works)] == [3, 2, 1]


def test_priority_goes_before_everything_else() -> None:
    works = [work(1, 10, 2), work(2, 10, 50, priority=1)]
    assert [w.ticket for w in scheduler().rank(works)] == [2, 1]


def test_tenants_share_the_service_by_their_weights() -> None:
    s = scheduler(max_batch_tokens=10, heavy=3.0)
    works = [work(1, tenant="heavy"), work(2, tenant="light"), work(3, tenant="light")]
    served = {"heavy": 0, "light": 0}
    for _ in range(400):
        (ticket,) = s.pick(works)
        s.served([w for w in works if w.ticket == ticket])
        served[works[ticket - 1].tenant] += 1
    assert served == {"heavy": 300, "light": 100}


def test_a_tenant_that_was_away_is_not_repaid_for_it() -> None:
    s = scheduler(max_batch_tokens=10)
    for _ in range(100):
        s.served([work(1, tenant="a")])
    s.forget_idle_tenants({"a"})
    works = [work(1, tenant="a"), work(2, tenant="b")]
    first = []
    for _ in range(10):
        (ticket,) = s.pick(works)
        s.served([works[ticket - 1]])
        first.append(ticket)
    assert sorted(first) == [1] * 5 + [2] * 5


def test_the_same_submissions_are_picked_in_the_same_order() -> None:
    def run() -> list[list[int]]:
        s = scheduler(max_batch_tokens=40)
        works = [work(k, 5 + 7 * k % 31, 3 + k, arrived=0) for k in range(1, 9)]
        picks = []
        for _ in range(30):
            picks.append(s.pick(works))
            s.served([w for w in works if w.ticket in picks[-1]])
        return picks

    assert run() == run()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(policy="lifo"), "scheduler policy must be fair or fifo or shortest, got 'lifo'"),
        (dict(max_batch_tokens=0), "max_batch_tokens must be at least 1, got 0"),
        (dict(tenant_weights={"a": 0.0}), "the weight of tenant 'a' must be a positive number, got 0.0"),
    ],
)
def test_a_wrong_configuration_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**fields)


def test_the_scheduler_and_the_policies_names_need_no_torch() -> None:
    code = (
        "import sys, skylapse.runtime.engine.scheduler, skylapse.runtime.cache.spec as s; "
        "s.choose('high', 30, s.WAN_PRESETS, False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def two_experts(switch_tokens: int, steps: int = 400) -> tuple[list[str], dict[int, int]]:
    """The weights of each pack, and steps by ticket, of two endless requests in each of two experts."""
    s = Scheduler(SchedulerConfig(max_batch_tokens=10, switch_tokens=switch_tokens))
    works = [work(ticket, 10, 1000, weights=f"expert {ticket % 2}") for ticket in range(1, 5)]
    packs, counts = [], dict.fromkeys(range(1, 5), 0)
    for _ in range(steps):
        (ticket,) = s.pick(works)
        counts[ticket] += 1
        packs.append(f"expert {ticket % 2}")
        s.served([w for w in works if w.ticket == ticket])
        works = [  # who has been served has a smaller claim from now on
            dataclasses.replace(w, arrived=s.clock) if w.ticket == ticket else w for w in works
        ]
    return packs, counts


def test_weights_that_are_there_are_used_until_they_have_earned_a_switch() -> None:
    packs, counts = two_experts(switch_tokens=30)
    turns = [len(list(turn)) for _, turn in itertools.groupby(packs)]
    assert min(turns[:-1]) >= SWITCHES_EARN * 30 // 10 and max(turns) <= SWITCHES_EARN * 30 // 10 + 1
    assert len(turns) > 20 and min(counts.values()) > 80  # nobody starves


def test_switches_that_cost_nothing_change_nothing() -> None:
    packs, _ = two_experts(switch_tokens=0)
    turns = [len(list(turn)) for _, turn in itertools.groupby(packs)]
    assert max(turns) <= 2
    s = Scheduler(SchedulerConfig(max_batch_tokens=10))
    works = [work(1, weights="expert 0"), work(2, weights="expert 1")]
    s.served([works[1]])
    assert s.pick(works) == [1]


def test_other_weights_come_at_once_where_nothing_else_waits_for_those_that_are_there() -> None:
    s = Scheduler(SchedulerConfig(max_batch_tokens=10, switch_tokens=10**6))
    works = [work(1, weights="expert 0"), work(2, weights="expert 1")]
    s.served(works[:1])
    assert s.pick(works) == [1] and s.pick(works[1:]) == [2]


def test_ranks_hold_among_those_whose_weights_are_there() -> None:
    s = Scheduler(SchedulerConfig(policy="fifo", max_batch_tokens=20, switch_tokens=100))
    works = [
        work(1, weights="expert 1", arrived=0),
        work(2, weights="expert 0", arrived=2),
        work(3, weights="expert 0", arrived=1),
        work(4, weights="expert 0", arrived=3),
    ]
    s.served([works[1]])
    assert s.pick(works) == [3, 2]
