"""3-D convolution; on a CPU always oneDNN's.

F.conv3d picks im2col + GEMM for a batch of one on the CPU, which took 3 to 9 times longer than oneDNN's direct
convolution on the VAE's shapes (fp32, AVX-512). oneDNN is asked for by name where its result is the same function.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple = (1, 1, 1), padding: Triple = (0, 0, 0)
) -> Tensor:
    """x [B, C_in, T, H, W], weight [C_out, C_in, t, h, w] -> [B, C_out, T', H', W'] in x's memory order."""
    direct = x.device.type == "cpu" and not torch.is_grad_enabled() and _has_onednn(x.dtype)
    if direct and not torch.compiler.is_exporting():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether this processor's instructions suffice for oneDNN's convolution of a dtype; it refuses where not."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
