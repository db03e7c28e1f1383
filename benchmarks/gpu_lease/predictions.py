"""What the shape model says of the peaks that a lease measures: fake CUDA tensors, so it needs no device."""

from __future__ import annotations

import torch

from ...kernels.fake_cuda import fake_cuda
from ...runtime.models.checkpoint import allocate
from ...runtime.models.peaks import coding_bytes, step_bytes
from ...runtime.models.quantization import quantized_weights
from ...runtime.models.wan import WanConfig, WanDenoiser
from ...runtime.vae.coders import WanDecoder, WanEncoder
from ...runtime.vae.wan import WanVAE, WanVAEConfig

CUDA = torch.device("cuda")


def predicted_step(
    config: WanConfig, num_sequences: int, num_tokens: int, dtype: torch.dtype, quantize: str | None, capability: int
) -> int:
    """Bytes of a step of S sequences of n tokens, above the weights and the pack."""
    with fake_cuda(capability):
        with torch.device("meta"):
            module = WanDenoiser(config)
        keep = WanDenoiser.fp32_parameters
        in_8_bits = quantized_weights(module, quantize)
        allocate(module, device=CUDA, dtype=dtype, fp32_parameters=keep, quantized=in_8_bits)
        module.requires_grad_(False).eval()
        return step_bytes(module, num_sequences, num_tokens, "cuda")


def predicted_coding(
    config: WanVAEConfig, part: str, dtype: torch.dtype, chunk: int, height: int, width: int, capability: int
) -> int:
    """Bytes of coding three chunks of frames of height x width pixels, above the weights; part: encode or decode."""
    factor, frames = config.scale_factor_spatial, config.scale_factor_temporal
    decodes = part == "decode"
    channels = config.z_dim if decodes else 3
    sides = (height // factor, width // factor) if decodes else (height, width)
    counts = (1, chunk, chunk) if decodes else (1, frames * chunk, frames * chunk)
    with fake_cuda(capability):
        with torch.device("meta"):
            module = WanVAE(config)
            half = WanDecoder(module) if decodes else WanEncoder(module)
        allocate(half, device=CUDA, dtype=dtype)
        half.requires_grad_(False).eval()
        shapes = [(1, channels, count, *sides) for count in counts]
        return coding_bytes(half, shapes, torch.zeros(1, dtype=dtype, device=CUDA))
