"""`skylapse usage`: prints the usage of tenants by day, tenant and model, read from the store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

from ...runtime.commands.options import Parser
from ...runtime.core.config import Settings
from ..accounts.usage import GROUPS, Asked, Bucket, parse_day, parse_groups, read_usage
from ..http.routes.usage import DAYS, show_bucket, show_usage
from .opening import add_place, open_store
from .table import print_json, print_table

COLUMNS = (*GROUPS, "jobs", "completed", "failed", "engine_seconds", "video_seconds", "cost")


def usage(arguments: Sequence[str], settings: Settings) -> int:
    """Print sums of the ledger."""
    options = _parser().parse_args(arguments)
    last = _day("--to", options.to) or datetime.now(UTC).date()
    first = _day("--from", options.start) or last - timedelta(days=DAYS - 1)
    if first > last:
        raise ValueError(f"--from must not be after --to, got {first} and {last}")
    asked = Asked(start=first, end=last, by=parse_groups("--by", options.by), tenant=options.tenant)
    with open_store(options) as context:
        buckets, has_more = read_usage(context.database, asked)
    if options.json:
        print_json(show_usage(buckets, has_more))
    else:
        _show(buckets, asked.by)
    return 0


def _day(name: str, text: str | None) -> date | None:
    return None if text is None else parse_day(name, text)


def _show(buckets: Sequence[Bucket], by: Sequence[str]) -> None:
    shown = [show_bucket(bucket) for bucket in buckets]
    for bucket in shown:
        if cost := bucket["cost"]:
            bucket["cost"] = f"{cost['amount']} {cost['currency']}"
    columns = [name for name in COLUMNS if name not in GROUPS or name in by]
    print_table(columns, ([bucket[name] for name in columns] for bucket in shown))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse usage", description="What tenants have used, by the ledger.", allow_abbrev=False)
    option = parser.add_argument
    option("--from", dest="start", metavar="DAY", help=f"the first day, by UTC (default: {DAYS} days back)")
    option("--to", metavar="DAY", help="the last day, by UTC (default: today)")
    option("--by", default="day", metavar="GROUPS", help=f"of {', '.join(GROUPS)}, with commas between (default: day)")
    option("--tenant", metavar="NAME", help="of one tenant (default: of all)")
    add_place(parser)
    return parser
