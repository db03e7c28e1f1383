"""Tables of what the service names: its metrics, and the Xids that it knows, as docs/monitoring.md has them."""

from __future__ import annotations

from ...serve.core.metric_definitions import METRICS
from ...serve.engine.xids import XIDS, Xid


def metrics_table(kind: str) -> str:
    """Lines of Markdown: the metrics of a kind (counter, histogram, gauge), their labels, and what they are."""
    found = [metric for metric in METRICS.values() if metric.kind == kind]
    if not found:
        raise ValueError(f"metrics must be counter, histogram or gauge, got {kind!r}")
    lines = ["| metric | labels | |", "|---|---|---|"]
    for metric in found:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


def xids_table(which: str) -> str:
    """Lines of Markdown: the Xids that drain an engine (drain), or that are told alone (tell)."""
    if which not in ("drain", "tell"):
        raise ValueError(f"xids must be drain or tell, got {which!r}")
    found = {code: xid for code, xid in XIDS.items() if xid.drains == (which == "drain")}
    lines = ["| Xid | NVIDIA calls it | NVIDIA's immediate action | |", "|---|---|---|---|"]
    return "\n".join([*lines, *(_xid_line(code, xid) for code, xid in found.items())]) + "\n"


def _xid_line(code: int, xid: Xid) -> str:
    return f"| {code} | {xid.what} | {f'`{xid.action}`' if xid.action else 'none named'} | {xid.why} |"
