"""NVIDIA's TensorRT bindings on a machine without TensorRT: imported over empty libraries, for their signatures alone.

    python tests/compile/bindings.py FOLDER     (`make tensorrt-bindings`; FOLDER holds the unpacked bindings package)

writes beside them `tensorrt.pyi`, which mypy judges compile/tensorrt*.py by, and `api.json`, which the stand-in of the
tests refuses unknown calls by. Both are made anew on each machine; neither may be passed on (NVIDIA's licence).
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# All that the bindings ask those libraries for by name; the rest goes through objects, of which these make none.
SHIM = """
void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return 0; }
void *createInferRuntime_INTERNAL(void *logger, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
void *getBuilderPluginRegistry(int capability) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *logger, const char *name) { return 0; }
"""
AS_BUFFER = "    def __buffer__(self, flags: int, /) -> memoryview: ...\n"
AS_SEQUENCE = "    def __iter__(self) -> collections.abc.Iterator[int]: ...\n"
DESCRIBE = """
import json, sys
import tensorrt_bindings as trt

classes = {}
for name in dir(trt):
    value = getattr(trt, name)
    if not isinstance(value, type) or name.startswith("_"):
        continue
    members = [*getattr(value, "__members__", {})]
    methods, properties = {}, []
    for part in dir(value):
        found = getattr(value, part, None)
        if isinstance(found, property):
            properties.append(part)
        elif callable(found) and (part == "__init__" or not part.startswith("_")):
            methods[part] = (found.__doc__ or "").strip()
    bases = [base.__name__ for base in value.__mro__[1:] if base.__module__.startswith("tensorrt")]
    classes[name] = {"bases": bases, "members": members, "methods": methods, "properties": properties}
constants = {name: getattr(trt, name).name for name in dir(trt) if isinstance(getattr(trt, name), trt.DataType)}
json.dump({"version": trt.__version__, "classes": classes, "constants": constants}, sys.stdout)
"""


def make_importable(folder: Path) -> None:
    """Compile the empty libraries beside the bindings. CalledProcessError or FileNotFoundError without a C compiler."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "shim.c"
        source.write_text(SHIM)
        for name in LIBRARIES:
            library = f"lib{name}.so.11"
            target = folder / "tensorrt_bindings" / library
            subprocess.run(
                ["gcc", "-shared", "-fPIC", "-o", target, source, f"-Wl,-soname,{library}"],
                check=True,
                capture_output=True,
            )


def describe(folder: Path) -> str:
    """JSON of all classes: their methods' docstrings, which begin with the signatures, properties and members."""
    command = [sys.executable, "-W", "ignore", "-c", DESCRIBE]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONPATH": str(folder)}).stdout


def write_stubs(folder: Path) -> None:
    """`tensorrt.pyi`, by pybind11-stubgen, repaired."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-W", "ignore", "-m", "pybind11_stubgen", "tensorrt_bindings.tensorrt"]
        command += ["--ignore-all-errors", "-o", scratch]
        subprocess.run(command, check=True, capture_output=True, env={"PYTHONPATH": str(folder)})
        text = (Path(scratch) / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    (folder / "tensorrt.pyi").write_text(repaired(text) + "\n__version__: str\n")


def repaired(text: str) -> str:
    """What is no Python is made Python, and what the docstrings promise too much is put right.

    A parameter is called `in`; defaults come before parameters without one; the module's own `bool` and `int32` hide
    Python's. And the docstrings do not say that a build or a deserialisation that fails returns None, that host memory
    is a buffer, and that dimensions are a sequence.
    """
    text = re.sub(r"\bin: ", "in_: ", text)
    text = re.sub(r"(?<=[\[ ])bool(?=[,\]):]| = )", "builtins.bool", text)
    lines = [f"{line.rstrip()}" for line in text.splitlines()]
    for number, line in enumerate(lines):
        if line.lstrip().startswith("def "):
            lines[number] = _with_trailing_defaults(line)
            for name in ("build_serialized_network", "deserialize_cuda_engine", "create_execution_context"):
                if f"def {name}(" in line and not line.rstrip(":").endswith("| None"):
                    lines[number] = f"{lines[number].removesuffix(':')} | None:"
    text = "\n".join(lines).replace("import typing\n", "import builtins\nimport typing\n", 1)
    text = text.replace("class IHostMemory:\n", f"class IHostMemory:\n{AS_BUFFER}", 1)
    text = text.replace("class Dims:\n", f"class Dims:\n{AS_SEQUENCE}", 1)
    ast.parse(text)
    return text


def _with_trailing_defaults(line: str) -> str:
    """`def f(a=1, b)` is no Python: everything behind the first default gets one."""
    if " = " not in line:
        return line
    head, _, rest = line.partition("(")
    inside, _, tail = rest.rpartition(")")
    parameters, depth, start = [], 0, 0
    for at, letter in enumerate(inside):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parameters.append(inside[start:at].strip())
            start = at + 1
    parameters.append(inside[start:].strip())
    seen = False
    for number, parameter in enumerate(parameters):
        if " = " in parameter:
            seen = True
            parameters[number] = f"{parameter.split(' = ')[0]} = ..."
        elif seen and not parameter.startswith("*"):
            parameters[number] = f"{parameter} = ..."
    return f"{head}({', '.join(parameters)}){tail}"


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    make_importable(folder)
    (folder / "api.json").write_text(describe(folder))
    write_stubs(folder)
    found = json.loads((folder / "api.json").read_text())
    builtins.print(f"TensorRT {found['version']}: {len(found['classes'])} classes")


if __name__ == "__main__":
    main()
