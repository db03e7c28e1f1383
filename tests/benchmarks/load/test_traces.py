"""Arrivals: the processes' rates and shapes, recorded traces, and what is wrong with a file, by its line."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from skylapse.benchmarks.load.traces import Arrival, draw, replay
from skylapse.benchmarks.load.workloads import Kind, Workload, mixed, mlperf_t2v, read_prompts

ASK = mixed().ask(0)


def gaps(trace: list[Arrival]) -> list[float]:
    return [b.at_s - a.at_s for a, b in pairwise(trace)]


def dispersion(trace: list[Arrival], bin_s: float) -> float:
    """Variance over mean of the counts in bins: 1 of a Poisson process."""
    counts = [0] * (int(trace[-1].at_s / bin_s) + 1)
    for arrival in trace:
        counts[int(arrival.at_s / bin_s)] += 1
    return statistics.pvariance(counts) / statistics.mean(counts)


@pytest.mark.parametrize("name", ["poisson", "burst", "diurnal"])
def test_every_process_keeps_the_rate_that_was_asked_for(name: str) -> None:
    trace = draw(name, 5.0, ASK, 3, None, 4000.0)
    assert len(trace) / 4000 == pytest.approx(5.0, rel=0.05)
    assert all(gap >= 0 for gap in gaps(trace))


def test_poisson_gaps_vary_as_an_exponential_and_bursts_vary_more() -> None:
    calm, bursts = (draw(name, 5.0, ASK, 1, 8000, None) for name in ("poisson", "burst"))
    assert statistics.stdev(gaps(calm)) / statistics.mean(gaps(calm)) == pytest.approx(1.0, abs=0.06)
    assert dispersion(calm, 2.0) == pytest.approx(1.0, abs=0.15)
    assert dispersion(bursts, 2.0) > 2.0


def test_diurnal_traces_are_a_wave() -> None:
    trace = draw("diurnal", 5.0, ASK, 1, None, 1000.0)
    quarter = [sum(250 * q <= arrival.at_s < 250 * (q + 1) for arrival in trace) for q in range(4)]
    assert min(quarter[1:3]) > 2 * max(quarter[0], quarter[3])


def test_the_same_seed_gives_the_same_trace_and_another_does_not() -> None:
    one, again, other = (draw("burst", 2.0, mixed().ask(seed), seed, 50, None) for seed in (4, 4, 5))
    assert one == again != other


def test_whole_weights_are_kept_exactly_and_others_on_average() -> None:
    ask = mixed().ask(2)
    names = [ask(index)[0] for index in range(40)]
    assert [names[at : at + 4].count("large") for at in range(0, 40, 4)] == [1] * 10
    halves = Workload("w", (Kind("a", 0.9, {}, 1), Kind("b", 0.1, {}, 1)), ["p"])
    ask = halves.ask(0)
    drawn = [ask(index)[0] for index in (1999, *range(1999))]  # in any order
    assert drawn.count("b") / 2000 == pytest.approx(0.1, abs=0.03)


def test_mlperfs_parameters_are_those_of_v6_and_say_that_they_are_unverified() -> None:
    workload = mlperf_t2v()
    _, fields, video_s = workload.ask(0)(0)
    assert {**fields, "prompt": 0, "negative_prompt": 0} == {
        "prompt": 0,
        "negative_prompt": 0,
        "seed": 42,
        "size": "720x1280",
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "boundary_ratio": 0.875,
    }
    assert video_s == 81 / 16 and len(workload.prompts) == 248 and fields["negative_prompt"]
    assert workload.notes["status"] == "unverified" and "not MLPerf's" in str(workload.notes["prompts"])
    assert mlperf_t2v(["theirs"]).notes["prompts"] == "given by --prompts"


def test_recorded_traces_keep_their_times_classes_and_shapes(tmp_path: Path) -> None:
    lines = tmp_path / "trace.jsonl"
    lines.write_text(
        '{"at_s": 12.5, "prompt": "a star", "size": "64x64", "frames": 9, "steps": 4, "class": "tiny"}\n\n'
        '{"at_s": 10, "seconds": 2}\n'
    )
    first, second = replay(lines, ASK)
    assert (first.at_s, first.fields["seconds"], first.video_s) == (0.0, "2", 2.0)
    assert "num_frames" not in first.fields  # the workload's own would contradict it
    assert (second.at_s, second.kind) == (2.5, "tiny")
    assert (second.fields["prompt"], second.fields["num_frames"], second.fields["num_inference_steps"]) == (
        "a star",
        9,
        4,
    )
    assert replay(lines, ASK, speed=5)[1].at_s == 0.5
    table = tmp_path / "trace.csv"
    table.write_text("at_s,size,frames,class\n3,64x64,9,tiny\n1,,,\n")
    first, second = replay(table, ASK)
    assert (first.kind, second.kind, second.at_s) == (ASK(0)[0], "tiny", 2.0)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.jsonl", "", "the trace is empty"),
        ("t.csv", "", "the trace is empty"),
        ("t.csv", "at_s,size\n", "the trace is empty"),
        ("t.csv", "when,size\n1,64x64\n", "line 1: the header must have at_s"),
        ("t.csv", "at_s,size\n1,64x64\n2\n", "line 3: must have 2 columns"),
        ("t.jsonl", '{"at_s": 1}\n{at_s: 2}\n', "line 2: must be a JSON object"),
        ("t.jsonl", '{"at_s": 1}\n[2]\n', "line 2: must be a JSON object, got list"),
        ("t.jsonl", '{"at_s": 1}\n\n{"at": 2}\n', "line 3: may have at_s"),
        ("t.jsonl", '{"size": "64x64"}\n', "line 1: must have at_s"),
        ("t.jsonl", '{"at_s": "soon"}\n', "line 1: at_s must be a number from 0, got 'soon'"),
        ("t.jsonl", '{"at_s": -1}\n', "line 1: at_s must be a number from 0, got -1"),
        ("t.jsonl", '{"at_s": NaN}\n', "line 1: at_s must be a number from 0"),
        ("t.jsonl", '{"at_s": 1, "frames": 8.5}\n', "line 1: frames must be a whole number above 0, got 8.5"),
        ("t.jsonl", '{"at_s": 1, "frames": 9, "seconds": 2}\n', "line 1: must have seconds or num_frames"),
        ("t.jsonl", '{"at_s": 1, "size": "big"}\n', "line 1: size must be WIDTHxHEIGHT, got 'big'"),
        ("t.jsonl", '{"at_s": 1, "prompt": " "}\n', "line 1: prompt must be text"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        replay(path, ASK)
    assert str(error.value).startswith(name)


def test_traces_that_would_be_empty_or_endless_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no request arrives"):
        draw("poisson", 0.001, ASK, 0, None, 0.001)
    with pytest.raises(ValueError, match="requests or duration"):
        draw("poisson", 1.0, ASK, 0, None, None)
    with pytest.raises(ValueError, match="rate must be above 0"):
        draw("poisson", 0.0, ASK, 0, 5, None)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        replay(tmp_path / "binary.jsonl", ASK)


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a star\n\n{"prompt": "a moon"}\n')
    assert read_prompts(path) == ["a star", "a moon"]
    path.write_text('a star\n{"text": "a moon"}\n')
    with pytest.raises(ValueError, match=r"prompts.txt, line 2"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has none"):
        read_prompts(path)
