"""Train the demo model's text encoder and denoiser by flow matching on the frozen VAE's latents (resumable).

Source: flow matching (arXiv 2210.02747) with logit-normal timesteps (arXiv 2403.03206). In half of the samples some
latent frames are given clean at timestep 0 (first, last, both, or a prefix), so that one model does text-to-video,
image-to-video, extension and interpolation. Prompts are dropped in a tenth of the samples, for guidance.

Shape letters: B clips, C latent channels, T latent frames, H, W latent rows and columns, N = B T (H/2) (W/2) tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from ...runtime.checkpoints.weights import load_weights
from ...runtime.families.wan import denoiser as wan
from ...runtime.families.wan.denoiser import TEXT_ROWS, WanConfig, WanDenoiser
from ...runtime.layers.pack import Context, Pack, build_rotation
from .data import BUCKETS, Stock, draw_caption, draw_given, load_frozen_vae
from .text import TEXT_DIM, build_text_encoder, build_tokenizer
from .training import Average, restore_state, save_state, trainable_attention, trainable_rms_norm

CONFIG = WanConfig(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=48,
    out_channels=48,
    text_dim=TEXT_DIM,
    freq_dim=256,
    ffn_dim=1024,
    num_layers=6,
)
SHIFT = 3.0
TEXT_LENGTH = 20  # longest caption of the grammar with fillers, `</s>` and the folded padding row


class DemoModel(nn.Module):
    """Text encoder and denoiser, trained together."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocab_size)
        self.denoiser = WanDenoiser(CONFIG)

    def forward(self, latents: Tensor, given: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Velocity [B, C, T, H, W] for noised latents; `given` [B, T] marks clean frames, sigma [B], tokens [B, L]."""
        batch, _, frames, height, width = latents.shape
        grid = (frames, height // 2, width // 2)
        num_tokens = math.prod(grid)
        frame_ids = torch.where(
            given, 0, torch.arange(1, batch + 1, device=latents.device)[:, None]
        )  # row 0: timestep 0
        rotation = build_rotation(self.denoiser.config.attention_head_dim, [grid], latents.device)
        pack = Pack(
            grids=[grid] * batch,
            cu_seqlens=tuple(range(0, batch * num_tokens + 1, num_tokens)),
            modulation_ids=frame_ids.flatten().repeat_interleave(grid[1] * grid[2]),
            rotation=rotation.repeat(batch, 1),
            text=self._text(tokens),
            image=None,
        )
        timesteps = F.pad(sigma * 1000, (1, 0))
        embedding, modulation = self.denoiser.condition_embedder.embed_time(timesteps, torch.float32)
        x = self.denoiser.embed(list(latents)).float()
        x = self.denoiser.trunk(x, modulation, pack)
        return torch.stack(self.denoiser.head(x, embedding, pack)).float()

    def _text(self, tokens: Tensor) -> Context:
        """Fold text as `WanDenoiser.encode_text`, at one length: rows past the first padding row count nothing."""
        batch, length = tokens.shape
        real = tokens != 0
        rows = self.text_encoder(tokens, real.long()).last_hidden_state * real[..., None]
        counts = real.sum(1, keepdim=True)
        position = torch.arange(length, device=tokens.device)
        fold = torch.log((TEXT_ROWS - counts).float()).expand(batch, length)
        bias = torch.where(position < counts, 0.0, torch.where(position == counts, fold, float("-inf")))
        keys_values = self.denoiser.text_keys_values(rows.flatten(0, 1))
        return Context(keys_values, tuple(range(0, batch * length + 1, length)), bias.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--vae", type=Path, required=True, help="folder that train_vae wrote, or a diffusers vae folder"
    )
    parser.add_argument("--start", type=Path, default=None, help="a diffusers folder whose weights to start from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=75.0, help="length of the whole schedule, over all sittings")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--report-s", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    F.rms_norm = trainable_rms_norm  # type: ignore[assignment]
    wan.attention = trainable_attention  # type: ignore[attr-defined]
    vae, scale = load_frozen_vae(args.vae, device)
    tokenizer = build_tokenizer()
    model = initialise(DemoModel(len(tokenizer)))
    if args.start:
        start_from(model, args.start)
    model.to(device)
    average = Average(model, 0.999)
    optimizers = build_optimizers(model, args.learning_rate)
    state = args.out / "state.safetensors"
    counts = restore_state(state, model, average, optimizers)
    step, elapsed_s = int(counts.get("step", 0)), counts.get("elapsed_s", 0.0)
    generator = torch.Generator().manual_seed(args.seed + 1000 + step)
    stocks = [Stock(bucket, vae, scale, generator) for bucket in BUCKETS]
    for stock in stocks:
        for _ in range(stock.bucket.stock // 96):  # a third; training fills the rest
            stock.refill(32)
    print(json.dumps({"stocked": [len(s.labels) for s in stocks]}), flush=True)
    (args.out / "config.json").write_text(json.dumps(asdict(CONFIG)))
    losses: list[float] = []
    began = last_report = time.monotonic() - elapsed_s
    while (elapsed_s := time.monotonic() - began) < args.minutes * 60:
        set_rates(optimizers, args.learning_rate, step, elapsed_s / (args.minutes * 60))
        stock = stocks[int(torch.multinomial(torch.tensor([b.weight for b in BUCKETS]), 1, generator=generator))]
        if step % 2 == 0:
            stock.refill(stock.bucket.fresh)
        latents, lone_last, labels = stock.draw()
        texts = [draw_caption(label, generator) for label in labels]
        tokens = tokenizer(
            texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        loss = flow_loss(model, latents, lone_last, tokens, generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        average.update(step)
        losses.append(loss.item())
        if elapsed_s - last_report + began > args.report_s or step == 20:
            last_report = began + elapsed_s
            save_state(state, model, average, optimizers, step=step, elapsed_s=elapsed_s)
            recent = losses[-200:]
            print(
                json.dumps(
                    {"step": step, "minutes": round(elapsed_s / 60, 1), "loss": round(sum(recent) / len(recent), 4)}
                ),
                flush=True,
            )
    save_state(state, model, average, optimizers, step=step, elapsed_s=elapsed_s)


def flow_loss(
    model: DemoModel, latents: Tensor, lone_last: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity over the frames that are not given."""
    batch, _, frames = latents.shape[:3]
    given, lone = draw_given(batch, frames, generator)
    u = torch.sigmoid(torch.randn(batch, generator=generator))
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn(latents.shape, generator=generator)
    mix = sigma[:, None, None, None, None]
    noised = (1 - mix) * latents + mix * noise
    shown = torch.cat(
        (latents[:, :, :-1], torch.where(lone[:, None, None, None, None], lone_last, latents[:, :, -1:])), 2
    )
    x = torch.where(given[:, None, :, None, None], shown, noised)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        velocity = model(x.to(device), given.to(device), sigma.to(device), tokens.to(device))
    error = (velocity.cpu() - (noise - latents)).square().mean(dim=(1, 3, 4))  # [B, T]
    wanted = (~given).float()
    return (error * wanted).sum() / wanted.sum()


def build_optimizers(model: DemoModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon) for the blocks' matrices, AdamW for the rest."""
    matrices = [p for p in model.denoiser.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=10 * learning_rate, weight_decay=0.0, momentum=0.95)
    return [muon, torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]


def set_rates(optimizers: list[torch.optim.Optimizer], learning_rate: float, step: int, share: float) -> None:
    """Warm up over 100 steps, hold, fall over the last half of the schedule."""
    factor = min(1.0, (step + 1) / 100) * (1.0 if share < 0.5 else max(0.02, (1 - share) / 0.5))
    for optimizer, rate in zip(optimizers, (10 * learning_rate, learning_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def initialise(model: DemoModel) -> DemoModel:
    """Normal matrices, zero output layers; gates start small through the modulation table."""
    for name, p in model.denoiser.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif "norm" in name:
            nn.init.ones_(p)
        elif "scale_shift_table" in name:
            nn.init.normal_(p, std=0.02)
        elif "proj_out" in name or "time_proj" in name:
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    for block in model.denoiser.layers:
        block.scale_shift_table.data[:, (2, 5)] += 0.3
        for layer in (block.attn1.out, block.attn2.out, block.ffn.down):
            layer.weight.data.mul_(0.3)
    return model


def start_from(model: DemoModel, folder: Path) -> None:
    """Take text encoder and denoiser of a diffusers folder (optimizers start afresh)."""
    with torch.device("meta"):
        denoiser = WanDenoiser(CONFIG)
    load_weights(denoiser, folder / "transformer", device=torch.device("cpu"), dtype=torch.float32)
    model.denoiser.load_state_dict(denoiser.state_dict())
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    model.text_encoder.load_state_dict(text_encoder.state_dict())


if __name__ == "__main__":
    main()
