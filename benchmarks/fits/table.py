"""One model's memory on every card: peaks by shapes, and a row each native size, card and precision.

Nothing in it changes from run to run, so that a test can make it again and compare. Bytes are bytes, cards are in
10^9 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...runtime.checkpoints.published import published
from ...runtime.checkpoints.registry import ModelFolder, published_folder
from ...runtime.media.writer import replaced_when_complete
from ...runtime.memory.fit_report import DECODER_DTYPE, DEVICE_SHARE, DTYPE, Precision, precisions, rows_of, sizes_of
from ...runtime.memory.peaks import CHUNKS, TEXT_ROWS
from ...runtime.vae.tiling import Tiling

SCHEMA: Literal["skylapse.fits/1"] = "skylapse.fits/1"
CARDS = (16, 24, 32, 48, 80, 96, 141, 192)  # GB
CAPABILITY = 90  # of the architecture whose kernels the peaks are of
KEYS = ("model", "assumptions", "parts", "peaks", "rows")

Record = dict[str, Any]  # one line of a file


@dataclass(frozen=True)
class ModelTable:
    """The table of one published checkpoint.

    parts: one record a precision, bytes of weights. peaks: one a precision and size, bytes beside the weights.
    rows: one a precision, size and card; docs/memory.md explains their keys.
    """

    model: str
    assumptions: Record
    parts: list[Record]
    peaks: list[Record]
    rows: list[Record]

    @property
    def file_name(self) -> str:
        return f"{self.model.partition('/')[2].lower().removesuffix('-diffusers')}.json"

    def to_json(self) -> str:
        """Return the table as JSON, one record a line."""
        head = {"schema": SCHEMA, "model": self.model, "assumptions": self.assumptions}
        lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
        for key in ("parts", "peaks", "rows"):
            records = ",\n  ".join(json.dumps(record) for record in getattr(self, key))
            lines.append(f'"{key}": [\n  {records}\n ]')
        return "{\n " + ",\n ".join(lines) + "\n}\n"


def tables() -> Iterator[ModelTable]:
    """Yield the tables of all published checkpoints, as this code predicts them."""
    for name in published():
        yield table_of(name)


def table_of(name: str) -> ModelTable:
    folder = published_folder(name)
    if folder is None:
        raise ValueError(f"model must be one of {', '.join(published())}, got {name!r}")
    kept = [precision for precision in precisions(folder) if isinstance(precision, Precision)]  # all can be quantised
    return ModelTable(
        model=name,
        assumptions=_assumptions(folder),
        parts=[{"quantize": precision.quantize} | dict(precision.parts) for precision in kept],
        peaks=[record for precision in kept for record in _peaks(precision)],
        rows=[record for precision in kept for record in _rows(precision)],
    )


def read(path: Path) -> ModelTable:
    """Read a table; ValueError where the file is something else."""
    try:
        found = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} must be JSON: {error}") from error
    if not is_table(found) or set(found) != {"schema", *KEYS}:
        raise ValueError(f"{path.name} must have schema {SCHEMA!r} and {', '.join(KEYS)}")
    return ModelTable(**{key: found[key] for key in KEYS})


def is_table(content: object) -> bool:
    return isinstance(content, dict) and content.get("schema") == SCHEMA


def write(table: ModelTable, folder: Path) -> Path:
    """Write a table, replacing the file in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / table.file_name
    with replaced_when_complete(path) as unfinished:
        unfinished.write_text(table.to_json())
    return path


def _assumptions(folder: ModelFolder) -> Record:
    return {
        "torch": torch.__version__.partition("+")[0],
        "capability": CAPABILITY,
        "dtype": _word(DTYPE),
        "decoder_dtype": _word(DECODER_DTYPE),
        "encoder_dtype": _word(torch.float32),
        "device_share": DEVICE_SHARE,
        "prompt_tokens": folder.limits.max_prompt_tokens,
        "pack_text_rows": TEXT_ROWS,
        "branches": 2,
        "chunks": list(CHUNKS),
        "tile": Tiling().tile,
        "offload": "auto",
        "host_bytes": None,
        "workspace_bytes": 0,
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _peaks(precision: Precision) -> Iterator[Record]:
    peaks, factor = precision.peaks, precision.folder.vae.get("scale_factor_spatial", 8)
    for size in sizes_of(precision.folder):
        needs = precision.needs(size)
        total = needs.num_tokens * needs.num_branches
        coded = {
            half: {str(chunk): curves.at(size.height, size.width, chunk, Tiling(), factor) for chunk in CHUNKS}
            for half, curves in (("encode", peaks.encode), ("decode", peaks.decode))
        }
        yield {
            "quantize": precision.quantize,
            "width": size.width,
            "height": size.height,
            "num_frames": size.num_frames,
            "num_tokens": needs.num_tokens,
            "held": needs.held_bytes,
            "text": peaks.text,
            "image": peaks.image,
            "step": {"together": peaks.step.at(total), "apart": peaks.apart.at(total)},
            **coded,
        }


def _rows(precision: Precision) -> Iterator[Record]:
    by_card = [(card, row) for card in CARDS for row in rows_of(precision, card * 1e9)]
    for size in sizes_of(precision.folder):
        for card, row in by_card:
            if (row["width"], row["height"], row["num_frames"]) == (size.width, size.height, size.num_frames):
                yield {"card_gb": card} | row
