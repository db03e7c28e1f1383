"""Write trained weights as a complete diffusers folder (half precision, at most 24 MiB)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint_folder import INDEX, SCHEDULER, WEIGHTS, checkpoint_tensors, write_json, write_module
from .data import load_frozen_vae
from .text import build_tokenizer
from .train_dit import SHIFT, DemoModel

MAX_BYTES = 24 * 2**20
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
    save_file(checkpoint_tensors(vae, torch.float16), folder / "vae" / WEIGHTS, {"format": "pt"})


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
    write_json(out / "model_index.json", INDEX | {"expand_timesteps": True})
    write_json(out / "skylapse.json", SKYLAPSE)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER | {"flow_shift": SHIFT})
    write_module(out / "vae", vae, asdict(vae.config) | statistics, torch.float16)
    write_module(out / "transformer", model.denoiser, asdict(model.denoiser.config), torch.float16)
    model.text_encoder.half().save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(json.dumps({"folder": out.name, "bytes": size}))
    if size > MAX_BYTES:
        raise ValueError(f"the demo model has {size} bytes, at most {MAX_BYTES} are allowed")


if __name__ == "__main__":
    main()
