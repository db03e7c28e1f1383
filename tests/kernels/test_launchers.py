"""What the launchers refuse, each with one error that names the argument; nothing is launched here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.inputs import arguments

from skylapse.kernels import adaln, patch_embed, qk_norm_rope, rms_norm, solver_step

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
    ("gated_residual", 1, lambda x: x[:5], r"y must be \[7, 24\], got \[5, 24\]"),
    ("gated_residual_adaln", 4, lambda x: x[:2], r"scale must be \[3, 24\]"),
    ("rms_norm", 1, lambda x: x[:8], r"x must be \[N, dim\], weight \[dim\]"),
    ("qk_norm_rope", 0, lambda x: x[:, :-2], r"qkv must be \[N, 3 H D\]"),
    ("qk_norm_rope", 2, lambda x: x[:16], r"k_weight must be \[32\] or \[16\]"),
    ("qk_norm_rope", 3, lambda x: x[:2], r"rotation must be \[5, 8\] complex64"),
    ("qk_norm_rope", 4, lambda x: 0, "of 0 heads"),
    ("patch_embed", 0, lambda x: [], "latents must not be empty"),
    ("patch_embed", 0, lambda x: [x[0], x[1][:, :, :3]], r"latents\[1\] must divide into patches"),
    ("patch_embed", 0, lambda x: [x[0], x[1].half()], r"latents\[1\] must be \[3, T, H, W\] torch.float32"),
    ("patch_embed", 0, lambda x: [x[0].double()], r"latents\[0\] must be float32"),
    ("patch_embed", 0, lambda x: [torch.ones(1).expand(3, 2**15, 2**8, 2**8)], r"exceed 2\^31 elements"),
    ("patch_embed", 1, lambda x: x[:, :8], r"weight must be contiguous \[dim, 12\]"),
    ("patch_embed", 2, lambda x: x[:8], r"bias \[dim\]"),
    ("unpatchify", 0, lambda x: x[:12], r"tokens must be \[13, 4 C\]"),
    ("unpatchify", 1, lambda x: [0, 1, 1, 13, 1, 1], "tokens must be"),
    ("solver_step", 0, lambda x: x.half(), "latents must be float32"),
    ("solver_step", 1, lambda x: x[:, :1], r"cond must be contiguous \[16, 2, 3, 4\]"),
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
