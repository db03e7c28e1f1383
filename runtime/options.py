"""Command-line options that several commands have, and what they say."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from .config import OFFLOAD, QUANTIZE
from .request import SOLVERS


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # one line and exit code 2, as for every other mistake


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="default: what the device is fastest with")
    command.add_argument("--quantize", choices=QUANTIZE, help="8 bits for the weights of the denoiser's blocks")
    command.add_argument("--offload", choices=OFFLOAD, help="parts that leave a GPU while nothing needs them")


def add_sampling(command: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Size, length, steps and guidance; returns the group that says how long, for other ways of saying it."""
    option = command.add_argument
    option("--size", type=size_of, metavar="WxH", help="pixels, for example 64x64")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--frames", type=int, metavar="N", help="4k+1: 1, 5, 9, 13, 17, ...")
    option("--steps", type=int, metavar="N", help="denoising steps")
    option("--guidance", type=float, metavar="G", help="how strictly to follow the prompt")
    option("--guidance-2", type=float, metavar="G", help="the same for the second expert of a model that has two")
    option("--solver", choices=SOLVERS)
    option("--shift", type=float, metavar="S", help="of the noise schedule")
    return length


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that `add_sampling`'s options give."""
    width, height = options.size or (None, None)
    return dict(
        width=width,
        height=height,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        guidance_scale_2=options.guidance_2,
        solver=options.solver,
        shift=options.shift,
    )


def gigabytes(text: str) -> float:
    """Bytes of so many GB, 10^9 each."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1_000_000:
        raise argparse.ArgumentTypeError(f"must be a number of GB above 0, got {text!r}")
    return number * 1e9


def size_of(text: str) -> tuple[int, int]:
    width, times, height = text.lower().partition("x")
    if not (times and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, for example 64x64, got {text!r}")
    return int(width), int(height)
