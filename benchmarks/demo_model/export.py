"""Write trained weights as a complete diffusers folder (half precision, at most 24 MiB)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...runtime.models.checkpoint import slots
from ...runtime.models.wan import WanDenoiser
from ...runtime.vae.wan import WanVAE, checkpoint_name
from .data import load_frozen_vae
from .text import build_tokenizer
from .train_dit import SHIFT, DemoModel

MAX_BYTES = 24 * 2**20
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": SHIFT,
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
    "_diffusers_version": "0.42.1",
    "boundary_ratio": None,
    "expand_timesteps": True,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SKYLAPSE = {
    "defaults": {
        "width": 64,
        "height": 64,
        "num_frames": 17,
        "fps": 8,
        "num_inference_steps": 30,
        "guidance_scale": 4.0,
    },
    "native_sizes": [[64, 64], [96, 64], [64, 96]],
    "limits": {"max_num_frames": 33, "max_pixels": 128 * 128},
    "cache": {
        "high": "easy:0.1",
        "balanced": "easy:threshold=0.3,warmup=0.1",
        "fast": "easy:threshold=0.55,warmup=0.1,max_skips=6",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="folder that train_vae wrote")
    parser.add_argument("--dit", type=Path, help="folder that train_dit wrote; without it, one of a --decoder-only run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.dit is None:
        replace_decoder(args.vae, args.out)
    else:
        export(args.vae, args.dit, args.out)


def replace_decoder(vae_run: Path, folder: Path) -> None:
    """Give a folder the decoder of a `train_vae --decoder-only` run, whose latents are the folder's own."""
    vae, _ = load_frozen_vae(vae_run, torch.device("cpu"))
    save_file(checkpoint_tensors(vae), folder / "vae" / WEIGHTS, {"format": "pt"})


def export(vae_run: Path, dit_run: Path, out: Path) -> None:
    """Write the averaged weights of two trainings to `out`; raises ValueError where the folder grows over 24 MiB."""
    vae, (mean, std) = load_frozen_vae(vae_run, torch.device("cpu"))
    tokenizer = build_tokenizer()
    model = DemoModel(len(tokenizer))
    state = load_file(dit_run / "state.safetensors")
    model.load_state_dict(
        {name[8:]: value for name, value in state.items() if name.startswith("average.")}, strict=False
    )
    statistics = {"latents_mean": mean.flatten().tolist(), "latents_std": std.flatten().tolist()}
    write_json(out / "model_index.json", INDEX)
    write_json(out / "skylapse.json", SKYLAPSE)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_module(out / "vae", vae, "AutoencoderKLWan", asdict(vae.config) | statistics)
    write_module(out / "transformer", model.denoiser, "WanTransformer3DModel", asdict(model.denoiser.config))
    model.text_encoder.half().save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(json.dumps({"folder": out.name, "bytes": size}))
    if size > MAX_BYTES:
        raise ValueError(f"the demo model has {size} bytes, at most {MAX_BYTES} are allowed")


def write_module(folder: Path, module: WanVAE | WanDenoiser, class_name: str, config: dict[str, Any]) -> None:
    """config.json and the weights under the checkpoint's names, in fp16 but for what is kept in fp32."""
    write_json(folder / "config.json", {"_class_name": class_name, "_diffusers_version": "0.42.1"} | config)
    tensors = checkpoint_tensors(module)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def checkpoint_tensors(module: WanVAE | WanDenoiser) -> dict[str, Tensor]:
    """Checkpoint name -> tensor: the loader's mapping, the other way."""
    keep = getattr(module, "fp32_parameters", ())
    places = slots(module, checkpoint_name) if isinstance(module, WanVAE) else slots(module)
    parameters = dict(module.named_parameters())
    tensors = {}
    for name, slot in places.items():
        value = parameters[slot.parameter].detach()[slot.rows]
        if isinstance(module, WanDenoiser) and name == "patch_embedding.weight":
            value = value.view(len(value), module.config.in_channels, *module.config.patch_size)
        dtype = torch.float32 if any(part in name for part in keep) else torch.float16
        tensors[name] = value.to(dtype).contiguous().clone()
    return tensors


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
