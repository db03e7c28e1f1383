"""Read lines of a document as calls of our own programs, and parse or run them within this process."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from skylapse.cli import main

PROGRAM = re.compile(r"(?:\S*/)?(skylapse|python3?)")
ENDS = ("&&", "||", "|", ";", "&", ">", ">>", "2>", "<")
IMAGE = re.compile(r"(^|/)skylapse-\w+:")
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=")


@dataclass(frozen=True)
class Call:
    """`skylapse ...` or `python -m skylapse.module ...`, with the variables that stand before it."""

    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    def run(self) -> int:
        """Run it, and return its exit status; its output goes where this process's goes."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.variables:
                patch.setenv(name, value)
            if self.words[0] == "skylapse":
                return main(list(self.words[1:]))
            patch.setattr(sys, "argv", list(self.words[2:]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # that other tests have imported it already
                try:
                    runpy.run_module(self.words[2], run_name="__main__", alter_sys=True)
                except SystemExit as ended:
                    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            return 0

    def parse(self) -> str | None:
        """Read the options and do nothing else; returns what is wrong with them, in one line."""
        said: list[str] = []

        def parse(parser: argparse.ArgumentParser, words: object = None, namespace: object = None) -> object:
            parse_known = argparse.ArgumentParser.parse_known_args
            _, unknown = parse_known(parser, words, namespace)  # type: ignore[call-overload]
            if unknown:
                parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            raise Parsed

        def error(parser: argparse.ArgumentParser, message: str) -> None:
            said.append(message)
            raise Parsed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            patch.setattr("skylapse.runtime.commands.options.Parser.error", error)
            patch.setattr(argparse.ArgumentParser, "error", error)
            try:
                self.run()
            except Parsed:
                return said[0] if said else None
            except SystemExit as ended:  # --help, --version
                return None if not ended.code else f"exits with {ended.code}"
        return "reads no options"


class Parsed(BaseException):
    """Raised where a command would begin to work."""


def calls(command: str) -> Iterator[Call]:
    """Yield the calls of one line, whatever other programs stand in it."""
    reader = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split = True
    words: list[str] = []
    for word in [*reader, ";"]:
        if word not in ENDS:
            words.append(word)
            continue
        yield from _call(words)
        words = []


def _call(words: list[str]) -> Iterator[Call]:
    """Yield the call of one program: ours by itself, in a container, or behind the `--` of another one."""
    first = next((at for at, word in enumerate(words) if not VARIABLE.match(word)), len(words))
    for at, word in enumerate(words):
        found = PROGRAM.fullmatch(word)
        if found is None or not (at == first or words[at - 1] == "--" or IMAGE.search(words[at - 1])):
            continue
        variables = tuple((name, value) for name, _, value in (text.partition("=") for text in words[:first]))
        rest = words[at + 1 :]
        if found[1] == "skylapse":
            yield Call(("skylapse", *rest), variables if at == first else ())
        elif rest[:1] == ["-m"] and rest[1].partition(".")[0] == "skylapse":
            yield Call(("python", *rest), variables if at == first else ())
        return
