"""`skylapse keys`: API keys made, listed and revoked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ...runtime.config import Settings
from ...runtime.options import Parser
from ..config import ServeConfig
from ..context import TENANT, open_context
from ..store.keys import SCOPES


def keys(arguments: Sequence[str], settings: Settings) -> int:
    """Make, list and revoke API keys."""
    options = _keys_parser().parse_args(arguments)
    store = open_context(ServeConfig(data=options.data)).keys
    if options.command == "create":
        valid_s = None if options.days is None else options.days * 86400.0
        key, text = store.create(
            options.tenant, options.scope or SCOPES[:2], max_priority=options.max_priority, valid_s=valid_s
        )
        print(json.dumps({"id": key.id, "tenant": key.tenant, "scopes": key.scopes, "key": text}))
    elif options.command == "list":
        for key in store.page():
            times = {"created_at": key.created_at, "expires_at": key.expires_at, "revoked_at": key.revoked_at}
            print(json.dumps({"id": key.id, "tenant": key.tenant, "scopes": key.scopes, **times}))
    elif not store.revoke(options.id):
        raise ValueError(f"there is no valid key {options.id!r}")
    return 0


def _keys_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse keys", description="Who may use the service.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    create = commands.add_parser("create", help="a new key, shown this once", allow_abbrev=False)
    create.add_argument("--tenant", default=TENANT, help="whose jobs and quotas (default: local)")
    create.add_argument("--scope", action="append", choices=SCOPES, help="default: read and write")
    create.add_argument("--max-priority", type=int, default=0, metavar="N", help="highest priority of its jobs")
    create.add_argument("--days", type=float, metavar="N", help="how long it is valid (default: for ever)")
    listing = commands.add_parser("list", help="every key, without its text", allow_abbrev=False)
    revoke = commands.add_parser("revoke", help="end a key", allow_abbrev=False)
    revoke.add_argument("id", metavar="KEY_ID")
    for command in (create, listing, revoke):
        command.add_argument("--data", default="skylapse-data", metavar="DIR", help="default: skylapse-data")
    return parser
