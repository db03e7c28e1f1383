"""`skylapse models`: which there are, what they can do, and what their caches need to know."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..core.config import OFFLOAD, Settings
from ..core.request import VideoRequest
from .options import Parser, add_device, add_sampling, gigabytes, sampling


def add_models(commands: argparse._SubParsersAction[Parser]) -> None:
    models = commands.add_parser("models", help="which models there are and what they can do", allow_abbrev=False)
    questions = models.add_subparsers(metavar="COMMAND", required=True)
    listing = questions.add_parser("list", help="models that are known by name", allow_abbrev=False)
    listing.set_defaults(run=_list_models)
    inspection = questions.add_parser("inspect", help="components, sizes and defaults of a model", allow_abbrev=False)
    inspection.add_argument("model", metavar="MODEL", help="demo, a diffusers folder, or a Hugging Face id")
    inspection.add_argument(
        "--device-memory", type=gigabytes, metavar="GB", help="what fits on a GPU of so much, in which way"
    )
    inspection.add_argument("--host-memory", type=gigabytes, metavar="GB", help="for parts that leave the GPU")
    inspection.add_argument("--offload", choices=OFFLOAD, help="which parts may (default: auto)")
    inspection.set_defaults(run=_inspect_model)
    calibration = questions.add_parser(
        "calibrate", help="measure what step caches need to know, beside the model", allow_abbrev=False
    )
    calibration.add_argument("model", metavar="MODEL", help="demo, a diffusers folder, or a Hugging Face id")
    calibration.add_argument("--prompt", action="append", metavar="TEXT", help="measure with this one (repeatable)")
    calibration.add_argument("--image", metavar="FILE", help="the first frame, where the model needs one")
    add_device(calibration)
    add_sampling(calibration)
    calibration.set_defaults(run=_calibrate)
    download = questions.add_parser("download", help="fetch a model's files from its hub", allow_abbrev=False)
    download.add_argument("model", metavar="MODEL", help="a Hugging Face id")
    download.add_argument("--revision", metavar="REV", help="a branch, a tag or a commit (default: the hub's own)")
    download.set_defaults(run=_download_model)
    for command in (listing, inspection, calibration, download):
        command.add_argument("--json", action="store_true", help="print JSON")


def _list_models(options: argparse.Namespace, settings: Settings) -> int:
    from ..checkpoints.registry import list_models

    entries = list_models(cache_dir=settings.cache_dir)
    if options.json:
        print(json.dumps([asdict(entry) for entry in entries], default=str))
        return 0
    rows = [(entry.name, entry.description, entry.source, _mebibytes(entry.num_bytes)) for entry in entries]
    _print_table(("model", "what it is", "source", "size"), rows)
    return 0


def _inspect_model(options: argparse.Namespace, settings: Settings) -> int:
    from ..checkpoints.registry import inspect_model

    if options.device_memory is None and (options.host_memory is not None or options.offload is not None):
        raise ValueError("--host-memory and --offload need --device-memory: the memory of the GPU, in GB")
    report = inspect_model(options.model, cache_dir=settings.cache_dir)
    rows = _fit_rows(options, settings)
    if options.json:
        print(json.dumps(asdict(report) | ({} if rows is None else {"fit": rows}), default=str))
        return 0
    print(f"{report.name}  ({report.folder})\n")
    _print_table(
        ("component", "kind", "parameters", "size", "dtype"),
        [
            (part.name, part.kind, f"{part.num_parameters:,}", _mebibytes(part.num_bytes), ", ".join(part.dtypes))
            for part in report.components
        ],
    )
    defaults, limits = report.defaults, report.limits
    sizes = ", ".join(f"{width}x{height}" for width, height in report.native_sizes)
    print(f"\ncan do    {', '.join(report.tasks)}")
    print(f"sizes     {sizes}; multiples of {limits.size_multiple} up to {limits.max_pixels:,} pixels")
    print(f"frames    {defaults.num_frames} at {defaults.fps} fps; up to {limits.max_num_frames}")
    weights = []
    for name in ("bf16", "fp32"):
        quantized = report.loaded_bytes.get(f"{name}+int8")
        told = "--quantize does not take its sides" if quantized is None else f"{_mebibytes(quantized)} with --quantize"
        weights.append(f"{_mebibytes(report.loaded_bytes[name])} in {name} ({told})")
    print(f"weights   {', '.join(weights)}")
    print(f"sampling  {defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}")
    for part, reason in report.ignored.items():
        print(f"ignored   {part}: {reason}")
    if rows is not None:
        print()
        print_fit(rows)
    return 0


def _fit_rows(options: argparse.Namespace, settings: Settings) -> list[dict[str, Any]] | None:
    """What fits, where a memory was named."""
    if options.device_memory is None:
        return None
    from ..checkpoints.registry import describe
    from ..memory.fit_report import precisions, rows_of

    folder = describe(options.model, settings.cache_dir)
    memories = options.device_memory, options.host_memory, options.offload or settings.offload
    return [row for precision in precisions(folder) for row in rows_of(precision, *memories)]


def print_fit(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of `fit_report.rows_of` as a table."""
    _print_table(
        ("size", "weights", "fits", "text", "encode", "step", "decode", "of", "moved", "how, or what would fit"),
        [
            (
                f"{row['width']}x{row['height']}x{row['num_frames']}",
                "+".join(filter(None, (row["dtype"], row["quantize"]))),
                f"up to {row['max_frames']} frames" if row["fits"] else f"no: {row['blocked_by']}",
                *(_gigabytes(row["peak_bytes"][stage]) for stage in ("text", "encode", "step", "decode")),
                f"{row['budget_bytes'] / 1e9:.1f} GB",
                ", ".join(row["moved"]) or "nothing",
                _how(row),
            )
            for row in rows
        ],
    )


def _how(row: dict[str, Any]) -> str:
    if "why" in row:
        return str(row["why"])
    if not row["fits"]:
        enough = max(row["peak_bytes"][stage] for stage in row["stages"]) / (row["budget_bytes"] / row["device_bytes"])
        others = f", or {' or '.join(row['nearest'])}" if row["nearest"] else ""
        return f"a GPU of {enough / 1e9:.0f} GB{others}"
    frames = "1 latent frame" if row["decode_chunk"] == 1 else f"{row['decode_chunk']} latent frames"
    ways = [f"decoded {frames} at a time"]
    ways += ["guidance branches apart"] if row["guidance"] == "apart" else []
    ways += [f"in tiles of {row['tiles']}"] if row["tiles"] else []
    return ", ".join(ways)


def _download_model(options: argparse.Namespace, settings: Settings) -> int:
    from ..checkpoints.hub import COMMIT, Download, resolve_folder
    from ..core.fingerprint import fingerprint

    def tell(progress: Download) -> None:
        print(f"skylapse: downloading {progress.model}: {progress}", file=sys.stderr, flush=True)

    folder = resolve_folder(options.model, settings.cache_dir, options.revision, tell)
    if not options.json:
        print(folder)
        return 0
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    commit = folder.name if COMMIT.fullmatch(folder.name) else None
    facts = {"model": options.model, "revision": commit, "fingerprint": fingerprint(folder), "folder": str(folder)}
    print(json.dumps(facts | {"files": len(sizes), "bytes": sum(sizes)}))
    return 0


def _calibrate(options: argparse.Namespace, settings: Settings) -> int:
    from ..engine.engine import Engine
    from .calibrate import PROMPTS, calibrate

    engine = Engine.from_pretrained(
        options.model,
        device=options.device,
        dtype=options.dtype,
        cache_dir=settings.cache_dir,
        quantize=options.quantize,
        offload=options.offload,
    )
    request = VideoRequest(prompt="calibration", image=options.image, **sampling(options))
    path = calibrate(
        engine, request, options.prompt or PROMPTS, lambda line: print(f"skylapse: {line}", file=sys.stderr)
    )
    print(json.dumps({"output": str(path)}) if options.json else path)
    return 0


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(title, overflow="fold") for title in titles), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 1000  # one line a row for whoever reads it through a pipe
    Console(width=width, markup=False, highlight=False).print(table)


def _gigabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.1f}"


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"
