"""`skylapse compile`: build a model's decoder for this machine, check it, measure it, and say what was chosen."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .config import DECODERS, Settings
from .options import Parser, size_of
from .request import VideoRequest

if TYPE_CHECKING:
    from ..compile.select import Standing
    from .decoders import Decoders

logger = logging.getLogger(__name__)
COLUMNS = ("backend", "state", "seconds a clip", "error", "")


def compile(arguments: Sequence[str], settings: Settings) -> int:
    """Exit code 0 where what was asked for is built and right."""
    options = _parser().parse_args(arguments)
    settings = replace(settings, decoder="auto", decoder_dtype=options.dtype)
    import torch  # seconds

    from .decoders import Decoders
    from .engine import parse_device
    from .models.model import load_codec
    from .models.registry import read_folder, resolve_folder

    threads = options.threads or settings.threads
    if threads is not None:
        torch.set_num_threads(threads)
    folder = read_folder(resolve_folder(options.model, settings.cache_dir))
    width, height = options.size or (folder.defaults.width, folder.defaults.height)
    # A size that no request may have is refused as a request of it is.
    VideoRequest(prompt="a size", width=width, height=height).resolved(folder.defaults, folder.limits)
    codec = load_codec(folder, parse_device(options.device), settings)
    decoders = Decoders(options.model, codec, (width, height), settings)
    size = decoders.latent_size(width, height)
    if not options.status and not options.verify:
        _build(decoders, options)
    standings = decoders.selector.verify(size) if options.verify else decoders.selector.standings(size)
    choice = decoders.selector.choose(*size)
    if options.json:
        report = {"backend": choice.backend, "why": choice.why, "backends": [asdict(s) for s in standings]}
        print(json.dumps(report))
    else:
        _print(standings)
        print(f"\n{width}x{height} is decoded by {choice.backend}: {choice.why}")
    return 1 if options.verify and any(standing.state == "demoted" for standing in standings) else 0


def _build(decoders: Decoders, options: argparse.Namespace) -> None:
    """The backend that was asked for, or with --fallback the next that can be built; by default the first."""
    from ..compile.backend import Unavailable
    from ..compile.cache import BuildFailed

    selector = decoders.selector
    names = [backend.name for backend in selector.backends]
    if options.backend == "eager":
        raise ValueError("eager needs no building")
    if options.backend is not None:
        selector.backend(options.backend)  # Unavailable where this version has none of that name
        names = names[names.index(options.backend) :] if options.fallback else [options.backend]
    elif not options.fallback:
        plan = decoders.plan
        names = [name for name in names if selector.backend(name).missing(plan) is None][:1] or names[:1]
    for name in names:
        print(f"skylapse: building {name}", file=sys.stderr)
        try:
            selector.build(
                selector.backend(name),
                decoders.default_size if options.size else None,
                measure_at=decoders.default_size,
                again=True,
            )
            return
        except (Unavailable, BuildFailed) as error:
            if name == names[-1]:
                raise
            logger.warning("%s: %s; the next backend is tried", name, error)


def _print(standings: Sequence[Standing]) -> None:
    rows = [COLUMNS] + [
        (
            s.backend,
            s.state,
            "" if s.seconds is None else f"{s.seconds:.4g}",
            "" if s.error is None else f"{s.error:.2g}",
            s.detail,
        )
        for s in standings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse compile", description="Build a faster decoder for this machine.", allow_abbrev=False)
    option = parser.add_argument
    option("model", metavar="MODEL", help="demo, a diffusers folder, or a Hugging Face id")
    option("--size", type=size_of, metavar="WxH", help="for frames of this size alone (default: for any)")
    option("--backend", choices=DECODERS[1:], help="default: the first that can be had")
    option("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the decoder (default: fp32)")
    option("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    option("--threads", type=int, metavar="N", help="that it will be run with (default: SKYLAPSE_THREADS, or torch's)")
    option("--fallback", action="store_true", help="build the next backend where one cannot be built")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="compare and time what is built, build nothing")
    what.add_argument("--status", action="store_true", help="what is built, chosen, demoted or failed, and why")
    option("--json", action="store_true", help="print one JSON object")
    return parser
