"""Train the demo model's video VAE on rendered scenes: single frames first, then whole clips (resumable).

`--decoder-only` keeps the encoder, and with it the latents that a denoiser was trained on, and sharpens what is drawn.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.vae.wan import WanVAE, WanVAEConfig
from .data import load_frozen_vae
from .scenes import SHAPES, SIZES, draw_scenes, render
from .training import Average, MatrixViews, restore_state, save_state, trainable_rms_norm

CONFIG = WanVAEConfig(
    base_dim=32,
    z_dim=48,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_temporal=4,
    scale_factor_spatial=8,
)
STILLS = (48, 1, 64, 64)  # batch, frames, height, width
CLIPS = ((6, 17, 64, 64), (6, 17, 64, 64), (4, 17, 64, 96), (4, 17, 96, 64), (3, 33, 64, 64))
# A decoder that has been trained on whole clips knows later frames: half as many a clip are half the work.
DECODER_CLIPS = ((8, 9, 64, 64), (8, 9, 64, 64), (5, 17, 64, 64), (5, 9, 64, 96), (5, 9, 96, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0, help="length of the whole schedule, over all sittings")
    parser.add_argument("--stills", type=float, default=0.12, help="share of the schedule on single frames")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--report-s", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--start", type=Path, default=None, help="run or vae folder to start from, widened")
    parser.add_argument("--decoder-only", action="store_true", help="train the decoder alone, on latents as they are")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    F.rms_norm = trainable_rms_norm  # type: ignore[assignment]
    vae = initialise(WanVAE(CONFIG))
    if args.start:
        widen(vae, load_frozen_vae(args.start, torch.device("cpu"))[0].state_dict())
    vae.to(device)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    average = Average(vae, 0.998)
    trained = [p for p in vae.parameters() if p.requires_grad]
    matrices = MatrixViews([p for p in trained if p.ndim >= 4 and min(p.shape[0], p[0].numel()) >= 32])
    others = [p for p in trained if not matrices.holds(p)]
    optimizers = [
        torch.optim.Muon(matrices.views, lr=args.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    counts = restore_state(args.out / "state.safetensors", vae, average, optimizers)
    step, elapsed_s = int(counts.get("step", 0)), counts.get("elapsed_s", 0.0)
    generator = torch.Generator().manual_seed(args.seed + 1000 + step)
    held_out = [x.to(device) for x in render(draw_scenes(12, torch.Generator().manual_seed(7)), 17, 64, 64)]
    losses: list[float] = []
    began = last_report = time.monotonic() - elapsed_s
    while (elapsed_s := time.monotonic() - began) < args.minutes * 60:
        share = elapsed_s / (args.minutes * 60)
        factor = min(1.0, (step + 1) / 50) * (1.0 if share < 0.4 else max(0.02, (1 - share) / 0.6))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.learning_rate * factor
        clips = DECODER_CLIPS if args.decoder_only else CLIPS
        batch, *shape = STILLS if share < args.stills else clips[step % len(clips)]
        scenes = draw_scenes(batch, generator)
        if args.decoder_only:  # small stars lose their tips first
            scenes.shape[: batch // 2], scenes.size[: batch // 2] = SHAPES.index("star"), list(SIZES).index("small")
        frames, coverage = (x.to(device) for x in render(scenes, *shape))
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(vae, frames, coverage, lone_last=step % 7 == 6)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        matrices.take_gradients()
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        average.update(step)
        losses.append(loss.item())
        if elapsed_s - last_report + began > args.report_s or step == 20:
            last_report = began + elapsed_s
            save(args.out, vae, average, optimizers, step, elapsed_s)
            with average.applied():
                report = evaluate(vae, *held_out)
            line = dict(step=step, minutes=elapsed_s / 60, loss=sum(losses[-50:]) / len(losses[-50:]), **report)
            print(json.dumps({name: round(value, 3) for name, value in line.items()}), flush=True)
    save(args.out, vae, average, optimizers, step, elapsed_s)


def save(
    out: Path, vae: WanVAE, average: Average, optimizers: list[torch.optim.Optimizer], step: int, elapsed_s: float
) -> None:
    save_state(out / "state.safetensors", vae, average, optimizers, step=step, elapsed_s=elapsed_s)
    (out / "config.json").write_text(json.dumps(asdict(vae.config)))


def initialise(vae: WanVAE) -> WanVAE:
    """Residual branches start at zero, so that the averaging shortcuts carry the picture from the first step."""
    for name, p in vae.named_parameters():
        if name.endswith(("conv2.weight", "proj.weight", ".bias")):
            torch.nn.init.zeros_(p)
    return vae


def widen(vae: WanVAE, state: dict[str, Tensor]) -> None:
    """Weights of a run with fewer latent channels; the channels it did not have keep their fresh weights."""
    for name, p in vae.named_parameters():
        old = state[name]
        if name.startswith(("encoder.conv_out", "quant_conv")):  # mean and log variance are the halves of the rows
            halves = list(zip(p.data.chunk(2), old.chunk(2), strict=True))
        else:
            halves = [(p.data, old)]
        for target, source in halves:
            target[tuple(slice(length) for length in source.shape)] = source


def reconstruct(vae: WanVAE, frames: Tensor, lone_last: bool = False) -> tuple[Tensor, Tensor]:
    """Return (frames as decoded from a sampled latent, posterior moments).

    `lone_last`: the last latent is that of the last frame alone, as it is when a request gives only that frame.
    """
    moments, states = vae.encode_chunk(frames[:, :, :1])
    if frames.shape[2] > 1:
        later = vae.encode_chunk(frames[:, :, 1:], states)[0]
        if lone_last:
            later = torch.cat((later[:, :, :-1], vae.encode_chunk(frames[:, :, -1:])[0]), dim=2)
        moments = torch.cat((moments, later), dim=2)
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 4)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if vae.training else mean
    out, states = vae.decode_chunk(latents[:, :, :1])
    if frames.shape[2] > 1:
        out = torch.cat((out, vae.decode_chunk(latents[:, :, 1:], states)[0]), dim=2)
    return out.float(), torch.cat((mean, log_variance), dim=1)


def objective(vae: WanVAE, frames: Tensor, coverage: Tensor, lone_last: bool) -> Tensor:
    """Absolute and squared error, the shape and its rim weighted 5x, plus a small KL term."""
    out, moments = reconstruct(vae, frames, lone_last)
    mean, log_variance = moments.chunk(2, dim=1)
    weight = 1 + 4 * F.max_pool3d(coverage, (1, 5, 5), stride=1, padding=(0, 2, 2))
    weight = weight / weight.mean()
    error = out - frames
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (weight * (error.abs() + 2 * error.square())).mean() + 1e-4 * kl


@torch.no_grad()
def evaluate(vae: WanVAE, frames: Tensor, coverage: Tensor) -> dict[str, float]:
    """Reconstruction PSNR in dB: all, the shape and its rim, the last four frames, the first."""
    with torch.autocast(frames.device.type, torch.bfloat16):
        out, moments = reconstruct(vae, frames)
    error = ((out.clamp(-1, 1) - frames) / 2).square()
    near = F.max_pool3d(coverage, (1, 5, 5), stride=1, padding=(0, 2, 2)).expand_as(error)

    def psnr(mse: Tensor) -> float:
        return float(-10 * torch.log10(mse))

    return dict(
        psnr=psnr(error.mean()),
        shape=psnr((error * near).sum() / near.sum()),
        tail=psnr(error[:, :, -4:].mean()),
        first=psnr(error[:, :, 0].mean()),
        std=float(moments.chunk(2, dim=1)[0].std()),
    )


if __name__ == "__main__":
    main()
