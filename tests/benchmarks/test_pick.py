"""`bench pick`: which attention a result file makes the default of each kind of call."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch

from skylapse.benchmarks.gpu_lease.attention import shapes
from skylapse.benchmarks.gpu_lease.case import Context
from skylapse.benchmarks.harness import spread_of
from skylapse.benchmarks.kernels import attention, pick
from skylapse.benchmarks.kernels.attention import call_in
from skylapse.benchmarks.kernels.case import Suite
from skylapse.benchmarks.kernels.pick import attention_times
from skylapse.benchmarks.record import SCHEMA, Check, KernelReport, from_json, write
from skylapse.cli import main
from skylapse.kernels import attention_backends


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "kernels.json"


def result(**changes: Any) -> KernelReport:
    """Return results of a made-up device: cuDNN is fastest, xformers missing at one length, int8 faster but lossy."""

    def row(op: str, case: str, **ratios: float | None) -> dict[str, Any]:
        contestants: dict[str, Any] = {"triton": {"status": "ok", "seconds": spread_of([1e-3] * 6)}}
        for name, ratio in ratios.items():
            contestants[name.replace("_", "-")] = (
                {"status": "missing", "reason": "not installed"}
                if ratio is None
                else {"status": "ok", "seconds": spread_of([1e-3 * ratio] * 6), "ratio": spread_of([ratio] * 6)}
            )
        return dict(op=op, case=case, ours="triton", num_bytes=1, operations=1, contestants=contestants)

    fields = dict(
        schema=SCHEMA,
        suite="gpu",
        quick=False,
        machine={"capability": 90, "device": "a synthetic device", "commit": "abc1234", "dirty": False},
        elapsed_s=1.0,
        partial=None,
        seed=0,
        limits={},
        checks=[],
        rows=[
            row("attention", "75600 tokens, 24 heads of 128", cudnn=0.8, sdpa=1.2, xformers=0.5, triton_int8=0.4),
            row("attention", "32760 tokens, 24 heads of 128", cudnn=0.9, sdpa=1.3, xformers=None, triton_int8=0.4),
            row("attention_ragged", "two (64, 128), 24 heads of 128", cudnn=1.1, sdpa=1.5, xformers=None, sage=0.4),
            row("attention_ragged", "two (9000, 8000), 48 heads of 64", cudnn=0.7, varlen=0.6),
            row("adaln", "far away", sdpa=0.01),
        ],
    )
    return from_json(KernelReport, json.dumps(fields | changes, default=asdict))


def test_each_kind_of_call_has_a_winner_of_those_who_took_part_in_all_of_it(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(result(), out)
    assert main(["bench", "pick", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "sm_90: a synthetic device, commit abc1234; of triton's time:",
        "  head size 64, long: varlen 0.600, cudnn 0.700, triton 1.000",
        "  head size 128, long: cudnn 0.849, triton 1.000, sdpa 1.249",
        "  head size 128, ragged: triton 1.000, cudnn 1.100, sdpa 1.500",
    ]


def test_what_is_written_is_what_the_runtime_chooses_by(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = tmp_path / "measured.json"
    other = {"capability": 80, "head_size": 128, "kind": "long", "fastest": ["flash"]}
    stale = {"capability": 90, "head_size": 32, "kind": "long", "fastest": ["sdpa"]}
    measured.write_text(json.dumps([stale, other]))
    for place in (pick, attention_backends):
        monkeypatch.setattr(place, "MEASURED", measured)
    write(result(), out)
    assert main(["bench", "pick", "--write", str(out)]) == 0
    attention_backends.measured.cache_clear()
    found = attention_backends.measured()
    attention_backends.measured.cache_clear()
    assert found == {
        (80, 128, "long"): ("flash",),
        (90, 64, "long"): ("varlen", "cudnn", "triton"),
        (90, 128, "long"): ("cudnn", "triton", "sdpa"),
        (90, 128, "ragged"): ("triton", "cudnn", "sdpa"),
    }


def test_cases_of_the_gpu_suite_say_which_kinds_of_calls_they_are() -> None:
    on_gpu = Suite(torch.device("cuda"), torch.bfloat16, quick=False)
    kinds = {(call.head_size, call.kind) for call in (call_in(case.name) for case in attention.cases(on_gpu))}
    assert kinds == {(head_size, kind) for head_size in attention.HEADS for kind in attention_backends.KINDS}
    with pytest.raises(ValueError, match="must say its lengths and heads, got 'four clips'"):
        call_in("four clips")


def test_lease_is_picked_from_though_other_calls_were_cut(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = result()
    lease = replace(made_up.lease(), machine=whole.machine, rows=whole.rows, checks=[], partial="not run: tune")
    assert attention_times(lease) == attention_times(whole)
    write(lease, out)
    assert main(["bench", "pick", str(out)]) == 0
    assert "head size 128, long: cudnn" in capsys.readouterr().out
    write(made_up.memory(), out)
    with pytest.raises(ValueError, match="must compare kernels, got a result of memory"):
        pick.pick([str(out)])


def test_every_case_of_a_lease_is_a_kind_of_call() -> None:
    context = Context(
        Suite(torch.device("cuda"), torch.bfloat16, False), False, 0, Path(), frozenset(), lambda at: None
    )
    kinds = {call_in(case.name).kind for case in shapes(context) if case.op in ("attention", "attention_ragged")}
    assert kinds == {"long", "short", "ragged"}


def test_backend_that_was_wrong_is_not_picked() -> None:
    wrong = [Check(op="attention=cudnn", case="head 64", status="wrong", worst=9.0)]
    assert set(attention_times(result(checks=wrong))[1][128, "long"]) == {"triton", "sdpa"}
    ours = [Check(op="attention", case="head 64", status="failed", reason="x")]
    assert set(attention_times(result(checks=ours))[1][128, "long"]) == {"cudnn", "sdpa"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "cpu"}, "must be of a GPU, got suite 'cpu'"),
        ({"partial": "interrupted"}, r"must be whole, got a partial one \(interrupted\)"),
        ({"rows": []}, "must have comparisons of attention"),
    ],
)
def test_file_that_cannot_tell_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_times(result(**changes))
