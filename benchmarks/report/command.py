"""`bench report`: a folder of results becomes a page with plots.

skylapse bench report                                  # benchmarks/results into bench-results/report.html
skylapse bench report bench-results -o page.html --png docs/plots
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ...runtime.commands.options import Parser
from ...runtime.media.writer import replaced_when_complete
from ..track.history import RESULTS
from .charts import sections
from .draw import png
from .load import collect
from .page import page


def report(arguments: Sequence[str]) -> int:
    """1 where a file could not be read; the others are on the page all the same."""
    parser = Parser(prog="skylapse bench report", description="a page of a folder of results, with plots")
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="default: the committed results")
    parser.add_argument("-o", "--out", type=Path, default=Path("bench-results/report.html"), metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="each plot as a picture of its own, too")
    options = parser.parse_args(arguments)
    found = collect(options.folder)
    for path, why in found.refused.items():
        print(f"left out: {path}: {why}", file=sys.stderr)
    drawn = sections(found)
    text = page(found, drawn)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(options.out) as unfinished:
        unfinished.write_text(text)
    charts = [chart for section in drawn for chart in section.charts]
    if options.png:
        options.png.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            png(chart, options.png / f"{chart.key}.png")
    print(f"{options.out}: {len(found.reports)} results, {len(charts)} plots, {len(found.refused)} files left out")
    return int(bool(found.refused))
