"""Rules of imports between parts, and others that a reader of the tree relies on; read from the syntax alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "kernels", "compile", "serve", "benchmarks")

# serve -> runtime -> compile -> kernels; the root's files are the public face and the command line.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "compile": {"compile", "kernels"},
    "runtime": {"runtime", "compile", "kernels"},
    "serve": {"serve", "runtime"},
    "benchmarks": {"benchmarks", "serve", "runtime", "compile", "kernels"},
    "__init__.py": {"runtime"},
    "__main__.py": {"cli"},
    "cli.py": {"runtime", "serve", "benchmarks"},  # the last two only inside the commands of those names
}
LAZY_IN_CLI = {"serve", "benchmarks"}
LAZY_IN_KERNELS = {"xformers", "flash_attn_interface", "sageattention"}  # hardly anybody has them

# Third-party packages that may be imported; None: any that pyproject.toml names.
MAY_USE = {
    "kernels": {"torch", "triton", *LAZY_IN_KERNELS},
    "compile": {"torch", "triton", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "tensorrt"},
}
NEVER = {
    "runtime": {"diffusers", "fastapi", "ray", "starlette", "uvicorn"},
    "serve": {"diffusers"},
    "cli.py": {"diffusers"},
}
# runtime/core/openmp.py is run before torch is imported, and so before the settings are read.
READS_ENVIRONMENT = {Path("runtime/core/config.py"), Path("runtime/core/openmp.py")}
MAX_LINES = 400


def python_files(*folders: str) -> list[Path]:
    """Return the files of the package (and of `tests`, when asked for), relative to the root."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in [*files, *ROOT.glob("*.py")])


PACKAGE = python_files(*FOLDERS)


def part(path: Path) -> str:
    """Return the top folder of a file, or the name of a file in the root."""
    return path.parts[0]


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield (absolute name, line, inside a function) of everything that a file imports; ours begin with `skylapse`."""
    tree = ast.parse((ROOT / path).read_text())
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            base = ("skylapse", *path.parent.parts)[: len(path.parts) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                yield f"{module}.{name.name}", node.lineno, id(node) in lazy


def ours(name: str) -> str | None:
    """Return the part of the package that an imported name belongs to; None where the name is not a part's."""
    words = name.split(".")
    if words[0] != "skylapse" or len(words) == 1:
        return None
    return words[1] if (ROOT / words[1]).is_dir() or (ROOT / f"{words[1]}.py").is_file() else None


def offences_against_the_directions(path: Path) -> Iterator[str]:
    for name, line, lazy in imports(path):
        target = ours(name)
        if target is not None and target not in MAY_IMPORT[part(path)]:
            yield f"{path}:{line} imports {name}"
        elif part(path) == "cli.py" and target in LAZY_IN_CLI and not lazy:
            yield f"{path}:{line} imports {name} outside the command that needs it"


def offences_against_relative_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        if "skylapse" in {name.split(".")[0] for name in names}:
            yield f"{path}: {names[0]} should be a relative import"


def offences_against_the_field(path: Path) -> Iterator[str]:
    allowed, forbidden = MAY_USE.get(part(path)), NEVER.get(part(path), set())
    for name, line, lazy in imports(path):
        top = name.split(".")[0]
        if top == "skylapse" or top in sys.stdlib_module_names:
            continue
        early = part(path) == "kernels" and top in LAZY_IN_KERNELS and not lazy
        if top in forbidden or early or (allowed is not None and top not in allowed):
            yield f"{path}:{line} imports {name}"


def offences_against_config(path: Path) -> Iterator[str]:
    if path in READS_ENVIRONMENT:
        return
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            used = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            used = [name.name for name in node.names]
        else:
            continue
        if {"environ", "environb", "getenv"} & {*used}:
            yield f"{path}:{node.lineno} reads the environment"


def offences_against_first_lines(path: Path) -> Iterator[str]:
    if not (ROOT / path).read_text().startswith('"""'):
        yield f"{path} does not say its job in its first line"


RULES = {
    "imports_follow_the_directions": offences_against_the_directions,
    "imports_inside_the_package_are_relative": offences_against_relative_imports,
    "third_party_imports_are_those_of_the_field": offences_against_the_field,
    "environment_is_read_in_two_files": offences_against_config,
    "first_line_says_the_files_job": offences_against_first_lines,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds_in_every_file(rule: str) -> None:
    assert [offence for path in PACKAGE for offence in RULES[rule](path)] == []


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in python_files(*FOLDERS, "tests")}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_level_folders_have_no_init_file(folder: str) -> None:
    """A regular package `kernels/` on sys.path would shadow Hugging Face's package of that name."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("rule", RULES)
def test_rule_can_be_broken(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("kernels", "runtime"):
        (tmp_path / folder).mkdir()
    code = "from ..runtime import engine\nfrom .. import runtime\nimport skylapse, diffusers, os\nos.environ['A']\n"
    (tmp_path / "kernels" / "bad.py").write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert list(RULES[rule](Path("kernels/bad.py")))
