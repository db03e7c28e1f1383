"""What the launchers refuse, each with one error that names the argument; nothing is launched here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.inputs import arguments

from skylapse.kernels import adaln, patch_embed, qk_norm_rope, rms_norm, solver_step


def meta(*shape: int) -> torch.Tensor:
    """Of any size, and no bytes."""
    return torch.empty(shape, device="meta")


LAUNCHERS: dict[str, Any] = {
    "adaln": adaln._adaln_triton,
    "gated_residual": adaln._gated_residual_triton,
    "gated_residual_adaln": adaln._gated_residual_adaln_triton,
    "rms_norm": rms_norm._triton,
    "qk_norm_rope": qk_norm_rope._triton,
    "patch_embed": patch_embed._patch_embed_triton,
    "unpatchify": patch_embed._unpatchify_triton,
    "solver_step": solver_step._triton,
}

# (operation, which argument, what is made of it, what the error says)
REFUSED: list[tuple[str, int, Callable[[Any], Any], str]] = [
    ("adaln", 0, lambda x: x.double(), "x must be float32, bfloat16 or float16, got torch.float64"),
    ("adaln", 0, lambda x: x.T, "x's last dimension must be contiguous"),
    ("adaln", 0, lambda x: x[None], r"x must be \[N, dim\]"),
    ("adaln", 0, lambda x: torch.ones(7, 16385), "dim at most 16384"),
    ("adaln", 1, lambda x: x[:, :8], r"shift must be \[3, 24\], got \[3, 8\]"),
    ("adaln", 2, lambda x: x[:2], r"scale must be \[3, 24\], got \[2, 24\]"),
    ("adaln", 2, lambda x: x.to("meta"), "scale must be on cpu as the others are, got meta"),
    ("adaln", 3, lambda x: x[:3], r"ids must be \[7\] int64"),
    ("adaln", 3, lambda x: x.float(), r"ids must be \[7\] int64"),
    ("adaln", 3, lambda x: x.repeat_interleave(2)[::2], "ids must be contiguous"),
    ("adaln", 3, lambda x: x.to("meta"), r"ids must be \[7\] int64 on cpu"),
    ("adaln", 1, lambda x: x[:0], r"shift must be \[1, 24\], got \[0, 24\]"),
    ("gated_residual", 1, lambda x: x[:5], r"y must be \[7, 24\], got \[5, 24\]"),
    ("gated_residual", 1, lambda x: x.to("meta"), "y must be on cpu as the others are, got meta"),
    ("gated_residual", 2, lambda x: x.to(torch.float64), "gate must be float32, bfloat16 or float16"),
    ("gated_residual_adaln", 4, lambda x: x[:2], r"scale must be \[3, 24\]"),
    ("rms_norm", 1, lambda x: x[:8], r"x must be \[N, dim\], weight \[dim\]"),
    ("rms_norm", 0, lambda x: x.long(), "x must be float32, bfloat16 or float16, got torch.int64"),
    ("rms_norm", 0, lambda x: x.repeat(1, 2)[:, ::2], "x's last dimension must be contiguous, got strides"),
    ("rms_norm", 1, lambda x: x.to("meta"), "weight must be on cpu as the others are, got meta"),
    ("rms_norm", 1, lambda x: x.repeat(2)[::2], "weight's last dimension must be contiguous"),
    ("rms_norm", 0, lambda x: meta(2**31, 24), r"x must have fewer than 2\^31 rows, got 2147483648"),
    ("qk_norm_rope", 0, lambda x: x[:, :-2], r"qkv must be \[N, 3 H D\]"),
    ("qk_norm_rope", 0, lambda x: x.double(), "qkv must be float32, bfloat16 or float16, got torch.float64"),
    ("qk_norm_rope", 0, lambda x: x.repeat(1, 2)[:, ::2], "qkv's last dimension must be contiguous"),
    ("qk_norm_rope", 0, lambda x: torch.ones(5, 3 * 16640), "qkv must be .* 2 heads of an even size"),
    ("qk_norm_rope", 0, lambda x: meta(2**31, 96), r"qkv must have fewer than 2\^31 rows"),
    ("qk_norm_rope", 1, lambda x: x.to("meta"), "q_weight must be on cpu as the others are, got meta"),
    ("qk_norm_rope", 2, lambda x: x[:16], r"k_weight must be \[32\] or \[16\]"),
    ("qk_norm_rope", 3, lambda x: x.half(), r"complex64, got \[5, 8, 2\] torch.float16 as real pairs"),
    ("qk_norm_rope", 3, lambda x: x.mT.contiguous().mT, "rotation's last dimension must be contiguous"),
    ("qk_norm_rope", 4, lambda x: 32, "of 32 heads of an even size"),
    ("qk_norm_rope", 3, lambda x: x[:2], r"rotation must be \[5, 8\] complex64"),
    ("qk_norm_rope", 4, lambda x: 0, "of 0 heads"),
    ("patch_embed", 0, lambda x: [], "latents must not be empty"),
    ("patch_embed", 0, lambda x: [x[0], x[1][:, :, :3]], r"latents\[1\] must divide into patches"),
    ("patch_embed", 0, lambda x: [x[0], x[1].half()], r"latents\[1\] must be \[3, T, H, W\] torch.float32"),
    ("patch_embed", 0, lambda x: [x[0].double()], r"latents\[0\] must be float32"),
    ("patch_embed", 0, lambda x: [torch.ones(1).expand(3, 2**15, 2**8, 2**8)], r"exceed 2\^31 elements"),
    ("patch_embed", 0, lambda x: [x[0], x[1][None]], r"latents\[1\] must be \[3, T, H, W\]"),
    ("patch_embed", 0, lambda x: [x[0][:, :0]], r"latents\[0\] must be \[3, T, H, W\]"),
    ("patch_embed", 0, lambda x: [x[0].to("meta")], r"latents\[0\] must be on cpu as the others are, got meta"),
    ("patch_embed", 1, lambda x: x[:, :8], r"weight must be contiguous \[dim, 12\]"),
    ("patch_embed", 1, lambda x: x.repeat(1, 2)[:, :12], r"weight must be contiguous \[dim, 12\]"),
    ("patch_embed", 1, lambda x: x.double(), "weight must be float32, bfloat16 or float16"),
    ("patch_embed", 2, lambda x: x.to("meta"), "bias must be on cpu as the others are, got meta"),
    ("patch_embed", 3, lambda x: (2, 2), r"patch_size must be three positive numbers, got \(2, 2\)"),
    ("patch_embed", 3, lambda x: (1, 0, 2), r"patch_size must be three positive numbers, got \(1, 0, 2\)"),
    ("patch_embed", 2, lambda x: x[:8], r"bias \[dim\]"),
    ("unpatchify", 0, lambda x: x[:12], r"tokens must be \[13, 4 C\]"),
    ("unpatchify", 0, lambda x: x.long(), "tokens must be float32, bfloat16 or float16"),
    ("unpatchify", 0, lambda x: x.T.contiguous().T, "tokens's last dimension must be contiguous"),
    ("unpatchify", 0, lambda x: x[:, :10], r"tokens must be \[13, 4 C\]"),
    ("unpatchify", 1, lambda x: [0, 1, 1, 13, 1, 1], "tokens must be"),
    ("unpatchify", 1, lambda x: [1, 1, 13, 1], "grids must have three sides each, got 4 sides"),
    ("unpatchify", 2, lambda x: (1, 2), "patch_size must be three positive numbers"),
    ("solver_step", 0, lambda x: x.half(), "latents must be float32"),
    ("solver_step", 0, lambda x: x.permute(0, 1, 3, 2), r"latents's last dimension must be contiguous"),
    ("solver_step", 0, lambda x: x.transpose(0, 1), r"latents must be contiguous \[2, 16, 3, 4\]"),
    ("solver_step", 1, lambda x: x[:, :1], r"cond must be contiguous \[16, 2, 3, 4\]"),
    ("solver_step", 1, lambda x: x.to("meta"), "cond must be on cpu as the others are, got meta"),
    ("solver_step", 2, lambda x: x.long(), "uncond must be float32, bfloat16 or float16"),
    ("solver_step", 5, lambda x: [0.5], "1 and 4 weights do not fit"),
    ("solver_step", 6, lambda x: [0.1] * 5, "4 and 5 weights do not fit 2 earlier predictions"),
    ("solver_step", 7, lambda x: None, "a corrector reads last_sample"),
    ("solver_step", 9, lambda x: x[:, :8], r"weight must be contiguous \[48, 16\]"),
]


@pytest.mark.parametrize(("name", "index", "change", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_argument_is_refused_by_name(name: str, index: int, change: Callable[[Any], Any], message: str) -> None:
    inputs = [*arguments(name)]
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=message):
        LAUNCHERS[name](*inputs)


def test_more_than_the_kernels_can_count_is_refused() -> None:
    latents, cond = meta(16, 2**10, 2**9, 2**9), meta(16, 2**10, 2**9, 2**9)
    with pytest.raises(ValueError, match=r"at most 64 channels, and 2\^31 elements or pixels"):
        solver_step._triton(latents, cond, None, 1.0, 0.7, [0.3, 0.7], [], None, [], None, None)
    with pytest.raises(ValueError, match=r"at most 64 channels"):
        solver_step._triton(*(meta(65, 1, 2, 2),) * 2, None, 1.0, 0.7, [0.3, 0.7], [], None, [], None, None)
    with pytest.raises(ValueError, match=r"a sequence's tokens exceed 2\^31 elements"):
        patch_embed._unpatchify_triton(meta(2**26, 64), [1, 2**13, 2**13], (1, 2, 2))


def test_rows_beyond_2_to_the_31_elements_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are addressed in 64 bits."""
    launched: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: launched.append(grid)

    for module in (adaln, rms_norm, qk_norm_rope):
        monkeypatch.setattr(module, "_kernel", Recorded())
    x, ids = meta(2**20, 4096), torch.empty(2**20, dtype=torch.int64, device="meta")
    assert rms_norm._triton(x, meta(4096), 1e-6).shape == x.shape
    assert adaln._adaln_triton(x, meta(1, 4096), meta(1, 4096), ids, 1e-6).shape == x.shape
    weight = meta(4096)
    heads = qk_norm_rope._triton(meta(2**20, 3 * 4096), weight, weight, meta(2**20, 64, 2), 32, 1e-6)
    assert heads.shape == (2, 2**20, 32, 128)
    assert launched == [(2**20,), (2**20,), (2**20, 2)]
