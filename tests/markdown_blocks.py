"""The blocks of code in README and docs/, each with its language, its heading and its line; and commands as words."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HERE_DOCUMENT = re.compile(r"<<-?'?(\w+)'?\n(.*?)\n\1(?=\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code. language: of a fence, "" of an indented block. line: of the page, from 1."""

    page: Path
    line: int
    heading: str
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Return each command of a shell's block in one line, without comments and here-documents."""
        text = HERE_DOCUMENT.sub("", self.text).replace("\\\n", " ")
        return [command for line in text.split("\n") if (command := _uncommented(line))]

    @property
    def is_shell(self) -> bool:
        """Return whether a block is a shell's, as every indented one is: others stand in a fence that names them."""
        return self.language in ("", "sh", "bash")


def _uncommented(line: str) -> str:
    reader = shlex.shlex(line, posix=False)  # which leaves quotes in their places
    reader.whitespace_split, reader.commenters = True, "#"
    return " ".join(reader)


@dataclass(frozen=True)
class Span:
    """Code within a sentence or a table."""

    page: Path
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found, heading, is_title = [], "", False
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "heading_open":
            is_title = True
        elif token.type == "inline" and is_title:
            heading, is_title = token.content, False
        elif token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(page, line, heading, language, token.content.rstrip("\n")))
    return found


def spans(page: Path) -> list[Span]:
    found, line = [], 0
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        line = token.map[0] + 1 if token.map else line
        found += [Span(page, line, one.content) for one in token.children or () if one.type == "code_inline"]
    return found


def links(page: Path) -> list[Span]:
    """Return the targets of links and pictures, but for other sites and headings of the same page."""
    found, line = [], 0
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        line = token.map[0] + 1 if token.map else line
        for one in token.children or ():
            target = str(one.attrs.get("href") or one.attrs.get("src") or "")
            if target and not re.match(r"\w+:|#", target):
                found.append(Span(page, line, target))
    return found
