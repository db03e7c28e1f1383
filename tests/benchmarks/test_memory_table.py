"""The committed table of what fits on which card: true of this code, whole, and compared as it says."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skylapse.benchmarks.fits.command import FOLDER, PAGE, differences, fits
from skylapse.benchmarks.fits.compare import AGAIN, changes
from skylapse.benchmarks.fits.markdown import cells_of, markdown
from skylapse.benchmarks.fits.table import CARDS, ModelTable, read, tables, write
from skylapse.runtime.checkpoints.published import published
from skylapse.runtime.checkpoints.registry import published_folder


@pytest.fixture(scope="module")
def committed() -> list[ModelTable]:
    return [read(path) for path in sorted(FOLDER.glob("*.json"))]


@pytest.fixture
def table(committed: list[ModelTable]) -> ModelTable:
    return deepcopy(next(one for one in committed if "T2V-A14B" in one.model))


@pytest.mark.slow
def test_table_is_what_this_code_predicts() -> None:
    found = list(differences(FOLDER, list(tables())))
    told = "\n".join(str(change) for change in sorted(found, key=lambda change: not change.worse))
    if any(change.worse for change in found):
        pytest.fail(f"more memory is taken, or less fits:\n{told}\nif that is meant, {AGAIN}; say why in the commit")
    assert not found, f"the table is no longer true:\n{told}\n{AGAIN}"


def test_every_published_model_size_card_and_precision_has_a_row(committed: list[ModelTable]) -> None:
    expected = {
        (name, *size, quantize, card)
        for name in published()
        if (folder := published_folder(name)) is not None
        for size in folder.native_sizes
        for quantize in (None, "fp8")
        for card in CARDS
    }
    rows = [
        (table.model, row["width"], row["height"], row["quantize"], row["card_gb"])
        for table in committed
        for row in table.rows
    ]
    assert len(rows) == len(expected) and set(rows) == expected


def test_page_is_written_from_the_files(committed: list[ModelTable]) -> None:
    ordered = sorted(committed, key=lambda table: list(published()).index(table.model))
    assert (FOLDER / PAGE).read_text() == markdown(ordered)


def test_rows_add_up(committed: list[ModelTable]) -> None:
    for table in committed:
        parts = {record.pop("quantize"): record for record in deepcopy(table.parts)}
        held = {(one["quantize"], one["width"], one["height"]): one["held"] for one in table.peaks}
        for row in table.rows:
            there = held[row["quantize"], row["width"], row["height"]]
            there += sum(parts[row["quantize"]][part] for part in row["resident"])
            assert min(row["peak_bytes"].values()) >= there
            assert row["host_bytes"] == sum(parts[row["quantize"]][part] for part in row["moved"])
            blocked = row["blocked_by"]
            assert row["fits"] == (blocked is None) and (
                blocked is None or row["peak_bytes"][blocked] > row["budget_bytes"]
            )


@pytest.mark.parametrize(
    ("model", "size", "quantize", "card"),
    [
        ("Wan2.2-T2V-A14B", (1280, 720, 81), None, 80),
        ("Wan2.2-T2V-A14B", (1280, 720, 81), "fp8", 80),
        ("Wan2.1-T2V-1.3B", (832, 480, 81), None, 16),
        ("Wan2.2-TI2V-5B", (1280, 704, 121), None, 24),
    ],
)
def test_promised_clips_fit(
    committed: list[ModelTable], model: str, size: tuple[int, ...], quantize: str | None, card: int
) -> None:
    found = next(one for one in committed if model in one.model)
    row = next(
        row
        for row in found.rows
        if (row["width"], row["height"], row["num_frames"]) == size
        and (row["quantize"], row["card_gb"]) == (quantize, card)
    )
    assert row["fits"]


def test_larger_cards_fit_no_less(committed: list[ModelTable]) -> None:
    lines: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for table in committed:
        for row in table.rows:
            key = table.model, row["width"], row["height"], row["quantize"]
            lines.setdefault(key, []).append((row["card_gb"], row["max_frames"]))
    for line in lines.values():
        lengths = [length for _, length in sorted(line)]
        assert lengths == sorted(lengths)


@pytest.mark.parametrize(("factor", "worse"), [(1.02, None), (0.98, None), (1.04, True), (0.96, False)])
def test_peak_may_move_by_three_percent(table: ModelTable, factor: float, worse: bool | None) -> None:
    new = deepcopy(table)
    new.peaks[0]["step"]["together"] = int(factor * table.peaks[0]["step"]["together"])
    assert [change.worse for change in changes(table, new)] == ([] if worse is None else [worse])


def test_weights_that_grow_are_named(table: ModelTable) -> None:
    new = deepcopy(table)
    new.parts[1]["transformer_2"] *= 2
    (change,) = changes(table, new)
    assert change.worse and "fp8: transformer_2 grew from 14.594 GB to 29.188 GB (+100.0 %)" in change.words


def test_row_that_no_longer_fits_is_worse_and_one_that_fits_now_is_not(table: ModelTable) -> None:
    new, at = deepcopy(table), next(index for index, row in enumerate(table.rows) if row["fits"])
    new.rows[at] |= {"fits": False, "blocked_by": "step"}
    ((lost,), (won,)) = changes(table, new), changes(new, table)
    assert lost.worse and lost.words.endswith("fits no longer: blocked by step")
    assert not won.worse and won.words.endswith("fits now")


def test_row_that_fits_in_another_way_or_is_not_there_is_told(table: ModelTable) -> None:
    new = deepcopy(table)
    new.rows[0]["guidance"] = "never"
    del new.rows[1]
    found = [str(change) for change in changes(table, new)]
    assert any("guidance is 'never', not 'apart'" in words for words in found)
    assert any("bf16 1280x720x81 on 24 GB: in the table's rows, and made no more" in words for words in found)
    assert any("not in the table's rows" in str(change) for change in changes(new, table))


def test_another_assumption_is_told_and_another_torch_is_not(table: ModelTable) -> None:
    assert not list(changes(table, replace(table, assumptions=table.assumptions | {"torch": "99"})))
    (change,) = changes(table, replace(table, assumptions=table.assumptions | {"device_share": 0.5}))
    assert not change.worse and "0.5" in change.words


def test_models_without_a_file_and_files_without_a_model_are_told(table: ModelTable, tmp_path: Path) -> None:
    assert [str(one) for one in differences(tmp_path, [table])] == [f"{table.model}: no table wan2.2-t2v-a14b.json"]
    path = write(table, tmp_path)
    assert read(path) == table and not list(differences(tmp_path, [table]))
    path.rename(tmp_path / "another.json")
    assert len(list(differences(tmp_path, [table]))) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "skylapse.fits/1"}', '{"schema": "skylapse.benchmark/1"}'])
def test_file_that_is_no_table_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(content)
    with pytest.raises(ValueError, match=r"^wrong\.json must"):
        read(tmp_path / "wrong.json")


def test_command_writes_compares_and_leaves_no_old_file(
    table: ModelTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("skylapse.benchmarks.fits.command.tables", lambda: iter([table]))
    asked = ["--out", str(tmp_path)]
    (tmp_path / "old.json").write_text("{}")
    assert fits([*asked, "--check"]) == 1 and "no table" in capsys.readouterr().out
    assert fits(asked) == 0 and not (tmp_path / "old.json").exists()
    assert fits([*asked, "--check"]) == 0
    path = tmp_path / table.file_name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": []}))
    assert fits([*asked, "--check"]) == 1 and AGAIN in capsys.readouterr().out


def test_cells_say_how(table: ModelTable) -> None:
    line = next(line for line in cells_of(table) if line[1:3] == ("1280x720x81", "fp8"))
    cells = dict(zip(CARDS, line[3:], strict=True))
    assert cells[16] == "no: step" and cells[24].startswith("no: step (") and cells[192] == "yes"
    assert cells[32].startswith("moves text, ") and "experts" in cells[32]
