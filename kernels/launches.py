"""Launch configurations: how operations are cut up, by architecture, dtype, width and length; read, never searched for.

`adaln.json` is of the operations in `adaln.py`, and so on: {"90": [row, ...]}. Of an architecture's rows the first that
serves a call is taken. `python -m skylapse.kernels.tune` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .toolchain import ARCHITECTURES, capability

FOLDER = Path(__file__).parent
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ANY_LENGTH = 2**31


@dataclass(frozen=True)
class Row:
    """A configuration, and the calls that it serves."""

    ops: tuple[str, ...]
    dtypes: tuple[str, ...]
    width: int | None  # what a call may have at most, of what the operation's file calls its width; None: any
    longest: int | None  # tokens at most (attention: queries of the longest sequence); None: any number
    launch: Mapping[str, Any]  # num_warps, num_stages, maxnreg, the sides of tiles

    def serves(self, op: str, dtype: str, width: int, length: int) -> bool:
        wide, long = self.width or width, self.longest or length
        return op in self.ops and dtype in self.dtypes and width <= wide and length <= long


_forced: dict[str, Mapping[str, Any]] = {}


def find(
    name: str,
    op: str,
    arch: int,
    dtype: str,
    width: int,
    length: int,
    fits: Callable[[Mapping[str, Any]], bool] = lambda launch: True,
) -> Mapping[str, Any]:
    """Of `name`.json: the launch of the first row that serves the call, and that `fits` agrees to."""
    if op in _forced:
        return _forced[op]
    for row in table(name)[arch]:
        if row.serves(op, dtype, width, length) and fits(row.launch):
            return row.launch
    raise ValueError(f"no launch of {op} in {dtype} and width {width} for sm_{arch} in {name}.json")


def options(launch: Mapping[str, Any]) -> dict[str, int]:
    """The entries of a launch that are Triton's own; maxnreg bounds a thread's registers, so that more programs fit."""
    return {name: launch[name] for name in ("num_warps", "num_stages", "maxnreg") if launch.get(name) is not None}


@contextmanager
def forced(op: str, launch: Mapping[str, Any]) -> Iterator[None]:
    """Every call of the operation is launched like this meanwhile, in this process: to measure one, and in tests."""
    before = dict(_forced)
    _forced[op] = launch
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@lru_cache(maxsize=64)
def table(name: str) -> dict[int, tuple[Row, ...]]:
    """Rows of `name`.json by architecture; a row without `ops` is of the operation that the file is called after."""
    entries = json.loads((FOLDER / f"{name}.json").read_text())
    return {int(arch): tuple(_row(name, row) for row in rows) for arch, rows in entries.items() if arch.isdecimal()}


def _row(name: str, row: Mapping[str, Any]) -> Row:
    return Row(tuple(row.get("ops", [name])), tuple(row["dtypes"]), row["width"], row["longest"], row["launch"])


def points(name: str, op: str, widths: Iterable[int]) -> Iterator[tuple[int, Row, str, int]]:
    """(architecture, row, dtype, width) of what is compiled: each row in its first dtype at those of these widths that
    it serves, and in its last, which is its widest, at the greatest width; the former first.
    """
    for arch, rows in table(name).items():
        widest = []
        for row in rows:
            if op not in row.ops:
                continue
            served = [width for width in sorted({*widths}) if _serving(rows, op, row, width) is row]
            assert served or row.width, f"sm_{arch}: {row} serves none of the widths {widths}, so it is not compiled"
            yield from ((arch, row, row.dtypes[0], width) for width in served)
            if len(row.dtypes) > 1 or row.width not in (None, *served):
                widest.append((arch, row, row.dtypes[-1], row.width or served[-1]))
        yield from widest


def _serving(rows: Iterable[Row], op: str, row: Row, width: int) -> Row | None:
    """The row that serves the longest calls that `row` might."""
    length = row.longest or ANY_LENGTH
    return next((other for other in rows if other.serves(op, row.dtypes[0], width, length)), None)


def architecture(number: int) -> int:
    """The one of ours whose configurations serve a device of this compute capability."""
    if number < ARCHITECTURES[0]:
        raise ValueError(f"kernels need sm_{ARCHITECTURES[0]} or newer, this is sm_{number}")
    if number == 86:  # has sm_89's shared memory, not sm_80's
        return 89
    return max(arch for arch in ARCHITECTURES if arch <= number)


def arch_of(device: torch.device) -> int:
    """The architecture whose rows serve tensors on this device; in Triton's interpreter, on a CPU, any would."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    return architecture(capability(device))
