"""`bench report`: what is on the page, what stands on which axis, and that nothing leaves the page."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made_up
import pytest
from made_up import around, comparison, measurement, report

from skylapse.benchmarks.fits.command import FOLDER
from skylapse.benchmarks.fits.table import read as read_table
from skylapse.benchmarks.fits.table import write as write_table
from skylapse.benchmarks.machine import in_words
from skylapse.benchmarks.record import Curve, write
from skylapse.benchmarks.report.charts import MOST_SERIES, Chart, Series, cdf, sections
from skylapse.benchmarks.report.load import collect
from skylapse.benchmarks.report.page import page
from skylapse.benchmarks.report.style import CSS, INK, MUTED, SERIES, SERIES_DARK
from skylapse.benchmarks.report.tables import table
from skylapse.benchmarks.track.history import append, line_of
from skylapse.cli import main

HOSTILE = '<script>alert("x")</script> & $a_{'


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for made in (made_up.goodput(), made_up.quality(), made_up.memory(), made_up.kernels()):
        write(made, folder / "cpu" / f"{made.benchmark}.json")
    for at, commit in enumerate(("aaaaaaa", "bbbbbbb", "ccccccc")):
        made = report("denoise", [measurement("denoise/64x64/exact", around(1 - 0.1 * at))], machine={"commit": commit})
        line = replace(line_of(made, "x", anyway=True), unpublishable=None if at != 1 else "no commit")
        append(folder / "cpu" / "denoise.jsonl", line)
    return folder


def test_lease_has_a_roofline_memory_checks_and_what_failed(tmp_path: Path) -> None:
    write(made_up.lease(), tmp_path / "gpu_lease.json")
    found = collect(tmp_path)
    drawn = sections(found)
    assert [section.key for section in drawn] == ["roofline", "memory"]
    assert drawn[1].charts[0].series[0].name == "step" and len(drawn[1].charts[0].series[0].points) == 2
    text = page(found, drawn)
    assert "1 of 2 checks right" in text and "partial, not run: tune" in text
    assert "vae/decode" in text and "check of attention, head 64" in text and "off by 0.5" in text
    assert "attention, small/torch" in text and "blocks/14B, one branch/bf16" in text
    assert "| adaln | small |" in table(made_up.lease()) and "| blocks/14B" in table(made_up.lease())


def charts(folder: Path) -> dict[str, list[Chart]]:
    return {section.key: section.charts for section in sections(collect(folder))}


# --- what stands where ------------------------------------------------------------------------------------------------


def test_every_kind_of_result_has_its_chart(results: Path) -> None:
    assert {key: len(found) for key, found in charts(results).items()} == {
        "latency": 1,
        "load": 1,
        "quality": 1,
        "roofline": 1,
        "memory": 1,
        "history": 1,
    }


def test_cdf_steps_up_at_each_sample() -> None:
    assert cdf("a", [3.0, 1.0, 2.0, 4.0]).points == [(1.0, 0.0), (1.0, 0.25), (2.0, 0.5), (3.0, 0.75), (4.0, 1.0)]


def test_curves_of_single_traces_are_parts_of_the_whole_ones(results: Path) -> None:
    (chart,) = charts(results)["load"]
    assert [series.name for series in chart.series] == ["skylapse", "ray_serve_diffusers"]
    assert [len(series.parts or ()) for series in chart.series] == [2, 2]


def test_curve_of_a_distribution_stands_with_the_latencies(tmp_path: Path) -> None:
    made = Curve(name="engine/poisson/continuous", x="latency, s", y="share of requests", points=[(1, 0.5), (2, 1)])
    write(report("engine", curves=[made]), tmp_path / "engine.json")
    assert [series.line for series in charts(tmp_path)["latency"][0].series] == ["steps"]
    assert "load" not in charts(tmp_path)


def test_quality_is_over_the_speed_up_of_the_same_way(results: Path) -> None:
    (chart,) = charts(results)["quality"]
    made = made_up.quality()
    speeds = {one.name.rpartition("/")[2]: one.spread.median for one in made.comparisons}
    decibels = {one.name.rpartition("/")[2]: one.spread.median for one in made.measurements}
    by_kind = {series.name: series for series in chart.series}
    assert set(by_kind) == {"cache", "quantize", "steps"} and by_kind["steps"].line == "line"
    assert by_kind["cache"].words == ["high", "balanced", "fast"]
    expected = [(speeds[f"cache={word}"], decibels[f"cache={word}"]) for word in ("high", "balanced", "fast")]
    assert by_kind["cache"].points == expected


def test_roofline_has_the_limits_that_were_measured(results: Path) -> None:
    (chart,) = charts(results)["roofline"]
    assert chart.guide is not None and chart.log_x and chart.log_y
    (low, slope), (knee, peak), (high, flat) = chart.guide
    assert knee == pytest.approx(9e10 / 4e10) and peak == flat == pytest.approx(90) and low < knee < high
    assert slope == pytest.approx(low * 40)
    assert [series.name for series in chart.series] == ["attention", "adaln"]  # what computes nothing is on no roofline
    ((intensity, rate),) = chart.series[0].points
    assert intensity == 10 and rate == pytest.approx(10**7 / 1e-3 / 1e9, rel=0.03)


def test_memory_is_measured_over_predicted(results: Path) -> None:
    (chart,) = charts(results)["memory"]
    (series,) = chart.series
    assert series.points == [(frames * 1.2e6 / 2**20, frames * 1.1e6 / 2**20) for frames in (5, 9, 17, 33)]


def test_tables_of_what_fits_are_shown(tmp_path: Path) -> None:
    write_table(next(read_table(path) for path in sorted(FOLDER.glob("*14b*.json"))), tmp_path / "memory")
    found = collect(tmp_path)
    assert not found.refused and not found.reports
    text = page(found, sections(found))
    assert "What fits on which card" in text and "<td>moves all; apart</td>" in text


def test_history_is_of_publishable_runs_and_relative_to_the_first(results: Path) -> None:
    (chart,) = charts(results)["history"]
    assert chart.ticks == {0.0: "aaaaaaa", 1.0: "ccccccc"}
    (series,) = chart.series
    assert [x for x, _ in series.points] == [0.0, 1.0]
    assert series.points[0][1] == 1.0 and series.points[1][1] == pytest.approx(0.8, abs=0.03)


def test_no_more_series_than_there_are_colours_and_the_rest_is_counted() -> None:
    chart = Chart("many", "x", "y", [Series(str(k), [(0.0, 0.0)]) for k in range(11)], "a.json")
    assert len(chart.series) == MOST_SERIES == len(SERIES) and chart.left_out == 3


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every tag and attribute, and whether tags are closed in order."""

    VOID = frozenset(("meta", "path", "use", "rect", "br", "link", "img"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and tag not in ("td", "th", "tr", "li"):
            while self.open and self.open[-1] in ("td", "th", "tr", "li"):
                self.open.pop()
            assert self.open.pop() == tag
        elif tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.words += data


def test_page_stands_by_itself_and_says_every_figure(results: Path, tmp_path: Path) -> None:
    asked = ["bench", "report", str(results), "-o", str(tmp_path / "page.html"), "--png", str(tmp_path / "png")]
    assert main(asked) == 0
    text = (tmp_path / "page.html").read_text()
    found = Page(text)
    assert found.open == [] and found.tags.count("svg") == 6
    assert all(address.startswith("#") for address in found.addresses)
    assert (
        {"script", "link", "img", "iframe"}.isdisjoint(found.tags) and "@import" not in text and "url(http" not in text
    )
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    for name in ("quality/psnr_pooled/cache=high", "goodput/load0.8/skylapse", "attention, small/torch", "aaaaaaa"):
        assert name in found.words
    pictures = sorted((tmp_path / "png").iterdir())
    assert [one.name for one in pictures] == [
        f"{key}.png" for key in ("history", "latency", "load", "memory", "quality", "roofline")
    ]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in pictures)


def test_colours_of_pictures_are_the_style_sheets(results: Path, tmp_path: Path) -> None:
    """So that they are other ones in the dark."""
    folder = tmp_path / "one"
    write(made_up.memory(), folder / "memory.json")
    assert main(["bench", "report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    picture = re.search(r"<svg.*?</svg>", (tmp_path / "page.html").read_text(), re.DOTALL)
    assert picture is not None and "var(--s0)" in picture[0] and not re.search(r"#[0-9a-f]{6}(?![0-9a-f])", picture[0])
    assert "prefers-color-scheme: dark" in CSS


def test_colours_can_be_read_on_light_and_on_dark() -> None:
    """WCAG's 4.5:1 against the cards they stand on."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        light, dark = sorted((luminance(a), luminance(b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in (*SERIES, INK, MUTED))
    assert all(contrast(colour, "#1a2027") >= 4.5 for colour in SERIES_DARK)


def test_text_of_a_file_is_text_on_the_page(tmp_path: Path) -> None:
    curve = Curve(name=f"{HOSTILE}/{HOSTILE}", x=HOSTILE, y=HOSTILE, points=[(1, 2), (2, 3)])
    made = report(
        HOSTILE,
        [measurement(HOSTILE, around(1.0))],
        [comparison(HOSTILE, around(1.0), of=HOSTILE)],
        [curve],
        machine={"device": HOSTILE, "commit": HOSTILE},
        partial=HOSTILE,
        failures={HOSTILE: HOSTILE},
    )
    write(made, tmp_path / "results" / "x.json")
    assert main(["bench", "report", str(tmp_path / "results"), "-o", str(tmp_path / "page.html")]) == 0
    found = Page((tmp_path / "page.html").read_text())
    assert "script" not in found.tags and HOSTILE in found.words


def test_same_results_make_the_same_page(tmp_path: Path) -> None:
    write(made_up.memory(), tmp_path / "results" / "memory.json")
    pages = []
    for name in ("one.html", "two.html"):
        assert main(["bench", "report", str(tmp_path / "results"), "-o", str(tmp_path / name)]) == 0
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_told_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    write(report("startup", [measurement("startup/cold", [1.0, 2.0])], partial="interrupted"), folder / "startup.json")
    (folder / "traffic.json").write_text('{"benchmark": "traffic"}')
    (folder / "half.json").write_text('{"schema": ')
    (folder / "old.jsonl").write_text("{}\n")
    assert main(["bench", "report", str(folder), "-o", str(tmp_path / "page.html")]) == 1
    told = capsys.readouterr()
    assert "left out: traffic.json: traffic.json must have schema" in told.err
    assert "left out: half.json: half.json must be JSON" in told.err and "left out: old.jsonl" in told.err
    assert "1 results, 0 plots, 3 files left out" in told.out
    words = Page((tmp_path / "page.html").read_text()).words
    assert "startup/cold" in words and "traffic.json must have schema" in words and "partial, interrupted" in words


def test_folder_without_results_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    assert main(["bench", "report", str(tmp_path / "none")]) == 2
    assert "must have results" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(made_up.memory(), tmp_path / "results" / "memory.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "report", str(tmp_path / "results"), "-o", str(tmp_path / "page.html")]) == 2
    assert "pip install 'skylapse[bench]'" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("threads", "words"), [(1, "cpu, 1 thread"), (2, "cpu, 2 threads")])
def test_one_thread_is_no_threads(threads: int, words: str) -> None:
    assert in_words({"device": "cpu", "threads": threads}) == words
