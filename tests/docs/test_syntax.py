"""Every block and every command in README and docs/ is one that our programs, a shell, Python or a reader takes."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from markdown_blocks import PAGES, ROOT, Block, Span, blocks, links, spans
from our_commands import Call, calls

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELLS = [block for block in BLOCKS if block.is_shell]
SPANS = [
    span
    for page in PAGES
    for span in spans(page)
    if re.match(r"(\.venv/bin/)?(skylapse |python -m skylapse)|make ", span.text)
]
PROGRAMS = {  # that a document may call; of those that are not ours a shell checks the line alone
    "skylapse", "python", "python3", "make", "pip", "source", "export", ".ci/run", "mkdir", "cat", "cp", "curl",
    "docker", "kubectl", "jq", "serve", "ray", "promtool", "prometheus", "psql", "pg_dump", "nsys", "ncu",
}  # fmt: skip
WANTING = "the following arguments are required"


def place(found: Block | Span) -> str:
    return found.place


def test_documents_have_blocks_and_commands() -> None:
    assert len(SHELLS) > 15 and sum(len(block.commands) for block in SHELLS) > 60 and len(SPANS) > 60


@pytest.mark.parametrize("block", SHELLS, ids=place)
def test_shell_takes_the_block_and_knows_its_programs(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in block.commands:
        words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        assert Path(words[0]).name in PROGRAMS or words[0] in PROGRAMS, f"{words[0]} is no program that a page calls"


@pytest.mark.parametrize("block", SHELLS, ids=place)
def test_our_programs_take_the_options_of_a_block(block: Block) -> None:
    said = {command: wrong for command in block.commands for call in calls(command) if (wrong := call.parse())}
    assert said == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_our_programs_take_the_options_in_a_sentence(page: Path) -> None:
    """A sentence may name a command alone, without the options that it needs."""
    said = {
        f"{span.place} {span.text}": wrong
        for span in SPANS
        if span.page == page
        for call in calls(span.text.replace("...", ""))
        if (wrong := call.parse()) and not wrong.startswith(WANTING)
    }
    assert said == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_there_are(page: Path) -> None:
    missing = []
    for link in links(page):
        name, _, heading = link.text.partition("#")
        target = page.parent / name
        if not target.exists() or (heading and heading not in headings(target)):
            missing.append(f"{link.place} {link.text}")
    assert missing == []


def headings(page: Path) -> set[str]:
    """Return the headings of a page as links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_make_has_every_target_and_every_test_that_is_named() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [line for block in SHELLS for line in block.commands] + [span.text for span in SPANS]
    for line in (line for line in named if line.startswith("make ")):
        _, target, *settings = shlex.split(line)
        assert target in targets, line
        tests = [setting.partition("=")[2] for setting in settings if setting.startswith("TESTS=")]
        paths = [word for text in tests for word in text.split() if word.startswith("tests")]
        assert [path for path in paths if not (ROOT / path).exists()] == [], line


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=place)
def test_python_compiles_and_what_it_imports_is_there(block: Block) -> None:
    tree = compile(block.text, block.place, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language not in ("", "sh", "bash", "python", "text")], ids=place
)
def test_other_languages_are_read_by_their_readers(block: Block, tmp_path: Path) -> None:
    if block.language in ("js", "javascript"):
        if (node := shutil.which("node")) is None:
            pytest.skip("node is not installed")
        (tmp_path / "block.mjs").write_text(block.text)
        subprocess.run([node, "--check", str(tmp_path / "block.mjs")], check=True)
        return
    read(block)


def read(block: Block) -> Any:
    if block.language == "yaml":
        return list(pytest.importorskip("yaml").safe_load_all(block.text))
    if block.language in ("promql", "logql"):  # by promtool, in their own tests
        return block.text
    return {"json": json.loads, "toml": tomllib.loads}[block.language](block.text)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("skylapse generate 'a star' --colour red", "unrecognized arguments: --colour red"),
        ("A=1 .venv/bin/skylapse bench serve --url http://x --rate fast", "argument --rate: invalid float value"),
        ("python -m skylapse.kernels.tune --dri-run", "unrecognized arguments"),
        ("cat x | skylapse models paint", "argument COMMAND: invalid choice"),
        ("skylapse", "the following arguments are required"),
    ],
)
def test_line_that_our_programs_refuse_is_found(line: str, wrong: str) -> None:
    (call,) = calls(line)
    assert wrong in (call.parse() or "")


def test_variables_and_what_follows_a_command_are_told_apart() -> None:
    assert list(calls("A=1 B='x y' skylapse models list > models.txt && python -m skylapse.cli --version")) == [
        Call(("skylapse", "models", "list"), (("A", "1"), ("B", "x y"))),
        Call(("python", "-m", "skylapse.cli", "--version")),
    ]
    (call,) = calls("docker run -e A=1 skylapse-cpu:1 skylapse models list")
    assert call == Call(("skylapse", "models", "list"))
    assert list(calls("kubectl create namespace skylapse")) == []
