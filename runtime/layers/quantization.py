"""Which weights `quantize` keeps in another format, and which devices can multiply them."""

from __future__ import annotations

import torch
from torch import nn

from ...kernels.toolchain import capability
from ...kernels.weight_formats import FORMATS, WeightFormat, words
from .linear import Linear


def quantized_weights(denoiser: nn.Module, quantize: str | None) -> dict[str, WeightFormat]:
    """Names of the parameters that are quantised, with their format; none for None.

    They are the projections of all blocks, 98 % of every Wan model. Embeddings, the timestep's and the text's
    projections, modulation, norms, biases and the head stay as they were: they are small, and published recipes for Wan
    agree on them (NVIDIA Model Optimizer, vLLM-Omni, ComfyUI-WanVideoWrapper). Model Optimizer also keeps the first and
    last three of 40 blocks; on the demo model (int8, 4 prompts) exact first and last blocks left clips at 46.8 dB, two
    exact ones in the middle at 47.7, so the ends are no special place there. Published checkpoints are not measured.
    """
    if quantize is None:
        return {}
    return {
        f"{name}.weight": FORMATS[quantize]
        for name, child in denoiser.named_modules()
        if isinstance(child, Linear) and name.startswith("blocks.")
    }


def refusal_of(denoiser: nn.Module, quantize: str | None) -> str | None:
    """Return which weight cannot be kept in a format and why, as loading says it; None where all can."""
    for name, form in quantized_weights(denoiser, quantize).items():
        layer = denoiser.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, Linear)
        if (reason := layer.refusal(form)) is not None:
            return f"{name} cannot be quantised to {form.name}: {reason}"
    return None


def parse_quantize(text: str, device: torch.device) -> str | None:
    """One of `words()`, "none" as None, for a model on `device`; ValueError for another, or on too old a device."""
    known = words()
    if text not in known:
        raise ValueError(f"quantize must be {', '.join(known[:-1])} or {known[-1]}, got {text!r}")
    if text == "none":
        return None
    if device.type == "cuda" and (number := capability(device)) < (needs := FORMATS[text].needs):
        working = [name for name in known[1:] if FORMATS[name].needs <= number]
        there = f"{' and '.join(working)} works there" if working else "no other format works there either"
        raise ValueError(f"quantize {text} needs a GPU of sm_{needs} or newer, and this is sm_{number}: {there}")
    return text
