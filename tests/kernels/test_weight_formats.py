"""Weight formats: what an entry says of itself is what the layer then holds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from skylapse.kernels.linear import linear
from skylapse.kernels.linear_quantized import DTYPES, linear_quantized, quantize_rows
from skylapse.kernels.weight_formats import FORMATS, words
from skylapse.runtime.layers.linear import Linear

SOURCES = {"to_k": 32, "to_v": 16}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_in(name: str, rows: Tensor, dtype: torch.dtype = torch.float32) -> Linear:
    """A layer whose weight is made of rows [48, 64], its bias 1."""
    layer = Linear(64, SOURCES).to(dtype).requires_grad_(False)
    layer.bias.fill_(1)
    layer.keep_in(FORMATS[name], torch.device("cpu"))
    layer.fill(0, rows[:32])
    layer.fill(32, rows[32:])
    return layer


def test_words_are_known_without_torch() -> None:
    code = "from skylapse.runtime.core.config import QUANTIZE; import sys; print('torch' in sys.modules, *QUANTIZE)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["False", *words()] and words() == ("none", "fp8", "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_takes_the_bytes_that_its_format_says(name: str, dtype: torch.dtype) -> None:
    layer = layer_in(name, draw(48, 64), dtype)
    held = sum(p.nbytes for p in layer.parameters()) - layer.bias.nbytes
    assert layer.format is FORMATS[name] and FORMATS[name].num_bytes(48, 64, dtype) == held
    assert held == 48 * 64 * (dtype.itemsize if name == "plain" else 1) + (0 if name == "plain" else 4 * 48)


@pytest.mark.parametrize("kind", DTYPES)
def test_a_layer_in_8_bits_runs_the_quantised_product(kind: str) -> None:
    x, rows = draw(2, 5, 64), draw(48, 64, seed=1)
    expected = linear_quantized(x, *quantize_rows(rows, DTYPES[kind]), torch.ones(48), "gelu_tanh")
    assert torch.equal(layer_in(kind, rows)(x, "gelu_tanh"), expected)


def test_a_plain_layer_runs_the_plain_product() -> None:
    x, rows = draw(5, 64), draw(48, 64, seed=1)
    assert torch.equal(layer_in("plain", rows)(x, "gelu_tanh"), linear(x, rows, torch.ones(48), "gelu_tanh"))


def test_each_source_must_have_sides_that_the_format_takes() -> None:
    for layer in (Linear(64, {"to_q": 24, "to_k": 24}), Linear(40, {"to_q": 16})):
        with pytest.raises(ValueError, match="its sides must be multiples of 16, got"):
            layer.keep_in(FORMATS["int8"], torch.device("cpu"))
