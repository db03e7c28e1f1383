"""SLOs, goodput, and plans: the curve's crossing, Erlang's C by hand, M/G/k against a simulation."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from skylapse.benchmarks.load.client import Outcome
from skylapse.benchmarks.load.plan import Kind, capacity_of, erlang_c, parse_rate, plan, plans, queue_replicas, within
from skylapse.benchmarks.load.play import Played, quantile
from skylapse.benchmarks.load.slo import Slo, check_kinds, cost_per_video_s, goodput, limit_of, parse_slo


def ended(latency_s: float | None, kind: str = "small", due_s: float = 0.0, end: str = "ok") -> Outcome:
    done_s = None if latency_s is None else due_s + latency_s
    return Outcome(0, kind, due_s, 2.0, sent_s=due_s, done_s=done_s, end=end)


def test_slos_are_read_with_their_units_and_classes() -> None:
    assert parse_slo("p95=30s") == [Slo(None, 0.95, 30.0)]
    assert parse_slo("large:p99.9=2m, mean=500ms") == [Slo("large", 0.999, 120.0), Slo(None, None, 0.5)]
    for text in ("p95", "p95=30", "95=30s", "p0=1s", "p95=0s", "p100=1s", "large:=3s", ""):
        with pytest.raises(ValueError, match="slo must"):
            parse_slo(text)
    with pytest.raises(ValueError, match="class of the workload"):
        check_kinds(parse_slo("huge:p95=3s"), ["small"])


def test_a_request_that_did_not_end_well_took_infinitely_long() -> None:
    outcomes = [ended(1.0)] * 94 + [ended(None, end="rejected")] * 6
    assert Slo(None, 0.94, 2.0).is_met(outcomes)
    assert math.isinf(Slo(None, 0.95, 2.0).reached_s(outcomes))
    assert not Slo(None, None, 2.0).is_met(outcomes)
    assert not Slo("large", 0.5, 2.0).is_met(outcomes)  # nobody of this class: nothing was shown


def test_goodput_counts_by_each_class_own_limit_over_the_arrivals_window() -> None:
    slos = parse_slo("small:p95=1s,large:p95=5s")
    outcomes = [ended(0.9), ended(1.1), ended(4.0, "large"), ended(6.0, "large"), ended(None, end="late")]
    found = goodput(outcomes, slos, window_s=4.0)
    assert (found.requests, found.ok, found.good, found.share) == (5, 4, 2, 0.4)
    assert (found.good_per_s, found.good_video_s_per_s) == (0.5, 1.0)
    assert (found.requests_per_s, found.video_s_per_s) == (4 / 6, 8 / 6)  # it worked on behind the window
    outcomes[1].resolution_s = 0.15  # 1.1 s, or as little as 0.95
    assert goodput(outcomes, slos, 4.0).good == 2 and goodput(outcomes, slos, 4.0, doubt=True).good == 3
    assert limit_of(parse_slo("p95=3s,p50=2s"), "any") == 2.0
    assert cost_per_video_s(3.6, 0.5) == pytest.approx(0.002)
    assert cost_per_video_s(3.6, 0.0) is None


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [quantile(values, share) for share in (0.0, 0.01, 0.5, 0.95, 0.951, 1.0)] == [1, 1, 50, 95, 96, 100]


def test_a_late_generator_makes_the_run_not_trustworthy() -> None:
    fine = Played([Outcome(i, "a", 0.0, 1.0, sent_s=0.001, done_s=1.0, end="ok") for i in range(100)])
    assert fine.distrust is None
    late = Played([Outcome(i, "a", 0.0, 1.0, sent_s=0.5 if i < 3 else 0.0, done_s=1.0, end="ok") for i in range(100)])
    assert late.distrust is not None and "0.500 s late" in late.distrust


CURVE = ((1.0, 1.0), (2.0, 0.99), (3.0, 0.91), (4.0, 0.3))


def test_a_replicas_capacity_is_where_the_curve_crosses_the_percentile() -> None:
    kind = Kind("k", {"p95=30s": CURVE}, {}, {}, price_per_hour=2.0)
    slos = parse_slo("p95=30s")
    found = capacity_of(kind, slos)
    assert found is not None and found.per_s == pytest.approx(2.5) and not found.is_floor
    assert plan(kind, 10.0, slos, headroom=0.0).replicas == 4
    made = plan(kind, 10.0, slos, headroom=0.2)
    assert (made.replicas, made.cost_per_hour) == (5, 10.0)
    floor = capacity_of(Kind("k", {"p95=30s": CURVE[:2]}, {}, {}), slos)
    assert floor is not None and (floor.per_s, floor.is_floor) == (2.0, True)
    assert plan(Kind("k", {"p95=30s": CURVE[3:]}, {}, {}), 1.0, slos).replicas is None
    with pytest.raises(ValueError, match="must have been measured against"):
        capacity_of(kind, parse_slo("p95=20s"))


def test_the_strictest_slo_bounds_and_the_cheapest_kind_comes_first() -> None:
    slos = parse_slo("p95=30s,large:p50=9s")
    both = {"p95=30s": CURVE, "large:p50=9s": ((1.0, 0.9), (2.0, 0.1))}
    found = capacity_of(Kind("k", both, {}, {}), slos)
    assert found is not None and found.bound_by == "large:p50=9s" and found.per_s == pytest.approx(1.5)
    fast = Kind("fast", {"p95=30s": [(4 * x, y) for x, y in CURVE]}, {}, {}, 10.0)
    slow = Kind("slow", {"p95=30s": CURVE}, {}, {}, 2.0)
    never = Kind("never", {"p95=30s": CURVE[3:]}, {}, {}, 0.1)
    assert [p.kind for p in plans([never, fast, slow], 9.0, parse_slo("p95=30s"))] == ["slow", "fast", "never"]


def test_rates_are_read_by_their_unit() -> None:
    assert (parse_rate("2.5/s"), parse_rate("30/min"), parse_rate("3600/h")) == (2.5, 0.5, 1.0)
    for text in ("2.5", "0/s", "2/day", "-1/s"):
        with pytest.raises(ValueError, match="plan-for"):
            parse_rate(text)


def test_erlangs_c_is_the_tables() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)  # of M/M/1, the utilisation
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)


def simulated(servers: int, per_s: float, service_s: list[float], limit_s: float, seed: int) -> float:
    """The share within the limit of first come, first served on `servers`."""
    count = 60000
    rng, free, at_s, within_limit = random.Random(seed), [0.0] * servers, 0.0, 0
    for _ in range(count):
        at_s += rng.expovariate(per_s)
        begins = max(at_s, heapq.heappop(free))
        done = begins + rng.choice(service_s)
        heapq.heappush(free, done)
        within_limit += done - at_s <= limit_s
    return within_limit / count


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (2, 0.8), (6, 0.85)])
def test_m_g_k_is_near_a_simulation_of_a_mixed_workload(servers: int, load: float) -> None:
    small, large = [1.0, 1.1, 1.2], [4.0, 4.4]
    mix = {"small": 3.0, "large": 1.0}
    mean_s = 0.75 * 1.1 + 0.25 * 4.2
    per_s = load * servers / mean_s
    drawn = small * 2 * 3 + large * 3  # 18 to 6: the same shares
    for limit_s in (5.0, 8.0, 12.0):
        formula = within(servers, per_s, {"small": small, "large": large}, mix, None, limit_s)
        assert formula == pytest.approx(simulated(servers, per_s, drawn, limit_s, servers), abs=0.035)


def test_the_fewest_servers_that_hold_are_found_and_impossible_limits_are_told() -> None:
    kind = Kind("k", {}, {"a": [1.0]}, {"a": 1.0})
    slos = parse_slo("p95=3s")
    servers = queue_replicas(kind, 20.0, slos)
    assert servers is not None and servers > 20
    assert within(servers, 20.0, kind.service_s, kind.weights, None, 3.0) >= 0.95
    assert within(servers - 1, 20.0, kind.service_s, kind.weights, None, 3.0) < 0.95
    assert queue_replicas(kind, 20.0, parse_slo("p95=500ms")) is None  # the work alone takes a second
