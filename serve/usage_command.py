"""`skylapse usage`: prints the usage of tenants by day, tenant and model, read from the store."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from ..runtime.config import Settings
from ..runtime.options import Parser
from .config import ServeConfig
from .context import open_context
from .routes.usage import DAYS, show_bucket, show_usage
from .store.database import Database
from .store.usage import GROUPS, Asked, Bucket, parse_day, parse_groups, read_usage

COLUMNS = (*GROUPS, "jobs", "completed", "failed", "engine_seconds", "video_seconds", "cost")


def usage(arguments: Sequence[str], settings: Settings) -> int:
    """Print sums of the ledger."""
    options = _parser().parse_args(arguments)
    last = _day("--to", options.to) or datetime.now(UTC).date()
    first = _day("--from", options.start) or last - timedelta(days=DAYS - 1)
    if first > last:
        raise ValueError(f"--from must not be after --to, got {first} and {last}")
    asked = Asked(start=first, end=last, by=parse_groups("--by", options.by), tenant=options.tenant)
    buckets, has_more = read_usage(_open(options.data, settings), asked)
    if options.json:
        print(json.dumps(show_usage(buckets, has_more)))
    else:
        _print_table(buckets, asked.by)
    return 0


def _day(name: str, text: str | None) -> date | None:
    return None if text is None else parse_day(name, text)


def _open(data: str, settings: Settings) -> Database:
    """Open the store that is there; one made by this command would be an empty one beside the service's."""
    config = ServeConfig(data=data)
    if not settings.database_url and not (path := Path(config.folder / "jobs.db")).exists():
        raise ValueError(f"--data must be a service's folder, got {data!r}: {path} is not there")
    return open_context(config).database


def _print_table(buckets: Sequence[Bucket], by: Sequence[str]) -> None:
    shown = [show_bucket(bucket) for bucket in buckets]
    columns = [name for name in COLUMNS if name not in GROUPS or name in by]
    rows = [columns]
    for bucket in shown:
        cost = bucket["cost"]
        bucket["cost"] = f"{cost['amount']} {cost['currency']}" if cost else "-"
        rows.append([str(bucket[name]) for name in columns])
    widths = [max(len(row[number]) for row in rows) for number in range(len(columns))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse usage", description="What tenants have used, by the ledger.", allow_abbrev=False)
    option = parser.add_argument
    option("--from", dest="start", metavar="DAY", help=f"the first day, by UTC (default: {DAYS} days back)")
    option("--to", metavar="DAY", help="the last day, by UTC (default: today)")
    option("--by", default="day", metavar="GROUPS", help=f"of {', '.join(GROUPS)}, with commas between (default: day)")
    option("--tenant", metavar="NAME", help="of one tenant (default: of all)")
    option("--data", default="skylapse-data", metavar="DIR", help="default: skylapse-data")
    option("--json", action="store_true", help="one JSON object, as GET /v1/usage answers")
    return parser
