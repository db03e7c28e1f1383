"""What every kernel becomes on every architecture, compiled here without a GPU."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from skylapse import cli
from skylapse.kernels import inspect
from skylapse.kernels.toolchain import ARCHITECTURES, Shipped

SHIPPED = inspect.shipped_kernels()
ALL, FIRST = inspect.on(ARCHITECTURES, SHIPPED), inspect.on(ARCHITECTURES, SHIPPED, first=True)


def name(pair: tuple[Shipped, int]) -> str:
    return f"{pair[0].op}-sm_{pair[1]}-{pair[0].configuration}".replace(" ", "-")


@pytest.mark.parametrize("pair", FIRST, ids=name)
def test_one_configuration_of_an_operation_compiles_without_spills(pair: tuple[Shipped, int]) -> None:
    assert inspect.compile_for(*pair).faults == ()


@pytest.mark.kernels
@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_every_configuration_compiles_without_faults(version: str, root: Path) -> None:
    """3.6 is what torch 2.11 pins, the oldest that may be installed with skylapse."""
    environment = dict(os.environ)
    if version != "installed":
        folder = root / ".venv" / f"triton-{version}"
        if not (folder / "triton").exists():
            pytest.skip(f"{folder.name} is not installed: `make triton-{version}` does, where a package index has it")
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "skylapse.kernels.inspect", "--json", "--jobs", str(os.cpu_count())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root.parent)
    assert not done.stderr, done.stderr
    table = json.loads(done.stdout)
    assert version == "installed" or table["triton"].startswith(f"{version}.")
    assert Counter((row["op"], row["arch"]) for row in table["kernels"]) == Counter((i.op, arch) for i, arch in ALL)
    attention = {(row["arch"], row["matrix"]) for row in table["kernels"] if row["op"] == "attention"}
    assert attention == {(80, "HMMA"), (89, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")}


@pytest.mark.kernels
def test_committed_table_is_of_these_kernels(root: Path) -> None:
    table = root / "benchmarks" / "results" / "compiled_kernels.md"
    assert inspect.digest(SHIPPED) in table.read_text(), "docs/kernels.md has the command that writes it"


def test_one_configuration_is_taken_an_operation_and_architecture() -> None:
    assert len(FIRST) == len({(item.op, arch) for item, arch in ALL}) == len({(item.op, arch) for item, arch in FIRST})


def test_every_operation_is_shipped() -> None:
    ops = {"adaln", "gated_residual", "gated_residual_adaln", "rms_norm", "qk_norm_rope", "patch_embed", "unpatchify"}
    assert {item.op for item in SHIPPED} >= ops | {"solver_step"}


def test_constants_and_types_are_all_that_a_kernel_takes() -> None:
    for item in SHIPPED:
        assert sorted([*item.types, *item.constants]) == sorted(item.kernel.arg_names), item.configuration


def test_digest_changes_with_source_and_configuration() -> None:
    item, other = SHIPPED[0], SHIPPED[-1]
    changed = [replace(item, num_warps=32), replace(item, kernel=other.kernel)]
    assert len({inspect.digest([one]) for one in (item, *changed)}) == 3


def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--arch", "90", "--op", "rms_norm", "--first", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [(row["op"], row["arch"], row["spill_bytes"]) for row in table["kernels"]] == [("rms_norm", 90, 0)]


def test_command_line_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "inspect", "--arch", "80", "--op", "unpatchify", "--first"]) == 0
    assert capsys.readouterr().out.startswith("unpatchify")
    with pytest.raises(SystemExit):
        cli.main(["kernels", "inspect", "--op", "conv"])
    assert capsys.readouterr().err.startswith("usage: skylapse kernels inspect")


def test_spill_is_a_fault_and_the_commands_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = next(item for item in SHIPPED if (item.op, item.configuration) == ("adaln", "fp32 dim 16384"))
    monkeypatch.setattr(inspect, "shipped_kernels", lambda ops: [replace(wide, num_warps=1)])  # 512 numbers a thread
    assert inspect.main(["--arch", "80"]) == 1
    assert "bytes spilt" in capsys.readouterr().err


def test_stack_that_nothing_loads_is_no_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_resources", lambda cubin: (40, 8))
    item = next(item for item in SHIPPED if item.op == "rms_norm")
    assert inspect.compile_for(item, 80).spill_bytes == 0
    monkeypatch.setattr(inspect, "LOADS", re.compile("LDG"))  # it loads from global memory
    assert inspect.compile_for(item, 80).spill_bytes == 8


def test_processes_find_what_they_compile_by_its_name() -> None:
    pairs = inspect.on((80,), inspect.shipped_kernels(["rms_norm", "unpatchify"]))
    assert len(pairs) >= 8, "as many as are shared out"
    together = inspect.compile_all(pairs, 2)
    assert [(row.op, row.configuration) for row in together] == [(item.op, item.configuration) for item, _ in pairs]
    assert together[-1] == inspect.compile_for(*pairs[-1])


def test_missing_matrix_instruction_and_too_much_shared_memory_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    item = next(item for item in SHIPPED if item.op == "rms_norm")
    monkeypatch.setitem(inspect.SHARED_LIMIT, 90, 8)
    faults = inspect.compile_for(replace(item, num_warps=8, multiplies=True), 90).faults
    assert len(faults) == 2 and "shared memory" in faults[0] and faults[1] == "no matrix instruction"


def test_unknown_operation_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inspect.main(["--op", "conv"])
    assert "no such operation: conv" in capsys.readouterr().err
