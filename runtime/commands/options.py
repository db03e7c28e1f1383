"""Command-line options that several commands have, and what they say."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from ..core.config import OFFLOAD, QUANTIZE
from ..core.request import SOLVERS

COMMANDS = ("COMMAND", "SUITE")  # metavars of what follows a command's name
# argparse's messages, and ours in their place: argparse names neither an option's values nor the option that was meant.
PHRASES = (
    (r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", "{option} must be {choices}, got {value}"),
    (r"argument (\S+): invalid (?:int) value: (.+)", "{option} must be a whole number, got {value}"),
    (r"argument (\S+): invalid (?:float) value: (.+)", "{option} must be a number, got {value}"),
    (r"argument (\S+): expected (?:one argument|at least one argument|\d+ arguments?)", "{option} needs a value"),
    (r"argument (\S+): not allowed with argument (\S+)", "{option} and {value} exclude each other"),
    (r"argument (\S+): ignored explicit argument (.+)", "{option} takes no value, got {value}"),
    (r"argument (\S+): (must .+)", "{option} {value}"),
    (r"one of the arguments (.+) is required", "one of {option} is missing"),
)


class Parser(argparse.ArgumentParser):
    """Parses a command line: mistakes are ValueErrors in our words, and the answer to no command is the help."""

    _given: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = tuple(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(self._in_our_words(message))  # one line and exit code 2, as for every other mistake

    def _in_our_words(self, message: str) -> str:
        if missing := re.fullmatch(r"the following arguments are required: (.+)", message):
            if missing[1] in COMMANDS:
                if self._given:
                    return self._unknown(" ".join(self._given))
                self.print_help(sys.stderr)
                raise SystemExit(2)
            return f"{missing[1]} {'are' if ',' in missing[1] else 'is'} missing"
        if unknown := re.fullmatch(r"unrecognized arguments: (.+)", message):
            return self._unknown(unknown[1])
        for pattern, told in PHRASES:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                groups = [*found.groups(), "", ""]
                option, value, choices = groups[0].rpartition("/")[2], groups[1], groups[2]
                words = " or ".join(choice.strip("'") for choice in choices.split(", "))
                if option in COMMANDS and choices:
                    return f"there is no command {value}{_meant(value.strip(chr(39)), words.split(' or '))}"
                return told.format(option=option, value=value, choices=words)
        return message

    def _unknown(self, arguments: str) -> str:
        first = arguments.split()[0]
        if not first.startswith("-"):
            return f"nothing is expected where {first!r} stands"
        name = first.partition("=")[0]
        return f"there is no option {name}{_meant(name, self.options)}"

    @property
    def options(self) -> list[str]:
        """Return the options of this command and of those below it."""
        below = [parser for action in self._actions for parser in (getattr(action, "choices", None) or {})]
        parsers = [
            action.choices[name]
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for name in below
            if name in action.choices
        ]
        own = [option for action in self._actions for option in action.option_strings]
        return own + [option for parser in parsers for option in parser.options]


def _meant(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, [*names], 1, 0.7)
    return f"; did you mean {found[0]}?" if found else ""


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="default: what the device is fastest with")
    command.add_argument("--quantize", choices=QUANTIZE, help="8 bits for the weights of the denoiser's blocks")
    command.add_argument("--offload", choices=OFFLOAD, help="parts that leave a GPU while nothing needs them")


def add_sampling(command: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add size, length, steps and guidance; returns the group of the length, for other ways of giving it."""
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
    """Return the fields of a request that `add_sampling`'s options give."""
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
    """Return the bytes of so many GB, 10^9 each."""
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
