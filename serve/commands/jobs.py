"""`skylapse jobs`: jobs of all tenants, listed, shown, cancelled and tried again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ...runtime.commands.options import Parser
from ...runtime.core.config import Settings
from ..jobs.retry import retry
from ..store.jobs import Job, NotFound
from ..store.tables import FAILED, STATES
from ..wire.admin_requests import show_job
from ..wire.requests import percent, show_page
from .opening import account, add_place, open_store
from .table import iso, print_facts, print_json, print_table

MAX_ROWS = 1000
COLUMNS = ("id", "tenant", "state", "done", "model", "size", "seconds", "priority", "created", "ended", "error")
TIMES = ("created_at", "started_at", "ended_at")


def jobs(arguments: Sequence[str], settings: Settings) -> int:
    """Run one of the commands; a job that is not found is the user's mistake (ValueError)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except NotFound:
        raise ValueError(f"there is no job {(options.id or options.after)!r}") from None
    return 0


def _list(options: argparse.Namespace) -> None:
    if not 1 <= options.limit <= MAX_ROWS:
        raise ValueError(f"limit must be from 1 to {MAX_ROWS}, got {options.limit}")
    wanted = dict(tenant=options.tenant, state=options.state, model=options.of_model)
    with open_store(options) as context:
        found, has_more = context.all_jobs.page(options.limit, options.after, **wanted)
    if options.json:
        print_json(show_page([show_job(job) for job in found], has_more))
        return
    print_table(COLUMNS, map(_row, found))
    if has_more:
        print(f"there are more: --after {found[-1].id}")


def _show(options: argparse.Namespace) -> None:
    with open_store(options) as context:
        _answer(options, context.all_jobs.get(options.id))


def _cancel(options: argparse.Namespace) -> None:
    with open_store(options) as context:
        job = context.all_jobs.get(options.id)
        if job.has_ended:
            raise ValueError(f"job {job.id} has ended: it is {job.state}")
        _answer(options, context.jobs.cancel(job.tenant, job.id, account()))


def _retry(options: argparse.Namespace) -> None:
    with open_store(options) as context:
        _answer(options, retry(context, context.all_jobs.get(options.id), account()))


def _answer(options: argparse.Namespace, job: Job) -> None:
    shown = show_job(job)
    if options.json:
        print_json(shown)
        return
    shown |= {name: iso(getattr(job, name)) for name in TIMES}
    if (error := shown["error"]) is not None:
        shown["error"] = f"{error['code']}: {error['message']}"
    print_facts({name: value for name, value in shown.items() if name != "object"})


def _row(job: Job) -> tuple[Any, ...]:
    asked = job.request
    code = job.error_code if job.state == FAILED else None
    facts = (asked.get("model"), asked.get("size"), asked.get("seconds"), job.priority)
    return (job.id, job.tenant, job.state, f"{percent(job)}%", *facts, iso(job.created_at), iso(job.ended_at), code)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse jobs", description="Jobs of all tenants.", allow_abbrev=False)
    parser.set_defaults(id=None, after=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="the newest jobs", allow_abbrev=False)
    listing.add_argument("--tenant", metavar="NAME")
    listing.add_argument("--state", choices=STATES)
    listing.add_argument("--model", metavar="NAME", dest="of_model", help="as clients name it")
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="default: 50")
    listing.add_argument("--after", metavar="JOB_ID", help="go on behind this one")
    show = commands.add_parser("show", help="one job", allow_abbrev=False)
    cancel = commands.add_parser("cancel", help="end a job that is not finished", allow_abbrev=False)
    again = commands.add_parser("retry", help="make a failed job again, as a new one", allow_abbrev=False)
    for command in (show, cancel, again):
        command.add_argument("id", metavar="JOB_ID")
    for command, run in ((listing, _list), (show, _show), (cancel, _cancel), (again, _retry)):
        command.set_defaults(run=run)
    add_place(listing, show, cancel, again)
    return parser
