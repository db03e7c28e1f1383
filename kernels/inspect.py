"""What the compiler makes of every shipped kernel, for GPUs that are not there.

    python -m skylapse.kernels.inspect --arch 80 89 90 100 120 [--op adaln ...] [--first] [--json | --markdown]

Each configuration is compiled to machine code offline, and what is told is read from that, not from the intermediate
code. Exits with 1 where one spills, exceeds its architecture's shared memory, lacks its matrix instruction, has
products (wgmma) that ptxas serialised, or warps that were to be specialised and are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from . import machine_code
from .launches import options as triton_options
from .toolchain import ARCHITECTURES, MISSING, Shipped, triton

SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a program may ask for
SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized due to (.*?)(?: in (?:the )?function|$)", re.M)
LOADS = re.compile(r"\bLDL\b")  # from the stack


@dataclass(frozen=True)
class Compiled:
    """One row of the table."""

    op: str
    arch: int
    configuration: str
    registers: int  # a thread
    spill_bytes: int  # stack a thread that is read again: what did not fit into registers
    shared_bytes: int  # a program
    matrix: str  # the matrix instruction of the machine code; "" where none is meant or made
    loop: int  # instructions of the longest innermost loop, where matrix instructions are meant
    full_waits: int  # of that loop for wgmma, which leave no group of products running
    bulk_loads: int  # instructions by which the copy engine (TMA) reads a tile
    bulk_stores: int
    loop_reads: int  # instructions of the loop that read global memory into registers
    faults: tuple[str, ...]


def shipped_kernels(ops: Iterable[str] = ()) -> list[Shipped]:
    """Every configuration that a launcher uses; of these operations alone, where some are named."""
    found: list[Shipped] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if "\ndef shipped() -> list[Shipped]:" in path.read_text():
            found += import_module(f".{path.stem}", __package__).shipped()
    ops = {*ops}
    unknown = ops - {item.op for item in found}
    if unknown:
        raise ValueError(f"no such operation: {', '.join(sorted(unknown))}")
    return [item for item in found if not ops or item.op in ops]


def on(architectures: Iterable[int], items: Iterable[Shipped], first: bool = False) -> list[tuple[Shipped, int]]:
    """Each configuration with each architecture that it is shipped for; `first`: one an operation and architecture."""
    pairs = [(item, arch) for item in items for arch in architectures if arch in item.architectures]
    return [*{(item.op, arch): (item, arch) for item, arch in reversed(pairs)}.values()][::-1] if first else pairs


def compile_all(pairs: Sequence[tuple[Shipped, int]], jobs: int) -> list[Compiled]:
    """In processes of their own: what a machine's cores can take."""
    if jobs == 1 or len(pairs) < 8:  # a process loads torch and Triton for 5 s first
        return [compile_for(item, arch) for item, arch in pairs]
    names = [(item.op, item.configuration, arch) for item, arch in pairs]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return list(pool.map(_compile_named, names, chunksize=4))


def _compile_named(name: tuple[str, str, int]) -> Compiled:
    """Kernels are not sent to another process; it finds them by name."""
    return compile_for(_named()[name], name[2])


@lru_cache(maxsize=1)
def _named() -> dict[tuple[str, str, int], Shipped]:
    return {(item.op, item.configuration, arch): item for item, arch in on(ARCHITECTURES, shipped_kernels())}


def compile_for(item: Shipped, arch: int) -> Compiled:
    """Compile one configuration; neither a GPU nor a driver is asked for anything."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = item.kernel.arg_names
    signature = {name: item.types.get(name, "constexpr") for name in names}
    # As the launcher has it: PyTorch's storage is aligned to 16 bytes and more, and rows of these widths keep it so.
    aligned = [n for n in item.types if item.types[n].startswith("*") or n.startswith("stride") or n == "dim"]
    aligned = [n for n in aligned if not item.kernel.params[names.index(n)].do_not_specialize_on_alignment]
    source = ASTSource(
        fn=item.kernel,
        signature=signature,
        constexprs=dict(item.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = triton_options(vars(item))
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(binary.asm["cubin"])
    sass = _tool("nvdisasm", binary.asm["cubin"], "-c") if stack or item.multiplies else ""
    # Stack that nothing loads is a call's arguments: Triton 3.6 has 8 bytes of them on sm_120, of what its waits print.
    spill = stack if LOADS.search(sass) else 0
    code = machine_code.read(sass if item.multiplies else "")
    shared, limit, faults = binary.metadata.shared, SHARED_LIMIT[arch], []
    if spill:
        faults.append(f"{spill} bytes spilt")
    if shared > limit:
        faults.append(f"{shared} bytes of shared memory, {limit} there are")
    if item.multiplies and not code.matrix:
        faults.append("no matrix instruction")
    if code.products and (reason := _serialised(code, binary.asm["ptx"], arch)):
        faults.append(reason)
    if item.constants.get("SPECIALIZED") and "ttg.warp_specialize" not in binary.asm["ttgir"]:
        faults.append("warps not specialised")
    facts = (code.matrix, code.loop, code.loop_waits.count(0), code.bulk_loads, code.bulk_stores, code.loop_reads)
    return Compiled(item.op, arch, item.configuration, registers, spill, shared, *facts, tuple(faults))


def _serialised(code: machine_code.Code, ptx: str, arch: int) -> str | None:
    """Why products do not run beside one another, by ptxas' word or, where it says nothing, by its machine code."""
    if found := SERIALIZED.search(_ptxas_log(ptx, arch)):
        return f"wgmma serialised: {found[1]}"
    asked = ptx.count("wgmma.wait_group")
    return f"wgmma serialised: {code.waits} waits, {asked} asked for" if code.serialised(asked) else None


def _ptxas_log(ptx: str, arch: int) -> str:
    """What ptxas says of a kernel; Triton has thrown it away."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None, ptx[:200]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def digest(items: Iterable[Shipped]) -> str:
    """Of the kernels' sources and configurations: a table with this digest is the table of these kernels."""
    text = hashlib.sha256()
    for item in items:
        constants = {name: str(value) for name, value in item.constants.items()}
        text.update(f"{item.op} {item.configuration} {triton_options(vars(item))}".encode())
        text.update(json.dumps([dict(item.types), constants], sort_keys=True).encode())
        text.update(_source(item.kernel).encode())
    return text.hexdigest()[:16]


def markdown(rows: Iterable[Compiled]) -> Iterator[str]:
    yield "| operation | arch | configuration | registers | spilt | shared | matrix | loop | full waits | TMA |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        numbers = f"{row.registers} | {row.spill_bytes} | {row.shared_bytes} | {_words(row)}"
        yield f"| {row.op} | sm_{row.arch} | {row.configuration} | {numbers} |"


def main(arguments: list[str] | None = None, prog: str = "python -m skylapse.kernels.inspect") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[*ARCHITECTURES], choices=ARCHITECTURES)
    parser.add_argument("--op", nargs="+", default=[], help="these operations alone")
    parser.add_argument("--first", action="store_true", help="one configuration an operation and architecture")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    if triton is None:
        parser.error(f"Triton cannot be imported: {MISSING}")
    try:
        items = shipped_kernels(options.op)
    except ValueError as error:
        parser.error(str(error))
    rows = compile_all(on(options.arch, items, options.first), options.jobs)
    if options.json:
        table = {"triton": triton.__version__, "digest": digest(items), "kernels": [asdict(row) for row in rows]}
        print(json.dumps(table, indent=1))
    elif options.markdown:
        print(*markdown(rows), f"\nTriton {triton.__version__}, digest of the kernels {digest(items)}.", sep="\n")
    else:
        for row in rows:
            numbers = f"{row.registers:4d} registers {row.spill_bytes:5d} spilt {row.shared_bytes:7d} shared"
            inside = "{:8s}{:>5s} loop {:>3s} full waits {:>5s} TMA".format(*_words(row).split(" | "))
            print(f"{row.op:21s} sm_{row.arch:<4d}{row.configuration:50s}{numbers}  {inside}", *row.faults)
        print(f"Triton {triton.__version__}, digest of the kernels {digest(items)}")
    faults = [f"{row.op} sm_{row.arch} {row.configuration}: {fault}" for row in rows for fault in row.faults]
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread."""
    text = _tool("cuobjdump", cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _words(row: Compiled) -> str:
    """Matrix instruction, loop, full waits, loads and stores of the copy engine; "-" where none is."""
    if not row.matrix:
        return "- | - | - | -"
    waits = str(row.full_waits) if "GMMA" in row.matrix else "-"
    copies = f"{row.bulk_loads}+{row.bulk_stores}" if row.bulk_loads else "-"
    return f"{row.matrix} | {row.loop or '-'} | {waits} | {copies}"


def _tool(name: str, cubin: bytes, *arguments: str) -> str:
    """Triton's wheel brings NVIDIA's tools."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def _source(kernel: object) -> str:
    """Of a kernel and of the kernels that it calls."""
    module = sys.modules[kernel.__module__]
    called = {
        name: value for name, value in vars(module).items() if hasattr(value, "arg_names") and value is not kernel
    }
    own = str(kernel.src)  # type: ignore[attr-defined]
    return own + "".join(str(value.src) for name, value in sorted(called.items()) if f"{name}(" in own)


if __name__ == "__main__":
    sys.exit(main())
