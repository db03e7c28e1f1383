"""One page of all results that stands by itself: style, pictures and tables inside, nothing is asked of a network."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from ..fits.markdown import cells_of
from ..fits.table import CARDS
from ..machine import in_words
from ..record import KernelResult
from ..track.compare import Figure, figures, reasons
from .charts import Chart, Section
from .draw import svg
from .load import AnyResult, Found
from .style import CSS, MARKS

NOTHING = "connect-src 'none'; default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # nothing is loaded or run


def page(found: Found, sections: list[Section]) -> str:
    links = "".join(f'<a href="#{section.key}">{escape(section.title)}</a>' for section in sections)
    fits = '<a href="#fits">What fits</a>' if found.fits else ""
    body = [
        "<h1>skylapse benchmarks</h1>",
        f'<p class="muted">Results: {len(found.reports)}, histories: {len(found.histories)}.'
        " Every figure is a median with its interval of 95 %.</p>",
        f'<nav><a href="#runs">Runs</a>{links}{fits}<a href="#figures">All figures</a></nav>',
        _refused(found),
        _runs(found),
        '<div class="sections">',
        *(_section(section) for section in sections),
        "</div>",
        _fits(found),
        '<h2 id="figures">All figures</h2>',
        *(_figures(path, report) for path, report in found.reports.items()),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(NOTHING)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>skylapse benchmarks</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _refused(found: Found) -> str:
    if not found.refused:
        return ""
    rows = "".join(f"<tr><td>{escape(path)}</td><td>{escape(why)}</td></tr>" for path, why in found.refused.items())
    return (
        '<h2 class="bad">Files that could not be read</h2>'
        f'<div class="card scroll"><table><tr><th>file</th><th>why</th></tr>{rows}</table></div>'
    )


def _fits(found: Found) -> str:
    if not found.fits:
        return ""
    names = ("model", "clip", "weights", *(f"{card} GB" for card in CARDS))
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = (line for table in found.fits.values() for line in cells_of(table))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return (
        '<h2 id="fits">What fits on which card</h2>'
        '<p class="muted">Guided clips of native size, predicted from shapes: nothing of it was measured on a GPU.</p>'
        f'<div class="card scroll"><table><tr>{head}</tr>{rows}</table></div>'
    )


def _runs(found: Found) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("file", "benchmark", "device", "commit", "run", "publishable"))
    rows = "".join(f"<tr>{''.join(_run(path, report))}</tr>" for path, report in found.reports.items())
    return f'<h2 id="runs">Runs</h2><div class="card scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _run(path: str, report: AnyResult) -> Iterator[str]:
    machine = report.machine
    yield f"<td>{escape(path)}</td><td>{escape(report.benchmark)}</td>"
    yield f"<td>{escape(in_words(machine))}</td>"
    yield f"<td>{escape(str(machine.get('commit') or 'none'))}</td>"
    failed = len(reasons(report))
    words = f"{'quick, ' if report.quick else ''}{report.elapsed_s:.0f} s{f', {failed} failed' if failed else ''}"
    if isinstance(report, KernelResult) and report.checks:
        words += f", {sum(check.status == 'ok' for check in report.checks)} of {len(report.checks)} checks right"
    yield f"<td class='once'>{words}</td><td>{_publishable(report)}</td>"


def _publishable(report: AnyResult) -> str:
    if report.partial is not None:
        return f'<span class="bad">no: partial, {escape(report.partial)}</span>'
    if report.is_publishable:
        return '<span class="good">yes</span>'
    return '<span class="bad">no: of no clean commit</span>'


def _section(section: Section) -> str:
    charts = "".join(_chart(chart) for chart in section.charts)
    wide = ' class="wide"' if len(section.charts) > 1 else ""
    return (
        f'<section{wide}><h2 id="{section.key}">{escape(section.title)}</h2><p class="muted">{escape(section.text)}</p>'
        f'<div class="charts">{charts}</div></section>'
    )


def _chart(chart: Chart) -> str:
    label = escape(f"{chart.title}: {chart.y} over {chart.x}", quote=True)
    picture = svg(chart).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    names = "".join(
        f'<li><span style="color:var(--s{index})" aria-hidden="true">'
        f"{'━' if one.line == 'steps' else MARKS[index][1]}</span> {escape(one.name)}</li>"
        for index, one in enumerate(chart.series)
    )
    more = f"<li>and {chart.left_out} more in the file</li>" if chart.left_out else ""
    return (
        f"<figure><h3>{escape(chart.title)}</h3>{picture}"
        f'<ul class="legend">{names}{more}</ul><figcaption>{escape(chart.source)}</figcaption></figure>'
    )


def _figures(path: str, report: AnyResult) -> str:
    head = '<tr><th>name</th><th class="number">median</th><th>unit</th><th class="number">95 %</th>'
    rows = "".join(_row(name, figure) for name, figure in figures(report).items())
    failed = "".join(
        f'<tr><td>{escape(name)}</td><td class="bad" colspan="4">failed: {escape(why)}</td></tr>'
        for name, why in reasons(report).items()
    )
    return (
        f"<details><summary>{escape(path)}</summary><div class='card scroll'>"
        f'<table>{head}<th class="number">n</th></tr>{rows}{failed}</table></div></details>'
    )


def _row(name: str, figure: Figure) -> str:
    spread = figure.spread
    interval = "" if spread.low is None or spread.high is None else f"{spread.low:.4g} to {spread.high:.4g}"
    return (
        f'<tr><td>{escape(name)}</td><td class="number">{spread.median:.4g}</td><td>{escape(figure.unit)}</td>'
        f'<td class="number">{interval}</td><td class="number">{spread.n}</td></tr>'
    )
