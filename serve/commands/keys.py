"""`skylapse keys`: API keys made, listed, rotated and revoked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ...runtime.commands.options import Parser
from ...runtime.core.config import Settings
from ..accounts.keys import SCOPES, ApiKey, KeyNotFound
from ..jobs.services import TENANT
from ..wire.admin_requests import show_key, state_of
from ..wire.requests import show_page
from .opening import account, add_place, open_store
from .table import iso, print_facts, print_json, print_table

DAY_S = 86400.0
COLUMNS = ("id", "name", "tenant", "scopes", "priority", "state", "created", "last used", "expires", "set by")


def keys(arguments: Sequence[str], settings: Settings) -> int:
    """Run one of the commands; a key that is not found is the user's mistake (ValueError)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyNotFound as error:
        raise ValueError(str(error)) from None
    return 0


def _create(options: argparse.Namespace) -> None:
    valid_s = None if options.days is None else options.days * DAY_S
    scopes = options.scope or SCOPES[:2]
    known: dict[str, Any] = dict(name=options.name, max_priority=options.max_priority, valid_s=valid_s)
    with open_store(options) as context:
        _show_new(options, *context.keys.create(options.tenant, scopes, **known, by=account()))


def _list(options: argparse.Namespace) -> None:
    with open_store(options) as context:
        found, _ = context.keys.page()
    if not options.all and not options.json:
        found = [key for key in found if state_of(key) == "valid"]
    if options.json:
        print_json(show_page([show_key(key) for key in found], has_more=False))
    else:
        print_table(COLUMNS, map(_row, found))


def _rotate(options: argparse.Namespace) -> None:
    with open_store(options) as context:
        _show_new(options, *context.keys.rotate(options.id, options.overlap_s, account()))


def _revoke(options: argparse.Namespace) -> None:
    with open_store(options) as context:
        if not context.keys.revoke(options.id, account()):
            raise KeyNotFound(f"there is no valid key {options.id!r}")
    if options.json:
        print_json({"id": options.id, "object": "key.deleted", "deleted": True})
    else:
        print(f"{options.id} is revoked")


def _show_new(options: argparse.Namespace, key: ApiKey, text: str) -> None:
    if options.json:
        print_json(show_key(key, text))
        return
    named = dict(zip(COLUMNS, _row(key), strict=True))
    print_facts(
        {name: named[name] for name in ("id", "name", "tenant", "scopes", "priority", "expires")} | {"key": text}
    )


def _row(key: ApiKey) -> tuple[Any, ...]:
    times = (iso(key.created_at), iso(key.last_used_at), iso(key.expires_at))
    return (key.id, key.name, key.tenant, key.scopes, key.max_priority, state_of(key), *times, key.managed_by)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse keys", description="Who may use the service.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    create = commands.add_parser("create", help="a new key, shown this once", allow_abbrev=False)
    create.add_argument("--name", metavar="TEXT", help="what it is for")
    create.add_argument("--tenant", default=TENANT, help="whose jobs and quotas (default: local)")
    create.add_argument("--scope", action="append", choices=SCOPES, help="default: read and write")
    create.add_argument("--max-priority", type=int, default=0, metavar="N", help="highest priority of its jobs")
    create.add_argument("--days", type=float, metavar="N", help="how long it is valid (default: for ever)")
    listing = commands.add_parser("list", help="valid keys, without their texts", allow_abbrev=False)
    listing.add_argument("--all", action="store_true", help="expired and revoked ones as well; --json has all")
    rotate = commands.add_parser("rotate", help="a new key in the place of one", allow_abbrev=False)
    rotate.add_argument("id", metavar="KEY_ID")
    rotate.add_argument(
        "--overlap-s", type=float, default=0.0, metavar="S", help="how long the old one stays valid (default: 0)"
    )
    revoke = commands.add_parser("revoke", help="end a key", allow_abbrev=False)
    revoke.add_argument("id", metavar="KEY_ID")
    for command, run in ((create, _create), (listing, _list), (rotate, _rotate), (revoke, _revoke)):
        command.set_defaults(run=run)
    add_place(create, listing, rotate, revoke)
    return parser
