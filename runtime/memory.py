"""How much memory a request takes: measured once per model and device, and asked before any work is done."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from .config import Settings
from .device import device_memory, peak_bytes, reset_peak
from .events import RequestTooLarge
from .models.live_bytes import LiveBytes
from .models.model import Model
from .pack import Sequence, build_pack
from .trajectory import Trajectory

logger = logging.getLogger(__name__)
GRIDS = ((1, 8, 8), (1, 16, 16))  # of the two packs that are measured
SHARE = {"cuda": 0.92, "cpu": 0.8}  # of the memory that there is


@dataclass(frozen=True)
class MemoryProfile:
    """Peak memory: of a step step_bytes + token_bytes a token, of the VAE pixel_bytes a pixel of a frame."""

    step_bytes: float
    token_bytes: float
    pixel_bytes: float


@dataclass(frozen=True)
class MemoryBudget:
    """What there is, less the weights and the text cache; `available_bytes` is for requests."""

    profile: MemoryProfile
    available_bytes: int
    # Frames' width and height -> bytes that compiled coders hold, and that the work of one takes; see `Decoders`.
    compiled: Callable[[int, int], tuple[int, int]] = field(default=lambda width, height: (0, 0), compare=False)

    def step_bytes(self, num_tokens: int) -> int:
        return round(self.profile.step_bytes + self.profile.token_bytes * num_tokens)

    def working_bytes(self, t: Trajectory) -> int:
        """Of the request's most expensive piece of work, alone, with what compiled coders hold all the while.

        Where decoding goes on beside the steps of others (CUDA), of a step and a chunk together.
        """
        width, height, _ = t.request.size
        held, _ = self.compiled(width, height)
        step, coding = self.step_bytes(t.num_tokens * t.num_branches), self.coding_bytes(t)
        return held + (max(step, coding) if t.model.codec.lane is None else step + coding)

    def coding_bytes(self, t: Trajectory) -> int:
        """Of a chunk of its frames, by eager or by what has been chosen, whichever takes more."""
        width, height, _ = t.request.size
        tiling = t.model.codec.tiling
        pixels = width * height if width * height <= tiling.threshold else tiling.tile**2
        return max(self.compiled(width, height)[1], round(self.profile.pixel_bytes * pixels))

    def check(self, t: Trajectory) -> None:
        """RequestTooLarge if the request cannot fit even with the engine to itself."""
        needed = self.working_bytes(t) + t.resident_bytes
        if needed > self.available_bytes:
            width, height, num_frames = t.request.size
            raise RequestTooLarge(
                f"num_frames x height x width = {num_frames} x {height} x {width} ({t.num_tokens} tokens a branch) "
                f"needs about {_gib(needed)} beside the weights, and {_gib(self.available_bytes)} are there"
            )


def load_budget(
    model: Model, settings: Settings, compiled: Callable[[int, int], tuple[int, int]] = lambda width, height: (0, 0)
) -> MemoryBudget:
    """The budget of this process; the profile is measured if no earlier start has stored it."""
    total = memory_bytes(model.device, settings)
    taken = model.num_bytes + text_cache_bytes(model.device, settings)
    return MemoryBudget(_load_profile(model, settings), max(0, total - taken), compiled)


def memory_bytes(device: torch.device, settings: Settings) -> int:
    """What weights, texts and requests may take together."""
    return settings.memory_bytes or round(SHARE[device.type] * device_memory(device))


def text_cache_bytes(device: torch.device, settings: Settings) -> int:
    """What the text cache may take: as configured, and never more than an eighth of a small memory."""
    return min(settings.text_cache_bytes, memory_bytes(device, settings) // 8)


def measure(model: Model) -> MemoryProfile:
    """Peaks of two packs of one sequence and of one decoded chunk, on the model's own device."""
    peaks = [_peak(model, partial(_step, model, grid)) for grid in GRIDS]
    tokens = [grid[0] * grid[1] * grid[2] for grid in GRIDS]
    token_bytes = (peaks[1] - peaks[0]) / (tokens[1] - tokens[0])
    codec = model.codec
    latents = torch.zeros(codec.num_channels, 1 + codec.chunk, 4, 4, device=model.device)
    decode = _peak(model, lambda: [chunk.shape for chunk in codec.decode_float(latents)])
    pixels = (4 * codec.spatial_factor) ** 2
    return MemoryProfile(max(0.0, peaks[0] - token_bytes * tokens[0]), token_bytes, decode / pixels)


def _step(model: Model, grid: tuple[int, int, int]) -> None:
    denoiser = model.experts[0]
    config = denoiser.config
    text = denoiser.encode_text(torch.zeros(1, config.text_dim, device=model.device, dtype=model.dtype))
    image = None
    if config.image_dim is not None:
        rows = config.pos_embed_seq_len or 1
        image = denoiser.encode_image(torch.zeros(rows, config.image_dim, device=model.device))
    modulations = (0,) * grid[0]
    pack = build_pack([Sequence(grid, modulations, text, image)], config.attention_head_dim, model.device)
    latents = torch.zeros(
        config.in_channels, *(n * p for n, p in zip(grid, config.patch_size, strict=True)), device=model.device
    )
    denoiser(pack, [latents], torch.zeros(1, device=model.device))


@torch.inference_mode()
def _peak(model: Model, run: Callable[[], object]) -> int:
    """Most bytes allocated during `run`, above what was held before it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        before = torch.cuda.memory_allocated(model.device)
        reset_peak(model.device)
        run()
        torch.cuda.synchronize(model.device)
        return (peak_bytes(model.device) or 0) - before
    with LiveBytes() as live:
        run()
    return live.peak_bytes


def _load_profile(model: Model, settings: Settings) -> MemoryProfile:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    name = f"{model.fingerprint[:16]}-{device}-{model.precision}-{model.codec.chunk}-{torch.__version__}.json"
    path = settings.profile_dir / name.replace(" ", "_").replace("/", "_")
    try:
        return MemoryProfile(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        profile = measure(model)
    logger.info("memory profile of %s measured: %s", model.name, profile)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(profile)) + "\n")
        part.replace(path)
    except OSError as error:
        logger.warning("the memory profile cannot be stored (%s); the next start measures again", error)
    return profile


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
