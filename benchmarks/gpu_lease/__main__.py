"""The lease as a whole: its commands, its result file, and a dry run of every call.

python -m skylapse.benchmarks.gpu_lease --list
python -m skylapse.benchmarks.gpu_lease --dry-run --out FOLDER
python -m skylapse.benchmarks.gpu_lease --merge FOLDER --out FOLDER
python -m skylapse.benchmarks.gpu_lease --apply-tune FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .calls import CALLS, PACKAGE, listing
from .drive import parser, run
from .merge import launches_of, write_merged


def main(arguments: Sequence[str]) -> int:
    options = parser(f"python -m {PACKAGE}", __doc__.partition(":")[0] + ".")
    option = options.add_argument
    option("--list", action="store_true", help="print the device commands, and what each must carry")
    option("--merge", type=Path, metavar="FOLDER", help="journals -> one result file a device, in --out")
    option("--apply-tune", type=Path, metavar="FOLDER", help="write the launches that `tune` found into kernels/*.json")
    option("--call", action="append", choices=[call.name for call in CALLS], help="with --dry-run: these alone")
    asked = options.parse_args(arguments)
    if asked.list:
        print(listing())
        return 0
    if asked.apply_tune is not None:
        from .tune import apply

        return apply(launches_of([asked.apply_tune]))
    if asked.merge is not None:
        if asked.out is None:
            raise ValueError("--merge needs --out, the folder of the result")
        written = write_merged([asked.merge], asked.out, predict=True)
        print(*(written or (f"no journals in {asked.merge}",)), sep="\n")
        return int(not written)
    if not asked.dry_run:
        raise ValueError("calls are run one by one on a GPU: see --list; all of them at once with --dry-run alone")
    return run(asked.call or [call.name for call in CALLS], asked)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as mistake:  # the user's, as the command line has it
        print(f"skylapse: error: {mistake}", file=sys.stderr)
        sys.exit(2)
