"""Every kernel in Triton's interpreter against its plain formula in float64, on ragged shapes and poisoned memory."""

import json
from pathlib import Path
from typing import Any

import pytest
from kernels.interpreter import interpret

# Greatest distance of an element from the formula's, in units of the result's root mean square. A result of 4 units is
# rounded by up to 2^-9 of itself in bf16 and 2^-12 in fp16: the tables allow about four times that.
TOLERANCES = {"torch.float32": 1e-5, "torch.float16": 5e-3, "torch.bfloat16": 6e-2}
CHECKS = {
    "norms": "adaln",
    "residuals": "gated residual, alone and fused with the next norm",
    "rms": "rms_norm",
    "qk": "qk_norm_rope",
    "embed": "patch_embed",
    "unpatchify": "unpatchify",
    "solver": "solver_step",
}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """One process for all of them: importing torch takes longer than any of the checks."""
    lines = interpret(Path(__file__).with_name("numerics.py")).splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("check", CHECKS, ids=CHECKS.values())
def test_kernel_computes_its_formula_and_writes_every_element(check: str, results: list[dict[str, Any]]) -> None:
    cases = [result for result in results if result["case"].split()[0] == check]
    assert len(cases) >= 9, "all shapes and dtypes were run"
    assert [case for case in cases if not case["worst"] <= TOLERANCES[case["dtype"]]] == []
