"""Predict the peaks that a lease measures, by the shape model; at home, since fake tensors need no device."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from itertools import product

import torch

from ...kernels.fake_cuda import fake_cuda
from ...runtime.families.wan.denoiser import WanConfig
from ...runtime.memory.peaks import chunk_shapes, coding_bytes, fake_coder, fake_denoiser, step_bytes
from ...runtime.vae.coders import WanDecoder, WanEncoder
from ...runtime.vae.wan import WanVAEConfig
from ..kernels.memory_bound import GRIDS
from ..record import Measurement
from .blocks import BRANCHES, LAYERS, WEIGHTS, peak_name, settings_of
from .lines import measured
from .vae import CHUNKS, SIZES, words_of

CODINGS = (("decode", torch.bfloat16), ("decode", torch.float32), ("encode", torch.float32))


def predicted_peaks(names: Collection[str], capability: int) -> list[Measurement]:
    """Return `NAME/predicted`, in bytes, for each of these figures that is a peak of a step or of coding."""
    asked: dict[str, Callable[[], int]] = {}
    for setting, kind in product(settings_of(GRIDS), WEIGHTS):
        config, branches = WanConfig(num_layers=LAYERS), BRANCHES[setting.branches]
        given = config, branches, setting.num_tokens, torch.bfloat16, kind, capability
        asked[peak_name(setting, kind)] = partial(predicted_step, *given)
    for size, (part, dtype), chunk in product(SIZES, CODINGS, CHUNKS):
        coded = size.config, part, dtype, chunk, size.height, size.width, capability
        asked[f"peaks/{words_of(size, dtype, chunk)}/{part}"] = partial(predicted_coding, *coded)
    return [
        measured(f"{name}/predicted", "bytes", [predict()], "neither")
        for name, predict in asked.items()
        if name in names
    ]


def predicted_step(
    config: WanConfig, num_sequences: int, num_tokens: int, dtype: torch.dtype, quantize: str | None, capability: int
) -> int:
    """Return the peak bytes of a step of S sequences of n tokens, above the weights and the pack."""
    with fake_cuda(capability):
        return step_bytes(fake_denoiser(config, dtype, quantize), num_sequences, num_tokens, "cuda")


def predicted_coding(
    config: WanVAEConfig, part: str, dtype: torch.dtype, chunk: int, height: int, width: int, capability: int
) -> int:
    """Return the peak bytes of coding three chunks of frames of height x width pixels, above the weights.

    part: encode or decode.
    """
    factor, decodes = config.scale_factor_spatial, part == "decode"
    shapes = chunk_shapes(config, decodes, height // factor, width // factor, chunk)
    with fake_cuda(capability):
        half = fake_coder(config, WanDecoder, dtype) if decodes else fake_coder(config, WanEncoder, dtype)
        return coding_bytes(half, shapes, torch.zeros(1, dtype=dtype, device="cuda"))
