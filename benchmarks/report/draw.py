"""Charts as pictures, by matplotlib: SVG for the page, whose colours its style sheet decides, and PNG for documents."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from .charts import Chart
from .style import INK, MARKS, MUTED, RULE, SERIES

INCHES = (5.2, 3.4)
PLOT = {
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",  # text stays text: it is found, read aloud, and in the page's own letters
    "svg.hashsalt": "skylapse",  # the same results make the same file
    "text.color": INK,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def svg(chart: Chart) -> str:
    """An <svg> element without a legend, which is the page's."""
    plt = _matplotlib()
    with plt.rc_context(PLOT):
        figure = _figure(plt, chart)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z]+\d*_\d+"', "", text)  # groups that nothing refers to, the same in every picture
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for colour, variable in {INK: "ink", MUTED: "muted", RULE: "rule", **_variables()}.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def png(chart: Chart, path: Path) -> None:
    """On white, with title and legend."""
    plt = _matplotlib()
    with plt.rc_context(PLOT | {"figure.facecolor": "white", "axes.facecolor": "white"}):
        figure = _figure(plt, chart)
        (axes,) = figure.axes
        axes.set_title(chart.title, fontsize=11, loc="left", color=INK)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
        figure.savefig(path, format="png", dpi=160, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)


def _figure(plt: Any, chart: Chart) -> Any:
    figure, axes = plt.subplots(figsize=INCHES, layout="constrained")
    if chart.guide:
        xs, ys = zip(*chart.guide, strict=True)
        axes.plot(xs, ys, color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
    for index, series in enumerate(chart.series):
        xs, ys = zip(*series.points, strict=True)
        look: dict[str, Any] = {"color": SERIES[index], "label": series.name, "zorder": 3}
        for part in series.parts or ():
            axes.plot(*zip(*part, strict=True), color=SERIES[index], linewidth=0.9, alpha=0.45, zorder=2)
        if series.line == "steps":
            axes.step(xs, ys, where="post", **look)
            continue
        for (x, y), words in zip(series.points, series.words or (), strict=False):
            axes.annotate(words, (x, y), (5, 5), textcoords="offset points", fontsize=8, color=MUTED)
        look |= {"marker": MARKS[index][0], "linestyle": "-" if series.line == "line" else "none"}
        if series.errors is not None:
            axes.errorbar(xs, ys, yerr=list(zip(*series.errors, strict=True)), elinewidth=1, capsize=2, **look)
        else:
            axes.plot(xs, ys, **look)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    if chart.log_x:
        axes.set_xscale("log")
        _plain(plt, axes.xaxis)
    if chart.log_y:
        axes.set_yscale("log")
        _plain(plt, axes.yaxis)
    if chart.ticks is not None:
        step = max(1, len(chart.ticks) // 6)
        shown = dict(list(chart.ticks.items())[::step])
        axes.set_xticks(list(shown), list(shown.values()))
    if not (chart.log_y or chart.ticks or chart.guide) and min(y for one in chart.series for _, y in one.points) >= 0:
        low, high = axes.get_ylim()
        if low < 0.5 * high:  # near zero anyway: from zero, so that lengths can be compared
            axes.set_ylim(0, high)
    return figure


def _plain(plt: Any, axis: Any) -> None:
    """Plain numbers: matplotlib's powers of ten are formulas, and names here are not to be read as such."""
    axis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(plt.NullFormatter())


def _variables() -> dict[str, str]:
    return {colour: f"s{index}" for index, colour in enumerate(SERIES)}


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots must have matplotlib, which is not installed: pip install 'skylapse[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
