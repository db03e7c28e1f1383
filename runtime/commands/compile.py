"""`skylapse compile`: build decoder and encoder for this machine, check and measure them, say what is chosen."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..core.config import DECODERS, Settings
from ..core.request import VideoRequest
from .options import Parser, size_of

if TYPE_CHECKING:
    from ...compile.choice import Standing
    from ...compile.select import Selector

logger = logging.getLogger(__name__)
COLUMNS = ("state", "seconds a clip", "error", "")  # after the part's name, which stands above its backends


def compile(arguments: Sequence[str], settings: Settings) -> int:
    """Exit code 0 where what was asked for is built and right."""
    options = _parser().parse_args(arguments)
    dtype = options.dtype or settings.decoder_dtype
    settings = replace(settings, decoder="auto", encoder="auto", decoder_dtype=dtype)
    import torch  # seconds

    from ..checkpoints.hub import resolve_folder
    from ..checkpoints.registry import read_folder
    from ..core.device import parse_device
    from ..models.model import load_codec
    from ..vae.backends import Decoders

    threads = options.threads or settings.threads
    if threads is not None:
        torch.set_num_threads(threads)
    folder = read_folder(resolve_folder(options.model, settings.cache_dir))
    width, height = options.size or (folder.defaults.width, folder.defaults.height)
    # A size that no request may have is refused as a request of it is.
    VideoRequest(prompt="a size", width=width, height=height).resolved(folder.defaults, folder.limits)
    codec = load_codec(folder, parse_device(options.device), settings)
    decoders = Decoders(options.model, codec, (width, height), settings)
    parts = ["decoder", "encoder"] if options.part == "all" else [options.part]
    told: dict[str, dict[str, Any]] = {}
    for part in parts:
        selector, size = decoders.selector_of(part), decoders.default_size
        if not options.status and not options.verify:
            _build(selector, size, part, options)
        standings = selector.verify(size) if options.verify else selector.standings(size)
        choice = selector.choose(*size)
        told[part] = {"backend": choice.backend, "why": choice.why, "backends": [asdict(s) for s in standings]}
        if not options.json:
            _print(part, standings)
            print(f"\n{width}x{height} is {part[:-1]}d by {choice.backend}: {choice.why}\n")
    if options.json:
        print(json.dumps(told))
    states = {backend["state"] for report in told.values() for backend in report["backends"]}
    return 1 if options.verify and "demoted" in states else 0


def _build(selector: Selector, size: tuple[int, int], part: str, options: argparse.Namespace) -> None:
    """The backend that was asked for, or with --fallback the next that can be built; by default the first."""
    from ...compile.backend import Unavailable
    from ...compile.cache import BuildFailed
    from ...compile.stream import Plan

    names = [backend.name for backend in selector.backends]
    if options.backend == "eager":
        raise ValueError("eager needs no building")
    if options.backend is not None:
        selector.backend(options.backend)  # Unavailable where this version has none of that name
        names = names[names.index(options.backend) :] if options.fallback else [options.backend]
    elif not options.fallback:
        plan = Plan(selector.dtype)
        names = [name for name in names if selector.backend(name).missing(plan) is None][:1] or names[:1]
    for name in names:
        print(f"skylapse: building {name} for the {part}", file=sys.stderr)
        try:
            backend = selector.backend(name)
            own = size if options.size else selector.plan_for(size, backend).size
            selector.build(backend, own, measure_at=size, again=True)
            return
        except (Unavailable, BuildFailed) as error:
            if name == names[-1]:
                raise
            logger.warning("%s: %s; the next backend is tried", name, error)


def _print(part: str, standings: Sequence[Standing]) -> None:
    rows = [(part, *COLUMNS)] + [
        (
            s.backend,
            s.state,
            "" if s.seconds is None else f"{s.seconds:.4g}",
            "" if s.error is None else f"{s.error:.2g}",
            s.detail,
        )
        for s in standings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skylapse compile", description="Build a faster decoder and encoder for this machine.", allow_abbrev=False
    )
    option = parser.add_argument
    option("model", metavar="MODEL", help="demo, a diffusers folder, or a Hugging Face id")
    option("--size", type=size_of, metavar="WxH", help="for frames of this size alone (default: for any)")
    option("--backend", choices=DECODERS[1:], help="default: the first that can be had")
    words = ("auto", "fp32", "bf16", "fp16")
    option("--dtype", choices=words, help="of the decoder (default: SKYLAPSE_DECODER_DTYPE, which is bf16 on CUDA)")
    option("--part", choices=("decoder", "encoder", "all"), default="all", help="default: all; the encoder is fp32")
    option("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    option("--threads", type=int, metavar="N", help="that it will be run with (default: SKYLAPSE_THREADS, or torch's)")
    option("--fallback", action="store_true", help="build the next backend where one cannot be built")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="compare and time what is built, build nothing")
    what.add_argument("--status", action="store_true", help="what is built, chosen, demoted or failed, and why")
    option("--json", action="store_true", help="print one JSON object")
    return parser
