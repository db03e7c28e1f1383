"""`skylapse bench serve` from its options to its file, against servers in a thread."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from skylapse.benchmarks.load.command import serve
from skylapse.benchmarks.load.stub import Stub
from skylapse.benchmarks.record import SuiteReport, read

Serve = Callable[[web.Application], str]  # of the fixture `serving`


def report(path: Path) -> SuiteReport:
    return read(path, SuiteReport)


def values(found: SuiteReport, name: str) -> list[float]:
    return next(one.samples for one in found.measurements if one.name == name)


def run_trusted(arguments: list[str], out: Path) -> int:
    """Run the command up to three times: a run whose generator was held up by the machine distrusts itself."""
    for _ in range(3):
        if not (status := serve([*arguments, "--out", str(out)])):
            break
        out.unlink(missing_ok=True)
    return status


@pytest.mark.alone
def test_a_sweep_ends_in_curves_a_verdict_a_cost_and_a_plan(
    serving: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two slots of 0.05 s, so 40 requests/s: 20 are easy, 150 are not."""
    url, out = serving(Stub(0.05, slots=2).app()), tmp_path / "r.json"
    arguments = ["--url", url, "--loads", "20,150", "--requests", "40", "--slo", "p90=400ms", "--plan-for", "30/s"]
    arguments += ["--poll-rate", "5000"]
    assert run_trusted([*arguments, "--price-per-hour", "3.6"], out) == 0
    found = report(out)
    assert found.partial is None and found.failures == {}
    slow, fast = (values(found, f"serve/mixed/poisson/{rate}/throughput/stub")[0] for rate in (20, 150))
    assert 10 < slow < 30 < fast < 41
    curves = {curve.name: curve.points for curve in found.curves}
    attained = curves["serve/mixed/poisson/attained/p90=0.4s/stub"]
    assert attained[0][0] == 20.0 and attained[0][1] >= 0.9 > attained[1][1]
    assert curves["serve/mixed/poisson/goodput/stub"][0][1] == pytest.approx(20, rel=0.3)
    video_s = values(found, "serve/mixed/poisson/150/throughput_video/stub")[0]
    assert values(found, "serve/mixed/poisson/150/cost_per_video_s/stub") == [pytest.approx(0.001 / video_s)]
    (plan,) = found.settings["plan"]
    assert plan["replicas"] == pytest.approx(36 / plan["per_replica_per_s"], abs=1.0) and plan["assumptions"]
    printed = capsys.readouterr().out
    assert "p90=0.4s: met" in printed and "p90=0.4s: MISSED" in printed

    again = tmp_path / "again.json"
    assert run_trusted([*arguments, "--plan-with", str(out)], again) == 0
    theirs, mine = sorted(report(again).settings["plan"], key=lambda plan: plan["cost_per_hour"] is None)
    assert theirs["cost_per_hour"] == pytest.approx(3.6 * theirs["replicas"]) and mine["cost_per_hour"] is None


@pytest.mark.parametrize(("scenario", "unit"), [("singlestream", "s"), ("offline", "samples/s")])
def test_mlperfs_scenarios_end_in_its_figure_marked_unverified(
    serving: Serve, tmp_path: Path, scenario: str, unit: str
) -> None:
    server, out = Stub(0.05), tmp_path / "r.json"
    arguments = ["--url", serving(server.app()), "--workload", "mlperf-t2v", "--scenario", scenario]
    assert serve([*arguments, "--requests", "5", "--out", str(out)]) == 0
    found = report(out)
    result = next(one for one in found.measurements if one.name == f"serve/mlperf-t2v/{scenario}/result/stub")
    assert result.unit == unit and result.labels["status"] == found.settings["notes"]["status"] == "unverified"
    assert 0.05 <= result.samples[0] < 0.5 if unit == "s" else 5 < result.samples[0] < 100
    assert {body["size"] for body in server.asked} == {"720x1280"} and {body["seed"] for body in server.asked} == {42}
    assert "guidance_scale" in found.settings["fields_left_out"]  # the stub documents no such field


def test_requests_that_fail_are_counted_by_kind_and_fail_the_run(serving: Serve, tmp_path: Path) -> None:
    class Broken(Stub):
        async def create(self, request: web.Request) -> web.Response:
            if len(self.asked) % 3 == 2:
                self.asked.append({})
                return web.Response(text="oops", status=500)
            return await super().create(request)

    out = tmp_path / "r.json"
    assert serve(["--url", serving(Broken(0.01).app()), "--rate", "100", "--requests", "9", "--out", str(out)]) == 1
    found = report(out)
    assert found.partial is None
    assert found.failures == {"serve/mixed/poisson/ended/http_500/stub": "3 of 9 requests: 500: oops"}
    latency = next(one for one in found.measurements if "/latency/" in one.name)
    assert (latency.labels["ended_ok"], latency.labels["ended_http_500"]) == (6, 3)


def test_a_run_that_is_ended_keeps_what_it_had_and_says_that_it_is_partial(serving: Serve, tmp_path: Path) -> None:
    class Ending(Stub):
        async def get(self, request: web.Request) -> web.Response:
            if len(self.asked) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return await super().get(request)

    out = tmp_path / "r.json"
    arguments = ["--url", serving(Ending(0.05).app()), "--scenario", "closed", "--concurrency", "1"]
    assert serve([*arguments, "--requests", "1000", "--out", str(out)]) == 130
    found = report(out)
    assert found.partial == "interrupted"
    done = [one for one in found.measurements if "/latency/" in one.name]
    assert sum(len(one.samples) for one in done) == 5


def test_a_server_that_is_not_there_or_says_nothing_ends_the_run_with_a_reason(serving: Serve, tmp_path: Path) -> None:
    async def never(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        raise AssertionError

    silent = web.Application()
    silent.router.add_route("*", "/{path:.*}", never)
    for url, said in (("http://127.0.0.1:9", "nothing answers at"), (serving(silent), "does not answer within 0.2 s")):
        out = tmp_path / "r.json"
        assert serve(["--url", url, "--http-timeout", "0.2", "--out", str(out)]) == 1
        assert said in (report(out).partial or "")


def test_a_recorded_trace_is_played_as_it_is(serving: Serve, tmp_path: Path) -> None:
    trace, out, server = tmp_path / "t.jsonl", tmp_path / "r.json", Stub(0.01)
    trace.write_text('{"at_s": 5, "prompt": "b", "class": "x"}\n{"at_s": 4.9, "prompt": "a", "class": "y"}\n')
    url = serving(server.app())
    assert serve(["--url", url, "--trace", f"replay:{trace}", "--slo", "y:p50=1s", "--out", str(out)]) == 0
    assert [body["prompt"] for body in server.asked] == ["a", "b"]
    assert report(out).settings["trace"] == "replay:t.jsonl"  # folders of this machine are nobody's business


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "0"], "rate must be above 0"),
        (["--trace", "flood"], "trace must be poisson, burst, diurnal or replay:FILE"),
        (["--slo", "p95"], "slo must be like"),
        (["--slo", "huge:p95=1s"], r"slo must name a class of the workload \((small|large), "),
        (["--plan-for", "2/s"], "plan-for needs at least two --loads"),
        (["--plan-for", "2/s", "--loads", "1,2", "--slo", "mean=1s"], "plan-for needs percentiles"),
        (["--plan-for", "fast", "--loads", "1,2", "--slo", "p95=1s"], "plan-for must be a rate"),
        (["--loads", "1,1"], "must be different rates"),
        (["--loads", "1,2", "--scenario", "closed"], "loads are rates of an arrival process"),
        (["--requests", "0"], "requests must be at least 1"),
        (["--trace", "replay:t.jsonl"], "t.jsonl must have requests"),
        (["--prompts", "t.jsonl"], "t.jsonl must have prompts"),
        (["--plan-with", "old.json"], "old.json must have schema"),
        (["--url", "host:80"], "url must begin with http"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text("")
    (tmp_path / "old.json").write_text('{"schema": "older"}')
    with pytest.raises(ValueError, match=said):
        serve(["--url", "http://127.0.0.1:9", *arguments])
    assert not (tmp_path / "bench-results").exists()
