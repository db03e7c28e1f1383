"""`skylapse kernels`: which kernels run on this machine, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..core.config import Settings
from .options import Parser


def kernels(arguments: Sequence[str], settings: Settings) -> int:
    """`doctor` prints the GPU, driver and versions, and for each operation what serves it; `inspect` compiles all."""
    if arguments[:1] == ["inspect"]:
        from ...kernels import inspect  # torch and Triton: seconds

        return inspect.main(list(arguments[1:]), prog="skylapse kernels inspect")
    parser = Parser(prog="skylapse kernels", description=__doc__.partition(": ")[2], allow_abbrev=False)
    questions = parser.add_subparsers(metavar="COMMAND", required=True)
    doctor = questions.add_parser("doctor", help="GPU, driver, versions, and what serves each operation and why")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    questions.add_parser("inspect", help="what the compiler makes of every kernel, for GPUs that are not there")
    options = parser.parse_args(arguments)

    from ...kernels.backends import Backends
    from ...kernels.doctor import examine  # torch: seconds

    report = examine(Backends(settings.kernels))
    print(json.dumps(report.as_dict(), indent=1) if options.json else "\n".join(report.lines()))
    return 0


def check_kernels(asked: Mapping[str, str], device: str | None) -> None:
    """ValueError says why this machine's device (None: cuda where there is one) cannot run what was asked for."""
    from ...kernels.backends import Backends
    from ..core.device import parse_device

    Backends(asked).prepare(parse_device(device))
