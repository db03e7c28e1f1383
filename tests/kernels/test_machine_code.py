"""What is read from machine code: on listings written by hand, and on kernels compiled here without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from skylapse.kernels import attention_kernels, inspect, machine_code
from skylapse.kernels.attention_kernels import Configuration
from skylapse.kernels.inspect import Compiled

WIDE = Configuration(block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=True)
# 2 programs an SM: too few registers for ptxas to leave products running
NARROW = Configuration(block_m=128, block_n=64, num_warps=8, num_stages=2, descriptors=True, maxnreg=128)


def listing(text: str) -> str:
    """As nvdisasm prints it: labels at the margin, instructions with their address."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines)
    )


def compiled(how: Configuration, head: int = 128, biased: bool = False, arch: int = 90) -> Compiled:
    return inspect.compile_for(attention_kernels.compiled(arch, "bf16", head, biased, how), arch)


LOOP = listing(
    """
    LDG.E R0, [R2]
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0
    .L_x_1:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13], R13
    @!P0 BRA `(.L_x_3)
    .L_x_2:
    WARPGROUP.ARRIVE
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    UTMALDG.2D [UR24], [UR10]
    @P1 BRA `(.L_x_1)
    UTMASTG.2D [UR24], [UR10]
    EXIT
    .L_x_3:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13], R13
    @!P0 BRA `(.L_x_3)
    BRA `(.L_x_2)
    .L_x_4:
    BRA `(.L_x_4)
    """
)


def test_loop_has_its_instructions_and_those_that_spin_for_it_and_no_others() -> None:
    code = machine_code.read(LOOP)
    assert (code.matrix, code.loop, code.loop_waits) == ("HGMMA", 8 + 3, (0, 1))
    assert (code.bulk_loads, code.bulk_stores, code.loop_reads) == (1, 1, 0)
    assert (code.products, code.waits) == (2, 2)


def test_products_are_serialised_where_each_is_waited_for_unasked() -> None:
    code = machine_code.read(LOOP)
    assert [code.serialised(asked) for asked in (1, 2)] == [True, False]
    assert not replace(code, products=12, waits=3).serialised(2), "one more, where paths meet"
    assert not replace(code, products=0, waits=0).serialised(0)


def test_loop_around_a_loop_of_products_is_not_the_inner_one() -> None:
    inner = [".L_x_2:", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "IADD3 R1, R1, 0x1, RZ", "@P0 BRA `(.L_x_2)"]
    spin = [".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_x_2)"]
    for inside, loop in ((inner, 3), (spin, 5)):
        text = [".L_x_1:", "MOV R0, R1", *inside, "LDG.E R0, [R2]", "@P1 BRA `(.L_x_1)", "EXIT"]
        code = machine_code.read(listing("\n".join(text)))
        assert (code.loop, code.loop_reads) == (loop, int(inside is spin))


def test_without_a_loop_there_is_none() -> None:
    assert machine_code.read("") == machine_code.Code("", 0, (), 0, 0, 0, 0, 0)
    assert machine_code.read(listing("HMMA.16816 R4, R8, R12, R4\nEXIT")).loop == 0


# --- attention, compiled for sm_90 ------------------------------------------------------------------------------------


def test_whole_tiles_of_keys_are_not_masked() -> None:
    """With masks on every tile the loop had 619 instructions."""
    row = compiled(WIDE)
    assert (row.faults, row.matrix, row.full_waits) == ((), "HGMMA", 1)
    assert row.loop < 520 and row.registers < 200 and row.spill_bytes == 0
    assert row.bulk_loads > 0 and row.bulk_stores == 1


@pytest.mark.parametrize(("arch", "how"), [(90, WIDE), (80, replace(WIDE, block_n=64, descriptors=False))])
def test_bias_is_not_read_by_every_thread_for_each_of_its_columns(arch: int, how: Configuration) -> None:
    """It was read by 32 instructions a turn on sm_90, and by 16 on sm_80."""
    row = compiled(how, biased=True, arch=arch)
    assert (row.faults, row.loop_reads) == ((), 0)
    assert row.loop < 620


def test_kernel_by_pointers_reads_nothing_by_the_copy_engine() -> None:
    row = compiled(Configuration(block_m=64, block_n=64, num_warps=4, num_stages=2))
    assert (row.faults, row.matrix, row.bulk_loads, row.bulk_stores) == ((), "HGMMA", 0, 0)


@pytest.mark.parametrize("witness", ["ptxas", "machine code"])
def test_serialised_products_are_a_fault_by_either_witness(witness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if witness == "ptxas":
        monkeypatch.setattr(machine_code.Code, "serialised", lambda self, asked: False)
    else:
        monkeypatch.setattr(inspect, "_ptxas_log", lambda ptx, arch: "")
    row = compiled(NARROW)
    assert row.registers <= 128, "the bound has reached the compiler"
    (fault,) = row.faults
    assert fault.startswith("wgmma serialised: ")
    assert ("register" in fault) == (witness == "ptxas")
    assert row.full_waits > 8, "a wait behind each product"


def test_narrow_launch_of_a_small_head_leaves_products_running() -> None:
    row = compiled(NARROW, head=64)
    assert row.faults == () and row.registers <= 128


def test_warps_that_are_silently_not_specialised_are_a_fault() -> None:
    specialized: dict[str, Any] = dict(block_m=128, block_n=128, num_stages=2, descriptors=True, warp_specialized=True)
    assert compiled(Configuration(num_warps=4, **specialized), head=64).faults == ()
    assert compiled(Configuration(num_warps=8, **specialized), head=64).faults == ("warps not specialised",)
