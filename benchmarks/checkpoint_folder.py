"""Write checkpoint folders in diffusers' format from our modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..runtime.checkpoints.weights import slots
from ..runtime.families.wan.denoiser import WanDenoiser
from ..runtime.vae.wan import WanVAE, checkpoint_name

WEIGHTS = "diffusion_pytorch_model.safetensors"
VERSION = {"_diffusers_version": "0.42.1"}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "disable_corrector": [],
}
INDEX = {
    "_class_name": "WanPipeline",
    **VERSION,
    "boundary_ratio": None,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def write_module(
    folder: Path, module: WanVAE | WanDenoiser, config: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write config.json and the weights; see `checkpoint_tensors`."""
    name = "AutoencoderKLWan" if isinstance(module, WanVAE) else "WanTransformer3DModel"
    write_json(folder / "config.json", {"_class_name": name, **VERSION} | config)
    save_file(checkpoint_tensors(module, dtype), folder / WEIGHTS, {"format": "pt"})


def checkpoint_tensors(module: WanVAE | WanDenoiser, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return checkpoint name -> tensor on the host: the loader's mapping, reversed.

    dtype: of all parameters but those that the loader keeps in fp32; None leaves each as it is.
    """
    keep = getattr(module, "fp32_parameters", ())
    places = slots(module, checkpoint_name) if isinstance(module, WanVAE) else slots(module)
    parameters = dict(module.named_parameters())
    tensors = {}
    for name, slot in places.items():
        value = parameters[slot.parameter].detach()[slot.rows]
        if isinstance(module, WanDenoiser) and name == "patch_embedding.weight":
            value = value.view(len(value), module.config.in_channels, *module.config.patch_size)
        kept = torch.float32 if any(part in name for part in keep) else dtype or value.dtype
        tensors[name] = value.to(kept).contiguous().cpu().clone()
    return tensors


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
