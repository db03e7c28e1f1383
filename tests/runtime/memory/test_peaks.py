"""The peak bytes of a step of the published models on CUDA, by fake tensors: one that lives too long is seen here."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.kernels.patch_embed import Grid
from skylapse.runtime.checkpoints.configs import parse_config
from skylapse.runtime.checkpoints.published import component
from skylapse.runtime.families.wan import denoiser as wan
from skylapse.runtime.families.wan.denoiser import WanConfig
from skylapse.runtime.memory.peaks import PACKAGE, code_digest, fake_denoiser, step_bytes

CONFIGS = {"14B": "wan-14b", "5B": "wan-5b", "1.3B": "wan-1.3b"}


def peak_of(model: str, grid: Grid, quantize: str | None = None) -> float:
    """Return the peak KB (1000 bytes) a token of a step of a guided pair, beside weights, the pack and its latents."""
    config = parse_config(WanConfig, component(CONFIGS[model]), model)
    with fake_cuda(90):
        denoiser = fake_denoiser(config, torch.bfloat16, quantize)
        return step_bytes(denoiser, 2, math.prod(grid), "cuda") / (2 * math.prod(grid)) / 1000


NATIVE = {"480p": (21, 30, 52), "704p": (31, 22, 40), "720p": (21, 45, 80)}


@pytest.mark.parametrize(
    ("model", "size", "quantize", "kilobytes"),
    [
        # In bf16: 107.1, 107.1, 88.7, 51.8 before GELU was fused, dead tensors dropped and the feed-forward split.
        ("14B", "720p", None, 71.8),
        ("14B", "480p", None, 71.8),
        ("5B", "704p", None, 43.1),
        ("1.3B", "480p", None, 22.8),
        ("14B", "720p", "fp8", 71.8),
        ("5B", "704p", "fp8", 49.2),  # a byte an element of what the second product reads, beside its bf16
    ],
)
def test_a_step_holds_so_much_a_token(model: str, size: str, quantize: str | None, kilobytes: float) -> None:
    assert peak_of(model, NATIVE[size], quantize) == pytest.approx(kilobytes, rel=0.03)


@pytest.mark.parametrize("num_rows", [8, 9, 16, 20])
def test_a_feed_forward_in_parts_computes_what_the_whole_does(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = wan.FeedForward(32, 64).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for parameter in ffn.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw))
    x = torch.randn(num_rows, 32, generator=draw)
    whole, kept, seen = ffn(x), x.clone(), []
    monkeypatch.setattr(wan, "FFN_ROWS", 8)
    ffn.up.register_forward_hook(lambda layer, given, result: seen.append(len(given[0])))
    torch.testing.assert_close(ffn(x), whole, rtol=1e-5, atol=1e-4)
    assert seen == {8: [8], 9: [5, 4], 16: [8, 8], 20: [7, 7, 6]}[num_rows] and torch.equal(x, kept)


def test_stored_peaks_are_of_the_code_that_made_them(tmp_path: Path) -> None:
    """Every module of ours that makes a part of a model counts, in whichever folder it stands."""
    counted = {wan.__name__, "skylapse.runtime.vae.wan", "skylapse.runtime.layers.linear", "skylapse.kernels.attention"}
    for name in counted:
        copied = tmp_path / Path(str(sys.modules[name].__file__)).relative_to(PACKAGE)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(name)
        before = code_digest(tmp_path)
        code_digest.cache_clear()
        copied.write_text(f"{name} has changed")
        assert code_digest(tmp_path) != before, name
        code_digest.cache_clear()
