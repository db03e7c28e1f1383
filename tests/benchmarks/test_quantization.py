"""The comparison of quantised weights: what it measures of a few steps, and the table that it prints."""

import pytest

from skylapse.benchmarks import quantization
from skylapse.benchmarks.metrics import CAP_DB


@pytest.fixture(scope="module")
def result() -> dict:
    return quantization.run("demo", num_prompts=1, steps=6, fewer_steps=(6, 2))


def test_quantised_clips_are_near_the_exact_one_and_int8_nearest(result: dict) -> None:
    fp8, int8 = result["rows"]
    assert (fp8["quantize"], int8["quantize"]) == ("fp8", "int8")
    same, fewer = result["fewer_steps"]
    assert same["psnr_pooled"] == CAP_DB, "as many steps of exact weights are the same clip"
    assert fewer["psnr_pooled"] < fp8["psnr_pooled"] < int8["psnr_pooled"] < CAP_DB
    assert fp8["weights_bytes"] == int8["weights_bytes"] < 0.6 * result["weights_bytes"]


def test_table_has_a_row_of_each_way(result: dict) -> None:
    lines = quantization.markdown(result).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [
        "`fp8`",
        "`int8`",
        "exact, 6 of 6 steps",
        "exact, 2 of 6 steps",
    ]
    assert len({line.count("|") for line in lines}) == 1
