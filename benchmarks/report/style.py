"""How the page looks: colours that keep 4.5:1 of contrast on light and dark, and its style sheet."""

from __future__ import annotations

INK, MUTED, RULE = "#1b2430", "#56616e", "#d5dbe2"
SERIES = ("#1f5fa8", "#b4540a", "#1d7a4c", "#7a3fa0", "#b3264e", "#0b7285", "#6b5b16", "#4a4f57")
SERIES_DARK = ("#7fb4f0", "#f0a35e", "#6fcf9b", "#c79bec", "#f28ba8", "#63cbdd", "#d8c05a", "#b8bfc8")
MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))

_LIGHT = "".join(f"--s{index}:{colour};" for index, colour in enumerate(SERIES))
_DARK = "".join(f"--s{index}:{colour};" for index, colour in enumerate(SERIES_DARK))

CSS = f"""
:root {{ color-scheme: light dark; --ink:{INK}; --muted:{MUTED}; --rule:{RULE}; --page:#f6f7f9; --card:#ffffff;
  --good:#1d7a4c; --bad:#b3264e; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink:#e8ecf1; --muted:#a3adb9; --rule:#37404b; --page:#12161b;
  --card:#1a2027; --good:#6fcf9b; --bad:#f28ba8; {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0 0 4px; }}
h2 {{ font-size: 1.2rem; margin: 40px 0 4px; }}
h3 {{ font-size: .95rem; margin: 0 0 8px; overflow-wrap: anywhere; }}
p {{ margin: 0 0 12px; max-width: 70ch; }}
.muted, figcaption, .source {{ color: var(--muted); font-size: .85rem; }}
nav {{ margin: 16px 0 0; display: flex; flex-wrap: wrap; gap: 4px 16px; }}
a {{ color: var(--s0); }}
.sections {{ display: grid; gap: 0 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); }}
section {{ min-width: 0; }} .wide {{ grid-column: 1 / -1; }} .once {{ white-space: nowrap; }}
.charts {{ display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); }}
figure, .card {{ margin: 0; padding: 16px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  min-width: 0; }}
figure svg {{ display: block; width: 100%; height: auto; font-family: inherit; }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0 0; padding: 0;
  font-size: .85rem; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .88rem; }}
th, td {{ text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }}
th {{ color: var(--muted); font-weight: 600; white-space: nowrap; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
tr:last-child td {{ border-bottom: 0; }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); }}
details {{ margin: 8px 0; }} summary {{ cursor: pointer; padding: 6px 0; overflow-wrap: anywhere; }}
"""
