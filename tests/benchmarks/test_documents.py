"""Documents say what the committed results say: docs/benchmarks.md, and figures that others take from them."""

from __future__ import annotations

from pathlib import Path

import made_up
import pytest
from made_up import around, comparison, measurement, report

from skylapse.benchmarks.fits.table import read as read_fits
from skylapse.benchmarks.record import write
from skylapse.benchmarks.report.blocks import Blocks
from skylapse.benchmarks.report.document import main
from skylapse.benchmarks.report.tables import figure, table
from skylapse.runtime.checkpoints.published import published


def test_committed_documents_are_those_of_the_committed_results(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run `python -m skylapse.benchmarks.report.document` where this fails."""
    assert main(["--check", "--root", str(root)]) == 0, capsys.readouterr()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    cpu = tmp_path / "benchmarks" / "results" / "cpu"
    found = [measurement("startup/cold", [2.0, 2.0, 2.1, 2.1, 2.2, 2.2, 2.3])]
    write(report("startup", found, [comparison("startup/cold", around(2.5), of="diffusers")]), cpu / "startup.json")
    write(made_up.kernels(), cpu / "kernels.json")
    write(
        report("memory", [measurement("memory/peak", [3 * 2**20], "bytes")], partial="interrupted"), cpu / "memory.json"
    )
    (cpu / "traffic.json").write_text("{}")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "engine.md").write_text("No figures here.\n")
    (tmp_path / "README.md").write_text(
        "It takes <!-- figure: cpu/startup.json | startup/cold | {median:.0f} ms, n {n} | 1000 -->?<!-- /figure -->\n"
        "<!-- figure: cpu/startup.json | startup/cold: diffusers / ours | {median:.1f}x -->9x<!-- /figure -->\n\n"
        "<!-- table: cpu/startup.json | startup/ -->\nold\n<!-- /table -->\n\nThe end.\n"
    )
    return tmp_path


def test_figures_and_tables_are_filled_in_place_and_drift_is_found(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--root", str(tree)]
    assert main([*asked, "--check"]) == 1
    assert "README.md: is not what the results say" in capsys.readouterr().out
    assert not (tree / "docs" / "benchmarks.md").exists()
    assert main(asked) == 0
    text = (tree / "README.md").read_text()
    assert "| 1000 -->2100 ms, n 7<!-- /figure -->" in text and "{median:.1f}x -->2.5x<!-- /figure -->" in text
    assert "| startup/cold | 2.10 s | 2.05 to 2.20 | 2.00 to 2.30 | 7 |" in text and "\nold\n" not in text
    assert text.endswith("<!-- /table -->\n\nThe end.\n")
    assert main([*asked, "--check"]) == 0
    (tree / "README.md").write_text(text.replace("2100 ms", "1900 ms"))
    assert main([*asked, "--check"]) == 1
    assert "1900 ms" in (tree / "README.md").read_text()  # a check writes nothing
    assert main(asked) == 0 and (tree / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("figure: cpu/none.json | a | {median} -->", "cpu/none.json is not among the results"),
        ("figure: cpu/startup.json | startup/warm | {median} -->", "has no figure 'startup/warm'"),
        ("figure: cpu/startup.json | startup/cold -->", "a figure must be FILE | NAME | FORMAT"),
        ("figure: cpu/startup.json | startup/cold | {speed} -->", "'speed'"),
        ("figure: cpu/memory.json | memory/peak | {low:.1f} -->", "unsupported format string"),
        ("figure: cpu/traffic.json | a | {median} -->", "must have schema"),
    ],
)
def test_figure_that_is_not_there_is_named_and_left_alone(
    tree: Path, block: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"<!-- {block}as it was<!-- /figure -->\n"
    (tree / "README.md").write_text(text)
    assert main(["--root", str(tree)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("cannot be filled: README.md: ") and said in told
    assert (tree / "README.md").read_text() == text


def test_page_has_every_file_and_says_what_it_is_not(tree: Path) -> None:
    assert main(["--root", str(tree)]) == 0
    page = (tree / "docs" / "benchmarks.md").read_text()
    assert (
        "| [cpu/startup.json](../benchmarks/results/cpu/startup.json) | startup | cpu (made up) | 1 | abc1234 | yes |"
        in page
    )
    assert "no: partial, interrupted" in page and "**Not publishable**" in page
    assert "| memory/peak | 3.00 MiB |" in page and "| attention | small |" in page
    assert "Older files" in page and "[cpu/traffic.json]" in page
    for engine in ("SGLang", "vLLM-Omni", "FastVideo", "TensorRT-LLM VisualGen", "xDiT", "LightX2V"):
        assert f"| {engine}" in page.partition("## What was not compared")[2]


def test_suites_with_a_table_of_their_own_are_shown_by_it() -> None:
    found = [
        measurement(f"quality/{metric}/cache=high", around(value), better="higher")
        for metric, value in (
            ("psnr_pooled", 48.4),
            ("evaluations", 17.5),
            ("psnr_mean", 48.7),
            ("psnr_worst", 45.0),
            ("psnr_motion", 49.0),
            ("ssim_mean", 0.9979),
            ("ssim_p5", 0.99),
            ("flicker", 1.0),
            ("spectrum", 0.1),
        )
    ]
    own = table(report("quality", found, [comparison("quality/denoise/cache=high", around(1.7))])).splitlines()
    assert "fewer steps'" in own[0] and own[2].startswith("| `high` | 17.5 | 1.7")
    assert "| quality/psnr_pooled/cache=high | 4" in table(made_up.quality())  # a run that ended early has less
    with pytest.raises(ValueError, match="no figure of goodput begins with 'nothing'"):
        table(made_up.goodput(), "nothing")


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (12.345, "12.3"), (0.012345, "0.0123"), (-0.5, "-0.500"), (0.0, "0")]
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_models_are_a_line_each_with_the_smallest_cards_that_fit(root: Path) -> None:
    blocks = Blocks(root / "benchmarks" / "results")
    lines = blocks.filled("<!-- models: memory -->\nold\n<!-- /models -->\n", "README.md").splitlines()
    assert blocks.wrong == [] and lines[1].startswith("| hub id |") and lines[-1] == "<!-- /models -->"
    rows = {cells[1].strip(" `"): cells for line in lines[3:-1] if (cells := line.split("|"))}
    assert list(rows) == list(published())
    for model, cells in rows.items():
        table = next(one for path in blocks.results.glob("memory/*.json") if (one := read_fits(path)).model == model)
        least, whole, fp8 = (int(cell.split()[0]) for cell in cells[4:7])
        fits = {
            (row["card_gb"], row["quantize"], not row["moved"])
            for row in table.rows
            if row["fits"] and f"{row['width']}x{row['height']}," in cells[3]
        }
        assert least == min(card for card, quantize, _ in fits if quantize is None) and whole >= least
        assert (whole, None, True) in fits and fp8 == min(card for card, quantize, _ in fits if quantize == "fp8")
    assert "first and last frame |" in "|".join(rows["Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"])
    assert "an image" not in rows["Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"][2]


def test_section_of_another_document_comes_without_its_comments(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "docs" / "performance.md").write_text(
        "# Fast\n\n## In short\n\n"
        "In <!-- figure: cpu/startup.json | startup/cold | {median:.0f} s -->9 s<!-- /figure -->.\n\n## More\n"
    )
    text = "<!-- from: docs/performance.md | In short -->\nold\n<!-- /from -->\n"
    (tree / "README.md").write_text(text)
    assert main(["--root", str(tree)]) == 0
    assert (tree / "README.md").read_text() == text.replace("old", "In 2 s.")
    for wrong, said in (("docs/performance.md | Long", "no heading 'Long'"), ("docs/none.md | A", "none.md")):
        (tree / "README.md").write_text(text.replace("docs/performance.md | In short", wrong))
        assert main(["--root", str(tree)]) == 1
        assert said in capsys.readouterr().err
