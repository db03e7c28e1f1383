"""Launch configurations: how rows are looked up, and how tuned ones are written among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from skylapse.kernels import launches, rows
from skylapse.kernels.toolchain import ARCHITECTURES

OPERATIONS = [("adaln", "adaln"), ("adaln", "gated_residual"), ("adaln", "gated_residual_adaln")]
OPERATIONS += [("rms_norm", "rms_norm"), ("qk_norm_rope", "qk_norm_rope"), ("solver_step", "solver_step")]
OPERATIONS += [("patch_embed", "patch_embed"), ("patch_embed", "unpatchify")]
FILES = sorted(launches.FOLDER.glob("*.json"))
KINDS = ("descriptors", "warp_specialized")


def row(width: int | None, longest: int | None = None, dtypes: str = "bf16", **launch: Any) -> dict[str, Any]:
    return {"dtypes": dtypes.split(), "width": width, "longest": longest, "launch": launch}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(launches, "FOLDER", tmp_path)
    launches.table.cache_clear()
    yield tmp_path
    launches.table.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("name", "op"), OPERATIONS)
def test_every_call_that_a_launcher_admits_has_a_launch(name: str, op: str, arch: int) -> None:
    widths = (1, 64) if op == "solver_step" else (1, 512, 513, 1536, 5120, 16384)
    for dtype in ("bf16", "fp16", "fp32"):
        for width in widths:
            for length in (1, 75600, 2**31):
                assert launches.find(name, op, arch, dtype, width, length)["num_warps"] in (1, 2, 4, 8, 16)


def test_first_row_that_is_wide_and_long_enough_serves(folder: Path) -> None:
    table = [row(64, 10, num_warps=1), row(64, None, num_warps=2), row(None, None, "bf16 fp32", num_warps=4)]
    rows.write(folder / "mine.json", {"90": [*table, {"ops": ["other"], **row(None, num_warps=8)}]})

    def warps(dtype: str, width: int, length: int, op: str = "mine") -> int:
        return int(launches.find("mine", op, 90, dtype, width, length)["num_warps"])

    assert [warps("bf16", 64, 10), warps("bf16", 64, 11), warps("bf16", 65, 1), warps("fp32", 1, 1)] == [1, 2, 4, 4]
    assert warps("bf16", 64, 10, "other") == 8
    with pytest.raises(ValueError, match=r"no launch of mine in fp16 and width 64 for sm_90 in mine\.json"):
        warps("fp16", 64, 1)
    with launches.forced("mine", {"num_warps": 16}):
        assert (warps("fp16", 64, 1), warps("bf16", 64, 1, "other")) == (16, 8)
    assert warps("bf16", 64, 10) == 1


def test_entries_of_a_row_that_are_tritons_own_are_told_from_the_rest() -> None:
    launch = dict(block_m=64, num_warps=8, num_stages=2, maxnreg=128, descriptors=True)
    assert launches.options(launch) == dict(num_warps=8, num_stages=2, maxnreg=128)
    assert launches.options(launch | dict(maxnreg=None)) == dict(num_warps=8, num_stages=2)


def test_every_row_is_compiled_in_its_first_dtype_and_at_its_greatest_in_the_last(folder: Path) -> None:
    table = [row(64, num_warps=1, dtypes="bf16 fp32"), row(None, 9, num_warps=2), row(None, num_warps=4)]
    rows.write(folder / "mine.json", {"80": table})
    found = [(r.launch["num_warps"], dtype, width) for _, r, dtype, width in launches.points("mine", "mine", (48, 96))]
    assert found == [(1, "bf16", 48), (2, "bf16", 96), (4, "bf16", 96), (1, "fp32", 64)]


def test_device_that_kernels_do_not_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ValueError, match="kernels need sm_80 or newer, this is sm_75"):
        launches.arch_of(torch.device("cuda", 0))
    assert launches.arch_of(torch.device("cpu")) in ARCHITECTURES


# --- written ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_rows_stand_as_they_would_be_written(path: Path) -> None:
    """Or a search would move rows that it has not measured: those that serve a call stay those that did."""
    for arch, before in json.loads(path.read_text()).items():
        after = rows.merged(before, [], KINDS)
        assert rows.merged(after, [], KINDS) == after
        for one in (part for row in before for part in rows._split(row)):
            served, now = (rows.serving(table, one, KINDS) for table in (before, after))
            assert served is not None and now is not None and served["launch"] == now["launch"], (arch, one)


def test_found_row_takes_the_place_of_what_served_its_calls_and_nothing_elses() -> None:
    before = [row(64, num_warps=1, dtypes="bf16 fp16 fp32"), row(None, num_warps=8, dtypes="bf16 fp16 fp32")]
    found = [row(64, num_warps=2, dtypes="bf16 fp16") | {"measured": "a device"}, row(128, 10, num_warps=4)]
    assert rows.merged(before, found) == [
        found[0],
        found[1],
        row(None, num_warps=8, dtypes="bf16 fp16 fp32"),
        row(64, num_warps=1, dtypes="fp32"),
    ]


def test_rows_that_callers_choose_between_stand_side_by_side() -> None:
    before = [row(64, num_warps=8, descriptors=True), row(64, num_warps=4)]
    found = [row(64, num_warps=16)]
    assert rows.merged(before, found, KINDS) == [before[0], found[0]]
    assert rows.merged(before, found) == found, "else one serves the calls of all"


def test_one_architecture_is_rewritten_and_a_write_that_fails_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    rows.write(path, {"80": [row(64, num_warps=1)], "90": [row(64, num_warps=1)]})
    rows.rewrite(path, 90, [row(64, num_warps=2)])
    table = json.loads(path.read_text())
    assert table == {"80": [row(64, num_warps=1)], "90": [row(64, num_warps=2)]}
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        rows.rewrite(path, 90, [row(64, num_warps=4)])
    assert json.loads(path.read_text()) == table
