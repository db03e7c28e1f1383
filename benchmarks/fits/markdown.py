"""The table of what fits for people: a line a model, size and precision, a column a card; and a line a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...runtime.checkpoints.registry import published_folder
from .table import CARDS, ModelTable, Record

SHORT = {"text_encoder": "text", "image_encoder": "image"}
TASKS = {  # what a clip is made from
    "text-to-video": "text",
    "video-to-video": "a video",
    "image-to-video": "an image",
    "first-and-last-frame-to-video": "first and last frame",
    "video-extension": "a video to go on from",
}
ONE_END = ("image-to-video", "video-extension")  # which a model that needs both ends does not do
HEAD = """# What fits on which card

<!-- Written by `skylapse bench fits`. -->

Guided requests of native size and length, by arithmetic from shapes: nothing here was run on a GPU.
[docs/memory.md](../../../docs/memory.md) says how, and what the words mean. *yes*: every part of the model stays on the
card. *moves*: these parts are copied from pinned memory of the host when they are needed. *apart*: guidance branches go
through the blocks one after the other. *chunk 1*: the VAE codes one latent frame at a time, else four. *tiles*: frames
are coded in tiles. *no*: the stage that needs too much, and the longest clip of this size that fits, if one does.
"""


def markdown(tables: Sequence[ModelTable]) -> str:
    return "\n".join([HEAD, *_lines(tables)]) + "\n"


def overview(tables: Sequence[ModelTable]) -> str:
    """Hub id, tasks, the model's own clip, and the smallest cards that make it: bf16, with all parts on it, fp8."""
    head = ("hub id", "makes a clip from", "its own clip", "GPU in bf16", "with all parts on it", "in fp8")
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, map(_in_short, tables))]) + "\n"


def _in_short(table: ModelTable) -> tuple[str, ...]:
    folder = published_folder(table.model)
    if folder is None:
        raise ValueError(f"{table.model} is no published model")
    own = folder.defaults
    rows = [row for row in table.rows if (row["width"], row["height"]) == (own.width, own.height)]
    exact = [row for row in rows if row["quantize"] is None]
    return (
        f"`{table.model}`",
        ", ".join(TASKS[task] for task in folder.tasks if not (folder.requires_last_image and task in ONE_END)),
        f"{own.width}x{own.height}, {own.num_frames} frames",
        _smallest(exact),
        _smallest([row for row in exact if not row["moved"]]),
        _smallest([row for row in rows if row["quantize"] == "fp8"]),
    )


def _smallest(rows: Sequence[Record]) -> str:
    cards = [card for row in rows if row["fits"] and (card := row["card_gb"])]
    return f"{min(cards)} GB" if cards else f"none up to {CARDS[-1]} GB"


def cells_of(table: ModelTable) -> Iterator[tuple[str, ...]]:
    """Model, clip, precision, and a cell for each of `CARDS`."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in sorted(table.rows, key=lambda row: CARDS.index(row["card_gb"])):
        clip = f"{row['width']}x{row['height']}x{row['num_frames']}"
        lines.setdefault((clip, row["quantize"] or row["dtype"]), []).append(_cell(row))
    for (clip, precision), cells in lines.items():
        yield table.model, clip, precision, *cells


def _lines(tables: Sequence[ModelTable]) -> Iterator[str]:
    head = ("model", "clip", "weights", *(f"{card} GB" for card in CARDS))
    yield _line(head)
    yield "|" + "---|" * len(head)
    for table in tables:
        for model, *cells in cells_of(table):
            yield _line((f"[{model.partition('/')[2][: -len('-Diffusers')]}]({table.file_name})", *cells))


def _cell(row: Record) -> str:
    if not row["fits"]:
        frames = row["max_frames"]
        return f"no: {row['blocked_by']}" + (f" ({frames} frames)" if frames else "")
    words = []
    if row["moved"]:
        words.append(f"moves {_parts(row['moved']) if row['resident'] else 'all'}")
    if row["guidance"] == "apart":
        words.append("apart")
    if row["decode_chunk"] == 1:
        words.append("chunk 1")
    if row["tiles"] is not None:
        words.append("tiles")
    return "; ".join(words) or "yes"


def _parts(moved: Sequence[str]) -> str:
    experts = "transformer_2" in moved
    names = ["experts" if experts and part == "transformer" else SHORT.get(part, part) for part in moved]
    return ", ".join(name for name in names if name != "transformer_2")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
