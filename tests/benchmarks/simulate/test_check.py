"""The fit, the check against measured traces, assumptions and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from skylapse.benchmarks.command import bench
from skylapse.benchmarks.record import SCHEMA, Measurement, Spread, SuiteReport, read, write
from skylapse.benchmarks.simulate.assume import Assumptions, read_assumptions
from skylapse.benchmarks.simulate.check import SLOTS
from skylapse.benchmarks.simulate.cost import Shape, StepCost, Ticks, fit
from skylapse.benchmarks.simulate.model import simulate
from skylapse.benchmarks.simulate.service import Service
from skylapse.benchmarks.suites.traffic import draw_trace
from skylapse.kernels import roofline
from skylapse.runtime.core.config import Settings
from skylapse.runtime.engine.scheduler import SchedulerConfig

COST = StepCost(fixed_s=0.004, request_s=0.001, token_s=0.0003, idle_s=0.0002)
SHAPES = {
    "small": Shape(name="small", tokens=96, num_steps=4, encode_s=(0.001,), decode_s=(0.01, 0.07)),
    "large": Shape(name="large", tokens=768, num_steps=4, encode_s=(0.001,), decode_s=(0.02, 0.4, 0.3)),
}
CONFIG = SchedulerConfig(max_batch_tokens=384)


def bench_simulate(*arguments: str | Path) -> int:
    return bench(["simulate", *map(str, arguments)], Settings())


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_a_fit_recovers_the_times_that_ticks_were_made_with() -> None:
    packs = [(96, 1), (192, 2), (384, 4), (768, 1), (384, 1), (0, 0)] * 40
    noise = [0.97 + 0.02 * (k % 4) for k in range(len(packs))]  # of mean 1
    seconds = [COST.seconds(*pack) * factor for pack, factor in zip(packs, noise, strict=True)]
    found = fit(Ticks(seconds, [pack[0] for pack in packs], [pack[1] for pack in packs]))
    for pack in packs[:5]:
        assert found.cost.seconds(*pack) == pytest.approx(COST.seconds(*pack), rel=0.03)
    assert found.cost.token_s == pytest.approx(COST.token_s, rel=0.05)
    assert found.cost.idle_s == pytest.approx(COST.idle_s, rel=0.05)
    assert found.error < 0.03


def test_no_part_of_a_fit_is_below_zero() -> None:
    found = fit(Ticks([0.1, 0.19, 0.27], [100, 200, 300], [1, 2, 3])).cost
    assert min(found.fixed_s, found.request_s, found.token_s) >= 0
    assert found.seconds(200, 2) == pytest.approx(0.19, rel=0.05)


def test_a_slow_tick_in_forty_does_not_move_a_fit() -> None:
    seconds = [0.1] * 39 + [5.0]
    assert fit(Ticks(seconds, [100] * 40, [1] * 40)).cost.seconds(100, 1) == pytest.approx(0.1)


@pytest.mark.parametrize("ticks", [([0.1], [100, 200], [1]), ([0.1], [0], [0])])
def test_ticks_that_cannot_be_fitted_are_refused(ticks: tuple[Sequence[float], ...]) -> None:
    with pytest.raises(ValueError, match="ticks must have"):
        Ticks(*ticks)


# --- the check --------------------------------------------------------------------------------------------------------


def made_up(path: Path, slower: Callable[[int], float] = lambda seed: 1.0, **changes: Any) -> Path:
    """A result of `bench engine` on a machine of COST's times; a seed's latencies are `slower` times as long."""
    asked = {"requests": 40, "seeds": 3, "load": 0.8, "steps": 4, "scheduler": "fair", "max_batch_tokens": 384}
    service_s = {kind: shape.alone_s(COST) for kind, shape in SHAPES.items()}
    found: dict[str, tuple[list[float], dict[str, Any]]] = {
        f"engine/solo/{kind}": ([seconds], {}) for kind, seconds in service_s.items()
    }
    for seed in range(3):
        trace = draw_trace(40, 0.8, 4, service_s, seed)
        for way, slots in SLOTS.items():
            service = Service(slots=slots, dispatchers=None, scheduler=CONFIG)
            ran = simulate(service, COST, [(one.at_s, SHAPES[one.kind]) for one in trace])
            for kind in SHAPES:
                latencies = [(one.latency_s or 0.0) * slower(seed) for one in ran.outcomes if one.kind == kind]
                found[f"engine/poisson/seed-{seed}/{way}/{kind}"] = (latencies, {})
    packs = [(96, 1), (192, 2), (384, 4), (768, 1), (0, 0)] * 4
    found["engine/ticks/tick_s"] = ([COST.seconds(*pack) for pack in packs], {})
    found["engine/ticks/tokens"] = ([pack[0] for pack in packs], {})
    found["engine/ticks/requests"] = ([pack[1] for pack in packs], {})
    for kind, shape in SHAPES.items():
        count = sum(one.kind == kind for one in draw_trace(40, 0.8, 4, service_s, 0))
        for stage, items in (("encode", shape.encode_s), ("decode", shape.decode_s)):
            found[f"engine/items/{stage}/{kind}"] = (list(items) * count, {"tokens": shape.tokens})
    spread = Spread(median=1, q1=1, q3=1, low=None, high=None, n=1)
    measurements = [
        Measurement(name=name, unit="s", better="lower", spread=spread, samples=samples, labels=labels)
        for name, (samples, labels) in found.items()
    ]
    fields: dict[str, Any] = {"benchmark": "engine", "partial": None, "settings": asked, "measurements": measurements}
    head = {"suite": "cpu", "quick": False, "machine": {}, "elapsed_s": 1.0, "seed": 0, "model": "demo"}
    write(SuiteReport(schema=SCHEMA, **head, **fields | changes), path)
    return path


def test_a_machine_of_known_times_is_predicted_on_traces_that_were_held_out(tmp_path: Path) -> None:
    out = tmp_path / "simulate.json"
    assert bench_simulate("--check", made_up(tmp_path / "engine.json"), "--out", out) == 0
    report = read(out, SuiteReport)
    named = {one.name: one for one in report.measurements}
    errors = named["simulate/check/continuous/p95-error"].samples
    assert len(errors) == 2 and max(errors) < 0.02  # seeds 1 and 2: the fit's own is not counted
    assert named["simulate/check/one-at-a-time/p95-error"].spread.median < 0.02
    of_all = [one for one in report.comparisons if one.name.endswith("continuous/all/p95")]
    assert [one.labels["held_out"] for one in of_all] == [0, 1, 1]
    assert {curve.name.rpartition("/")[2] for curve in report.curves} == {"predicted", "measured"}


def test_a_prediction_that_is_too_far_off_fails(tmp_path: Path) -> None:
    """Seeds that were held out ran on a machine half as fast."""
    file, out = made_up(tmp_path / "engine.json", slower=lambda seed: 2.0 if seed else 1.0), tmp_path / "simulate.json"
    assert bench_simulate("--check", file, "--out", out) == 1
    assert "must be 0.2 at most" in read(out, SuiteReport).failures["simulate/check"]


def test_a_second_file_is_held_out_whole(tmp_path: Path) -> None:
    files = [made_up(tmp_path / name) for name in ("engine.json", "other.json")]
    assert bench_simulate("--check", *files, "--out", tmp_path / "simulate.json") == 0
    named = {one.name: one for one in read(tmp_path / "simulate.json", SuiteReport).measurements}
    assert named["simulate/check/continuous/p95-error"].spread.n == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"benchmark": "serve"}, "must be a result of `bench engine`"),
        ({"partial": "interrupted"}, "is partial: interrupted"),
        ({"measurements": []}, "must have engine/solo/large"),
        ({"settings": {}}, "must have scheduler"),
    ],
)
def test_files_that_say_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bench_simulate("--check", made_up(tmp_path / "engine.json", **changes), "--out", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


# --- plans ------------------------------------------------------------------------------------------------------------


def test_every_figure_of_a_plan_says_where_its_times_are_from(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    small = ("--replicas", "2,4", "--load", "0.5,0.9", "--duration", "200", "--slo", "p95=90s", "--plan-for", "360/h")
    assert bench_simulate(*small, "--out", out) == 0
    report = read(out, SuiteReport)
    named = {one.name: one for one in report.measurements}
    labels = [one.labels for one in report.measurements] + [one.labels for one in report.curves]
    assert all("not measured" in str(one["assumed"]) for one in labels)
    assert named["simulate/times/long/step"].samples[0] > named["simulate/times/short/step"].samples[0] > 0
    assert named["simulate/plan/4/load-0.9/all/p95"].samples > named["simulate/plan/4/load-0.5/all/p95"].samples
    assert {curve.name for curve in report.curves} >= {"simulate/p95/2 replicas", "simulate/within p95=90s/4 replicas"}
    assert 1 <= named["simulate/holds/360/h"].samples[0] <= 8


def test_a_plan_of_measured_steps_is_labelled_with_their_file(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    steps = ("--measured", made_up(tmp_path / "engine.json"))
    assert bench_simulate(*steps, "--replicas", "2", "--load", "0.5", "--duration", "60", "--out", out) == 0
    assert {one.labels["fitted"] for one in read(out, SuiteReport).measurements} == {"engine.json"}


def test_no_number_of_replicas_holds_what_one_request_alone_breaks(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    small = ("--replicas", "1", "--load", "0.2", "--duration", "200", "--slo", "long:p50=5s", "--plan-for", "0.05/s")
    assert bench_simulate(*small, "--out", out) == 0
    assert "no number of replicas" in read(out, SuiteReport).missing["simulate/holds/0.05/s"]


def test_an_assumed_step_takes_no_less_than_the_roofline_allows() -> None:
    perfect = {"linear_efficiency": 1.0, "attention_efficiency": 1.0, "bandwidth_efficiency": 1.0, "launch_s": 0.0}
    assumed, best = Assumptions(), Assumptions.model_validate({"device": perfect})
    shape = assumed.shapes()["long"]
    assert shape.tokens == 2 * 21 * 30 * 52  # 81 frames of 832x480, both branches
    model, device = assumed.model, assumed.device
    length = shape.tokens // 2
    attention = roofline.attention([length] * 2, [length] * 2, model.heads, model.dim // model.heads, model.itemsize)
    least_s = model.layers * attention.seconds(device.bytes_per_s, device.operations_per_s)
    step_s, best_s = (one.cost().seconds(shape.tokens, 1, shape.pairs) for one in (assumed, best))
    assert least_s < best_s < step_s < 3 * best_s


def test_a_file_of_assumptions_changes_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "assume.json"
    path.write_text(json.dumps({"device": {"encode_s": 0.5}, "service": {"dispatchers": 1}}))
    found, default = read_assumptions(path), Assumptions()
    assert found.shapes()["long"].encode_s == (0.5,) and found.serving(1000).dispatchers == 1
    assert found.cost() == default.cost() and default.serving(1000).dispatchers == 32  # 8000 slots, 256 calls each


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be JSON"),
        ("[]", "the file: "),
        ('{"device": {"linear_efficiency": 1.5}}', "device.linear_efficiency"),
        ('{"device": {"speed": 1}}', "device.speed"),
        ('{"requests": {}}', "requests"),
        ('{"requests": {"a": {"num_frames": 30}}}', r"num_frames of 'a' must be 4k\+1, got 30"),
        ('{"service": {"policy": "random"}}', "scheduler policy must be"),
    ],
)
def test_bad_assumptions_are_refused_in_a_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "assume.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as refused:
        bench_simulate("--assume", path, "--out", tmp_path / "out.json")
    assert "\n" not in str(refused.value) and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replicas", "8,eight"], "different whole numbers"),
        (["--replicas", "0"], "different whole numbers"),
        (["--load", "0.5,-1"], "different shares"),
        (["--duration", "0"], "duration must be above 0"),
        (["--slo", "fast"], "slo must be like"),
        (["--slo", "huge:p95=1s"], "slo must name a class"),
        (["--plan-for", "2/s"], "plan-for needs a --slo"),
    ],
)
def test_options_that_mean_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_simulate(*words)
