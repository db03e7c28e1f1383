"""`skylapse models`: which there are, what they can do, and what their caches need to know."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ..config import Settings
from ..options import Parser, add_device, add_sampling, sampling
from ..request import VideoRequest


def add_models(commands: argparse._SubParsersAction[Parser]) -> None:
    models = commands.add_parser("models", help="which models there are and what they can do", allow_abbrev=False)
    questions = models.add_subparsers(metavar="COMMAND", required=True)
    listing = questions.add_parser("list", help="models that are known by name", allow_abbrev=False)
    listing.set_defaults(run=_list_models)
    inspection = questions.add_parser("inspect", help="components, sizes and defaults of a model", allow_abbrev=False)
    inspection.add_argument("model", metavar="MODEL", help="demo, a diffusers folder, or a Hugging Face id")
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
    for command in (listing, inspection, calibration):
        command.add_argument("--json", action="store_true", help="print JSON")


def _list_models(options: argparse.Namespace, settings: Settings) -> int:
    from .registry import list_models

    entries = list_models(cache_dir=settings.cache_dir)
    if options.json:
        print(json.dumps([asdict(entry) for entry in entries], default=str))
        return 0
    rows = [(entry.name, entry.description, entry.source, _mebibytes(entry.num_bytes)) for entry in entries]
    _print_table(("model", "what it is", "source", "size"), rows)
    return 0


def _inspect_model(options: argparse.Namespace, settings: Settings) -> int:
    from .registry import inspect_model

    report = inspect_model(options.model, cache_dir=settings.cache_dir)
    if options.json:
        print(json.dumps(asdict(report), default=str))
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
    weights = [
        f"{_mebibytes(report.loaded_bytes[name])} in {name} "
        f"({_mebibytes(report.loaded_bytes[f'{name}+int8'])} with --quantize)"
        for name in ("bf16", "fp32")
    ]
    print(f"weights   {', '.join(weights)}")
    print(f"sampling  {defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}")
    return 0


def _calibrate(options: argparse.Namespace, settings: Settings) -> int:
    from ..cache.calibrate import PROMPTS, calibrate
    from ..engine import Engine

    engine = Engine.from_pretrained(
        options.model,
        device=options.device,
        dtype=options.dtype,
        cache_dir=settings.cache_dir,
        quantize=options.quantize,
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


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"
