"""`bench fits`: the table of what fits on which card, made again, or compared with what this code predicts.

    skylapse bench fits            # benchmarks/results/memory; under a minute of one core
    skylapse bench fits --check    # 1 where the committed table is no longer true

It needs no GPU, no weights and no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...runtime.commands.options import Parser
from ...runtime.media.writer import replaced_when_complete
from ..track.history import RESULTS
from .compare import AGAIN, Change, changes
from .markdown import markdown
from .table import ModelTable, read, tables, write

FOLDER = RESULTS / "memory"
PAGE = "README.md"


def fits(arguments: Sequence[str]) -> int:
    parser = Parser(prog="skylapse bench fits", description="which published model fits at which size on which card")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: the committed table")
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs; 1 where something does")
    options = parser.parse_args(arguments)
    made = list(tables())
    if options.check:
        found = list(differences(options.out, made))
        for change in found:
            print(change)
        print(f"{options.out}: {f'{len(found)} differences; {AGAIN}' if found else 'as this code predicts it'}")
        return int(bool(found))
    for table in made:
        write(table, options.out)
    for path in stale_files(options.out, made):
        path.unlink()
    with replaced_when_complete(options.out / PAGE) as unfinished:
        unfinished.write_text(markdown(made))
    print(f"{options.out}: {len(made)} models, {sum(len(table.rows) for table in made)} rows")
    return 0


def differences(folder: Path, made: Sequence[ModelTable]) -> Iterator[Change]:
    """Yield the differences of the tables in a folder from those that were made now."""
    for table in made:
        path = folder / table.file_name
        if not path.exists():
            yield Change(f"{table.model}: no table {path.name}", worse=False)
            continue
        yield from changes(read(path), table)
    for path in stale_files(folder, made):
        yield Change(f"{path.name}: of no published model", worse=True)


def stale_files(folder: Path, made: Sequence[ModelTable]) -> list[Path]:
    """Return the tables of models that are published no more."""
    known = {table.file_name for table in made}
    return [path for path in sorted(folder.glob("*.json")) if path.name not in known]
