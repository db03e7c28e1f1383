"""Which weights `quantize` keeps in 8 bits, which devices can multiply them, and what a model then takes."""

from __future__ import annotations

import torch
from torch import nn

from ...kernels.linear_quantized import DTYPES
from ..config import QUANTIZE
from .linear import Linear

FP8_FROM = (8, 9)  # compute capability whose matrix instructions read fp8; int8 has been there since 8.0


def quantized_weights(denoiser: nn.Module, quantize: str | None) -> dict[str, torch.dtype]:
    """Names of the parameters that are kept in 8 bits, with their type; none for None.

    They are the projections of all blocks, 98 % of every Wan model. Embeddings, the timestep's and the text's
    projections, modulation, norms, biases and the head stay as they were: they are small, and published recipes for Wan
    agree on them (NVIDIA Model Optimizer, vLLM-Omni, ComfyUI-WanVideoWrapper). Model Optimizer also keeps the first and
    last three of 40 blocks; on the demo model (int8, 4 prompts) exact first and last blocks left clips at 46.8 dB, two
    exact ones in the middle at 47.7, so the ends are no special place there. Published checkpoints are not measured.
    """
    if quantize is None:
        return {}
    return {
        f"{name}.weight": DTYPES[quantize]
        for name, child in denoiser.named_modules()
        if isinstance(child, Linear) and name.startswith("blocks.")
    }


def parse_quantize(text: str, device: torch.device) -> str | None:
    """ "none", "fp8" or "int8" for a model on `device`; ValueError where it is another word, or the device too old."""
    if text not in QUANTIZE:
        raise ValueError(f"quantize must be {', '.join(QUANTIZE[:-1])} or {QUANTIZE[-1]}, got {text!r}")
    if text == "fp8" and device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FP8_FROM:
        major, minor = capability
        raise ValueError(f"quantize fp8 needs a GPU of sm_89 or newer, and this is sm_{major}{minor}: int8 works there")
    return None if text == "none" else text
