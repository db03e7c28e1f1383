"""`skylapse store`: the store backed up, restored and checked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sqlalchemy import make_url

from ...runtime.commands.options import Parser
from ...runtime.core.config import Settings
from ..core.private import make_folder
from ..jobs.services import Context, stand_on
from ..store.database import Database
from ..store.processes import Processes
from .backup import back_up, is_empty, restore, verify
from .opening import add_place, find_config, find_database, open_store, place_of
from .store_check import check
from .table import iso, print_facts, print_json

IN_USE_S = 10.0  # after its last sign of life, a process counts as gone
MAX_LINES = 20


def store(arguments: Sequence[str], settings: Settings) -> int:
    """Run one of the commands; return 1 if `check` has found something."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def _backup(options: argparse.Namespace) -> int:
    target = Path(options.file)
    if not target.absolute().parent.is_dir():
        raise ValueError(f"FILE must be in a folder that is there, got {options.file!r}")
    if target.is_dir() or (target.exists() and not options.force):
        raise ValueError(f"FILE must be a new one, got {options.file!r}: --force replaces it")
    with open_store(options, is_read_only=True) as context:
        files = context.artifacts if options.with_artifacts else None
        manifest, num_files = back_up(context.database, files, target, options.force)
    facts = {"file": str(target), "bytes": target.stat().st_size, "files": num_files, **asdict(manifest)}
    if options.json:
        print_json(facts)
    else:
        print_facts(facts | {"created_at": iso(manifest.created_at)})
    return 0


def _restore(options: argparse.Namespace) -> int:
    source = Path(options.file)
    if not source.is_file():
        raise ValueError(f"FILE must be a backup, got {options.file!r}")
    config = find_config(options)
    verify(source, make_url(config.database).get_backend_name())
    database = find_database(config)
    try:
        if database is not None and not options.force:
            _refuse_to_overwrite(database, place_of(config))
        if database is None:
            make_folder(config.folder)
            database = Database(config.database)
        _tell_restored(options, stand_on(config, database), source)
    finally:
        if database is not None:
            database.close()
    return 0


def _tell_restored(options: argparse.Namespace, context: Context, source: Path) -> None:
    facts = {"store": place_of(context.config), **restore(context.database, context.artifacts, source)}
    if options.json:
        print_json(facts)
    else:
        print_facts(facts)


def _refuse_to_overwrite(database: Database, place: str) -> None:
    database.migrate()  # of an older release, whose tables are about to go
    if alive := Processes(database).alive(IN_USE_S):
        newest = f"{alive[0].kind} {alive[0].id} gave a sign {alive[0].silent_s:.0f} s ago"
        raise ValueError(f"the store at {place} is in use ({newest}): stop the service, or --force")
    if not is_empty(database):
        raise ValueError(f"the store at {place} has jobs or keys, which would be lost: --force replaces them")


def _check(options: argparse.Namespace) -> int:
    with open_store(options, is_read_only=True) as context:
        report = check(context.database, context.artifacts)
    if options.json:
        print_json({"store": place_of(context.config), "ok": not report.problems, **asdict(report)})
        return int(bool(report.problems))
    version = f"{report.schema_version}"
    if report.schema_version != report.newest_version:
        version += f" (this release has {report.newest_version}: the service's next start brings it up to date)"
    facts = {"store": place_of(context.config), "schema version": version, "integrity": report.integrity}
    print_facts(facts | {"jobs": report.jobs, "files": report.files, "problems": len(report.problems)})
    for line in report.problems[:MAX_LINES]:
        print(f"- {line}")
    if len(report.problems) > MAX_LINES:
        print(f"- and {len(report.problems) - MAX_LINES} more: --json has them all")
    return int(bool(report.problems))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse store", description="Jobs, keys and the audit, as one.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    backup = commands.add_parser("backup", help="write it to a file, while the service runs", allow_abbrev=False)
    backup.add_argument("--with-artifacts", action="store_true", help="and the files that unfinished jobs go on from")
    again = commands.add_parser("restore", help="take it from a backup", allow_abbrev=False)
    sound = commands.add_parser("check", help="tell whether it is sound; exit code 1: it is not", allow_abbrev=False)
    for command in (backup, again):
        command.add_argument("file", metavar="FILE")
    backup.add_argument("--force", action="store_true", help="replace FILE")
    again.add_argument("--force", action="store_true", help="replace a store that is in use, or not empty")
    for command, run in ((backup, _backup), (again, _restore), (sound, _check)):
        command.set_defaults(run=run)
    add_place(backup, again, sound)
    return parser
