"""`python -m skylapse.kernels.tune`: what it compiles here, and what it chooses and writes on a stand-in for a GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skylapse.kernels import inspect, launches, rows, search, tune
from skylapse.kernels.search import Call, Result, Search, choose
from skylapse.kernels.toolchain import ARCHITECTURES, triton

CPU = torch.device("cpu")
SEARCHES = tune.searches(90)
EACH = list({(one.op, str(one.row["dtypes"])): one for one in SEARCHES}.values())


def launched(one: Search, launch: dict[str, Any]) -> Search:
    return replace(one, launches=[launch])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_search_finds_the_launch_that_serves_its_calls_now(arch: int) -> None:
    for one in tune.searches(arch):
        widened, committed = tune.with_committed(one, arch)
        assert committed is not None and committed in widened.launches, (one.op, one.row)
        assert len(widened.launches) > 2, "there is something to choose from"


@pytest.mark.parametrize("one", EACH, ids=lambda one: f"{one.op} {one.row['dtypes'][0]}")
def test_checked_inputs_give_what_the_formula_says_on_a_cpu(one: Search) -> None:
    call = one.checked(CPU)
    assert search._fault(call, call.expected(), one.launches[0]) is None


def test_unknown_operation_missing_gpu_and_shape_are_one_clear_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        ([], "launches are measured on a GPU, and torch finds none here; --dry-run compiles without one"),
        (["--arch", "90"], "--arch is of --dry-run"),
        (["--dry-run", "--op", "conv"], "no such operation: conv"),
        (["--dry-run", "--op", "rms_norm", "--shape", "99999"], "no row serves the shape 99999"),
        (["--dry-run", "--shape", "0"], "must be WIDTH or WIDTHxLENGTH, got '0'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            tune.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_dry_run_compiles_the_candidates_and_tells_what_spills(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [one for one in tune.searches(80, ["rms_norm"], (5120, 9999)) if one.row["dtypes"] == ["fp32"]]
    monkeypatch.setattr(tune, "searches", lambda *_: [launched(few[0], dict(num_warps=1))])
    assert tune.main(["--dry-run", "--arch", "80", "--out", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rms_norm sm_80, dtypes fp32, width 8192, longest any"
    assert lines[1].startswith("  num_warps 8 ") and " 0 spilt" in lines[1], "the committed one is among them"
    assert lines[2].startswith("  num_warps 1 ") and lines[2].endswith(" bytes spilt")
    told = json.loads((tmp_path / "out.json").read_text())["searches"]
    assert [len(one["candidates"]) for one in told] == [2] and told[0]["candidates"][0]["microseconds"] is None


def test_shape_leaves_the_rows_that_serve_it() -> None:
    found = tune.searches(90, ["adaln", "attention"], (1536, 4096))
    assert {(one.op, one.row["width"], one.row["longest"]) for one in found} == {("adaln", 2048, 4096)}
    found = tune.searches(90, ["attention"], (100, 200))
    kinds = [tuple(one.launches[0].get(name, False) for name in one.asked) for one in found]
    assert [(one.row["width"], one.row["longest"]) for one in found] == [(128, 1024), (128, 1024), (128, None)]
    assert kinds == [(True, False), (False, False), (True, True)]


def test_candidate_that_does_not_compile_is_out_and_told() -> None:
    def broken(launch: Any) -> Sequence[Any]:
        raise RuntimeError("PassManager::run\nfailed")

    (result,) = search.compile_candidates(replace(launched(SEARCHES[0], {}), compiled=broken), 90)
    assert result.faults == ("RuntimeError: PassManager::run failed",)


@pytest.mark.parametrize("kind", [dict(descriptors=True), {}])
def test_bounded_registers_are_among_attentions_candidates(kind: dict[str, bool]) -> None:
    bounded = dict(block_m=128, block_n=64, num_warps=8, num_stages=2, **kind, maxnreg=128)
    found = [
        one
        for one in tune.searches(90, ["attention"], (128, 32760))
        if one.launches[0].get("descriptors") == kind.get("descriptors")
    ]
    one = next(one for one in found if not one.launches[0].get("warp_specialized"))
    assert bounded in one.launches and "maxnreg" not in one.launches[0]
    (row,) = rows.merged([], [{**one.row, "launch": bounded}], one.asked)
    assert row["launch"] == bounded


def test_candidate_whose_products_are_serialised_is_out_and_told() -> None:
    one = next(one for one in tune.searches(90, ["attention"], (128, 32760)) if one.launches[0].get("descriptors"))
    bounded = dict(block_m=128, block_n=64, num_warps=8, num_stages=2, descriptors=True, maxnreg=128)
    (result,) = search.compile_candidates(launched(one, bounded), 90)
    assert result.registers <= 128 and result.spill_bytes == 0
    assert [fault.partition(":")[0] for fault in result.faults] == ["wgmma serialised"]


# --- choosing, with the arithmetic of a CPU and a clock that is set ---------------------------------------------------

RIGHT = torch.arange(1.0, 9.0)
RUNS: dict[str, Callable[[], Tensor]] = {
    "good": lambda: RIGHT,
    "also good": lambda: RIGHT.clone(),
    "wrong": lambda: RIGHT + torch.tensor([0.0] * 7 + [0.1]),
    "unwritten": lambda: torch.empty(8),
    "failing": lambda: RIGHT @ torch.ones(3),
}


def results(*names: str, faults: tuple[str, ...] = ()) -> list[Result]:
    return [Result({"name": name}, 1, 0, 0, faults) for name in names]


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Seconds by what is run."""
    times: dict[str, float] = {}

    def timed(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
        names = {id(function): name for name, function in RUNS.items()}
        return [times[names[run()]] for run in runs]

    monkeypatch.setattr(search, "timed", timed)
    yield times


def chosen(found: list[Result], committed: str | None, clocked: dict[str, float]) -> list[Result]:
    checked = Call(lambda launch: [RUNS[launch["name"]]()], lambda: [RIGHT.double()])
    run: Any = lambda launch: id(RUNS[launch["name"]])  # noqa: E731 - the clock goes by it
    named = Call(run, lambda: [])
    one = replace(SEARCHES[0], checked=lambda device: checked, timed=lambda device: named)
    return choose(one, found, committed and {"name": committed}, CPU)


def test_fastest_right_candidate_is_chosen(clocked: dict[str, float]) -> None:
    clocked |= {"good": 2e-6, "also good": 1e-6}
    found = [
        *results("wrong", "unwritten", "failing", "good", "also good"),
        *results("good", faults=("8 bytes spilt",)),
    ]
    after = chosen(found, None, clocked)
    assert [result.chosen for result in after] == [False, False, False, False, True, False]
    assert [result.microseconds for result in after[3:5]] == pytest.approx([2.0, 1.0])
    assert after[0].faults[0].startswith("wrong by 0.0") and after[1].faults == ("wrong by nan",)
    assert after[2].faults[0].startswith("RuntimeError: ") and after[5] == found[5]


def test_committed_launch_stays_where_another_is_faster_by_noise_alone(clocked: dict[str, float]) -> None:
    for also, name in ((0.99e-6, "good"), (0.97e-6, "also good")):
        clocked |= {"good": 1e-6, "also good": also}
        after = chosen(results("good", "also good"), "good", clocked)
        assert [result.launch["name"] for result in after if result.chosen] == [name]


def test_nothing_is_chosen_where_nothing_is_right(clocked: dict[str, float]) -> None:
    assert not any(result.chosen for result in chosen(results("wrong"), None, clocked))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The JSON files, to be rewritten."""
    for path in launches.FOLDER.glob("*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(launches, "FOLDER", tmp_path)
    launches.table.cache_clear()
    yield tmp_path
    launches.table.cache_clear()


@pytest.mark.parametrize("arch", [80, 90])
def test_every_row_that_a_search_writes_serves_its_calls_and_is_compiled(arch: int, copied: Path) -> None:
    found = tune.searches(arch)
    facts = dict(device="a device", driver="1", torch="2", triton="3")
    for one in found:
        tune._write(one, arch, Result(one.launches[-1], 1, 0, 0), facts)
    for one in found:
        assert tune.with_committed(one, arch)[1] == one.launches[-1], (one.op, one.row)
    written = [row for path in copied.glob("*.json") for row in json.loads(path.read_text())[str(arch)]]
    assert sum("measured" in row for row in written) <= len(found)
    shipped = [item for item in inspect.shipped_kernels() if item.architectures == (arch,)]
    for one in found:
        for item in one.compiled(one.launches[-1]):
            alike = [(i.num_warps, i.constants) for i in shipped if i.op == item.op]
            assert any(warps == item.num_warps for warps, _ in alike), (one.op, one.row)


def test_what_is_found_is_written_for_this_architecture_with_its_device_and_versions(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((copied / "rms_norm.json").read_text())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(tune, "driver", lambda: "580.65")
    monkeypatch.setattr(tune, "choose", lambda one, found, committed, device: choose(one, found, committed, CPU))
    monkeypatch.setattr(
        search, "timed", lambda runs, device: [1.0 / (1 + i) for i in range(len(runs))]
    )  # the last wins
    assert tune.main(["--op", "rms_norm", "--shape", "1536x99999"]) == 0
    assert capsys.readouterr().out.count("  chosen") == 2
    after = json.loads((copied / "rms_norm.json").read_text())
    assert {arch: table for arch, table in after.items() if arch != "90"} == {
        a: t for a, t in before.items() if a != "90"
    }
    (written,) = [row for row in after["90"] if "measured" in row]
    assert (written["dtypes"], written["width"], written["longest"]) == (["bf16", "fp16", "fp32"], 2048, None)
    version = triton.__version__
    assert written["measured"] == f"NVIDIA H100, driver 580.65, torch {torch.__version__}, Triton {version}"
    assert launches.find("rms_norm", "rms_norm", 90, "bf16", 1536, 10) == {"num_warps": 16}
    assert not [*copied.glob("*.part")] and rows.merged(after["90"], []) == after["90"]
