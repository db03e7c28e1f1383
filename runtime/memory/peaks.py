"""Peak bytes of a step, of encoding and of decoding, beside the weights: from shapes, or measured on a CPU.

The module code itself is run, on fake CUDA tensors of a told architecture (kernels/fake_cuda.py) or on small real ones,
under a counter of live tensors. What libraries allocate inside (cuBLAS's and cuDNN's workspaces) is not seen; where a
device is there, its constant is measured and added.

Shape letters: N tokens of a pack, S sequences, n tokens of one; C channels, T latent frames, h, w sides in latents.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...kernels.fake_cuda import fake_cuda
from ...kernels.live_bytes import LiveBytes
from ..checkpoints.configs import parse_config
from ..checkpoints.empty_encoders import empty_encoder
from ..checkpoints.registry import ModelFolder
from ..checkpoints.weights import allocate
from ..families.wan.denoiser import WanConfig, WanDenoiser
from ..layers.pack import Context, Pack, each_alone
from ..layers.quantization import quantized_weights
from ..vae.codec import VideoCodec
from ..vae.coders import WanDecoder, WanEncoder
from ..vae.tiling import Tiling
from ..vae.wan import WanVAE, WanVAEConfig

PACKAGE = Path(__file__).parents[2]
logger = logging.getLogger(__name__)
Half = TypeVar("Half", WanEncoder, WanDecoder)
CHUNKS = (4, 1)  # latent frames that are coded at a time: fewer calls, or less memory
TEXT_ROWS = 100  # of a prompt in the packs that are measured: their keys are counted with each request
BLOCKS = slice(0, 2)  # all blocks are alike, and the second one runs while the first one's result is there
# N of the packs whose peak is predicted: about the rows in which a feed-forward is cut (32,768), and Wan's sizes.
STEP_TOKENS = (512, 8192, 32768, 65536, 262144)
SIDES = ((64, 64), (128, 128))  # h, w of the frames whose coding is predicted: edges count for 1 % there
CPU_SIDES = ((2, 2), (4, 4))  # and measured: on a CPU they are in proportion from there on


@dataclass(frozen=True)
class Curve:
    """Bytes by a count: straight lines between the points that were measured, and beyond them."""

    points: tuple[tuple[float, float], ...]

    def at(self, count: float) -> int:
        (x0, y0), (x1, y1) = self._segment([x for x, _ in self.points], count)
        return max(0, round(y0 + (y1 - y0) * (count - x0) / (x1 - x0)))

    def most(self, num_bytes: float) -> int:
        """Return the greatest count that takes no more than so many bytes; 0 where none does."""
        if num_bytes < self.at(0):
            return 0
        (x0, y0), (x1, y1) = self._segment([y for _, y in self.points], num_bytes)
        return max(0, int(x0 + (x1 - x0) * (num_bytes - y0) / (y1 - y0)))

    def _segment(self, keys: list[float], key: float) -> tuple[tuple[float, float], tuple[float, float]]:
        last = min(max(1, bisect_left(keys, key)), len(self.points) - 1)
        return self.points[last - 1], self.points[last]


@dataclass(frozen=True)
class Coding:
    """Peaks of one half of a VAE, by pixels of a frame."""

    chunks: dict[int, Curve]  # latent frames at a time -> bytes by pixels
    state_bytes: float  # a pixel, of what is kept from chunk to chunk
    output_bytes: float  # a pixel and latent frame, of the fp32 buffer that tiles are blended in

    def at(self, height: int, width: int, chunk: int, tiling: Tiling, factor: int) -> int:
        """Return the peak of a frame of height x width pixels, whole or in tiles, whose states all live at once."""
        h, w = height // factor, width // factor
        tile_h, tile_w = tiling.size(h, w, factor)
        tile = tile_h * tile_w * factor**2
        peak = self._of(chunk).at(tile)
        if tile == height * width:
            return peak
        others = self.kept(height, width, tiling, factor) - self.state_bytes * tile
        return round(peak + others + 2 * self.output_bytes * chunk * height * width)

    def kept(self, height: int, width: int, tiling: Tiling, factor: int) -> int:
        """Return the bytes that are kept from one chunk to the next: every tile's states."""
        h, w = height // factor, width // factor
        tile_h, tile_w = tiling.size(h, w, factor)
        whole = (tile_h, tile_w) == (h, w)
        num_tiles = 1 if whole else len(tiling.spans(h, factor)) * len(tiling.spans(w, factor))
        return round(self.state_bytes * tile_h * tile_w * factor**2 * num_tiles)

    def _of(self, chunk: int) -> Curve:
        return self.chunks[max((known for known in self.chunks if known <= chunk), default=min(self.chunks))]


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of one checkpoint in one precision."""

    step: Curve  # N tokens of a pack, all branches
    apart: Curve  # the same where the sequences of a guided pair go through the blocks one after the other
    encode: Coding
    decode: Coding
    text: int  # of the longest prompt
    image: int  # of two images
    workspace: int = 0  # beside all of them

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Peaks:
        """Read what `to_json` gives; KeyError, TypeError or ValueError for anything else."""
        curves = {name: _curve(found[name]) for name in ("step", "apart")}
        codings = {name: _coding(found[name]) for name in ("encode", "decode")}
        numbers = {name: int(found[name]) for name in ("text", "image", "workspace")}
        return cls(**curves, **codings, **numbers)  # type: ignore[arg-type]


def _curve(found: dict[str, Any]) -> Curve:
    return Curve(tuple((float(x), float(y)) for x, y in found["points"]))


def _coding(found: dict[str, Any]) -> Coding:
    chunks = {int(chunk): _curve(curve) for chunk, curve in found["chunks"].items()}
    return Coding(chunks, float(found["state_bytes"]), float(found["output_bytes"]))


# --- one run of each --------------------------------------------------------------------------------------------------


def step_bytes(denoiser: WanDenoiser, num_sequences: int, num_tokens: int, device: str, apart: bool = False) -> int:
    """Return the peak bytes of a step of S sequences of n tokens each: embedding, two blocks, head."""
    run = step_of(denoiser, num_sequences, num_tokens, device, apart)
    with torch.no_grad(), LiveBytes() as live:
        run()
    return live.peak_bytes


def step_of(
    denoiser: WanDenoiser, num_sequences: int, num_tokens: int, device: str, apart: bool = False
) -> Callable[[], None]:
    """Return the step that `step_bytes` measures, with its inputs made already."""
    config, dtype = denoiser.config, denoiser.dtype
    total, rows = num_sequences * num_tokens, num_sequences * TEXT_ROWS
    p, q, r = config.patch_size

    def context(rows: int) -> Context:
        shape = (BLOCKS.stop, 2, rows, config.num_attention_heads, config.attention_head_dim)
        ends = tuple(range(0, rows + 1, rows // num_sequences))
        return Context(torch.zeros(shape, dtype=dtype, device=device), ends, torch.zeros(rows, device=device))

    pack = Pack(
        grids=[(1, 1, num_tokens)] * num_sequences,
        cu_seqlens=tuple(range(0, total + 1, num_tokens)),
        modulation_ids=torch.zeros(total, dtype=torch.int64, device=device),
        rotation=torch.ones(total, config.attention_head_dim // 2, dtype=torch.complex64, device=device),
        text=context(rows),
        image=None if config.image_dim is None else context(rows),
    )
    latents = [torch.zeros(config.in_channels, p, q, r * num_tokens, device=device)] * num_sequences
    timesteps = torch.zeros(1, device=device)

    def run() -> None:
        tokens = [denoiser.embed(latents)]
        embedding, modulation = denoiser.condition_embedder.embed_time(timesteps, dtype)
        if apart:
            tokens.append(each_alone(denoiser.trunk, tokens.pop(), modulation, pack, BLOCKS))
        else:
            tokens.append(denoiser.trunk(tokens.pop(), modulation, pack, BLOCKS))
        denoiser.head(tokens.pop(), embedding, pack)

    return run


def coding_bytes(
    run: Callable[[Tensor, Any], tuple[Tensor, Any]], shapes: Iterable[tuple[int, ...]], like: Tensor
) -> int:
    """Return the peak bytes of `code`."""
    with torch.no_grad(), LiveBytes() as live:
        code(run, shapes, like)
    return live.peak_bytes


def code(run: Callable[[Tensor, Any], tuple[Tensor, Any]], shapes: Iterable[tuple[int, ...]], like: Tensor) -> None:
    """Code a clip chunk by chunk, giving each chunk's result away before the next one."""
    states = None
    for shape in shapes:
        made, states = run(like.new_zeros(shape), states)
        made.float()
        del made


def chunk_shapes(config: WanVAEConfig, decodes: bool, h: int, w: int, chunk: int) -> list[tuple[int, ...]]:
    """Return the shapes of three chunks: the first, which is one latent frame or frame, and two that have a past."""
    factor, frames = config.scale_factor_spatial, config.scale_factor_temporal
    channels, scale, per_latent = (config.z_dim, 1, 1) if decodes else (3, factor, frames)
    return [(1, channels, n, scale * h, scale * w) for n in (1, chunk * per_latent, chunk * per_latent)]


def _kept_bytes(module: WanEncoder | WanDecoder, x: Tensor) -> int:
    """Return the bytes that the very first chunk leaves behind for good: upsampling kernels, beside the weights."""
    with torch.no_grad(), LiveBytes() as live:
        module(x, None)
    return live.live_bytes


def _coding_of(
    module: WanEncoder | WanDecoder, device: str, sides: Sequence[tuple[int, int]], counts: Sequence[int]
) -> Coding:
    """Measure the coding of three chunks (the first, and two that have a past), at two sizes."""
    config, decodes = module.config, isinstance(module, WanDecoder)
    factor, frames = config.scale_factor_spatial, config.scale_factor_temporal
    like = torch.zeros(1, dtype=next(module.parameters()).dtype, device=device)
    kept = _kept_bytes(module, like.new_zeros(chunk_shapes(config, decodes, *sides[0], 1)[0]))
    chunks = {}
    for chunk in counts:
        points = []
        for h, w in sides:
            shapes = chunk_shapes(config, decodes, h, w, chunk)
            points.append((float(h * w * factor**2), float(kept + coding_bytes(module, shapes, like))))
        chunks[chunk] = Curve(tuple(points))
    h, w = sides[-1]
    with torch.no_grad():
        _, states = module(like.new_zeros(chunk_shapes(config, decodes, h, w, 1)[0]), None)
    held = sum(state.nbytes for state in states)
    output = 4.0 * (3 * frames if decodes else config.z_dim / factor**2)
    return Coding(chunks, held / (h * w * factor**2), output)


# --- all of them ------------------------------------------------------------------------------------------------------


def predict_peaks(
    folder: ModelFolder,
    dtype: torch.dtype,
    quantize: str | None,
    decoder_dtype: torch.dtype,
    *,
    capability: int = 90,
    chunks: Sequence[int] = CHUNKS,
) -> Peaks:
    """Predict the peaks on a CUDA device of this capability, from the checkpoint's configs alone."""
    name, fields = next(iter(folder.transformers.items()))
    step, apart = _step_curves(parse_config(WanConfig, fields, name), dtype, quantize, capability)
    config = parse_config(WanVAEConfig, folder.vae, "vae")
    encode, decode = _coding_curves(config, decoder_dtype, capability, tuple(chunks))
    return Peaks(step, apart, encode, decode, **_encoders(folder, dtype))


@cache
def _step_curves(config: WanConfig, dtype: torch.dtype, quantize: str | None, capability: int) -> tuple[Curve, Curve]:
    """Return the curves of a step with its sequences together, and apart."""
    with fake_cuda(capability):
        denoiser = fake_denoiser(config, dtype, quantize)
        pairs = [(2 * (tokens // 2), tokens // 2) for tokens in STEP_TOKENS]
        step, apart = (
            Curve(tuple((float(total), float(step_bytes(denoiser, 2, n, "cuda", how))) for total, n in pairs))
            for how in (False, True)
        )
    return step, apart


@cache
def _coding_curves(
    config: WanVAEConfig, decoder_dtype: torch.dtype, capability: int, chunks: Sequence[int]
) -> tuple[Coding, Coding]:
    """Return the peaks of encoding, and of decoding."""
    with fake_cuda(capability):
        encoder, decoder = fake_coder(config, WanEncoder, torch.float32), fake_coder(config, WanDecoder, decoder_dtype)
        return _coding_of(encoder, "cuda", SIDES, chunks), _coding_of(decoder, "cuda", SIDES, chunks)


def fake_denoiser(config: WanConfig, dtype: torch.dtype, quantize: str | None = None) -> WanDenoiser:
    """Return a denoiser of the blocks that `step_of` runs, on the fake CUDA device that is in force."""
    with torch.device("meta"):
        denoiser = WanDenoiser(replace(config, num_layers=BLOCKS.stop))
    allocate(
        denoiser,
        device=torch.device("cuda"),
        dtype=dtype,
        fp32_parameters=WanDenoiser.fp32_parameters,
        quantized=quantized_weights(denoiser, quantize),
    )
    return denoiser.requires_grad_(False).eval()


def fake_coder(config: WanVAEConfig, half: type[Half], dtype: torch.dtype) -> Half:
    """Return half of a VAE on the fake CUDA device that is in force."""
    with torch.device("meta"):
        module = half(WanVAE(config))
    allocate(module, device=torch.device("cuda"), dtype=dtype)
    return module.requires_grad_(False).eval()


def measure_peaks(
    folder: ModelFolder, denoiser: WanDenoiser, codec: VideoCodec, chunks: Sequence[int] = CHUNKS
) -> Peaks:
    """Measure the peaks on a CPU, with the model's own weights and its CPU kernels, at sizes that take a moment."""
    totals = (128, 512)
    step, apart = (
        Curve(tuple((float(total), float(step_bytes(denoiser, 2, total // 2, "cpu", how))) for total in totals))
        for how in (False, True)
    )
    encode, decode = (_coding_of(half, "cpu", CPU_SIDES, chunks) for half in (codec.encoder, codec.decoder))
    return Peaks(step, apart, encode, decode, **_encoders(folder, denoiser.dtype))


def measure_workspace(denoiser: WanDenoiser, codec: VideoCodec, peaks: Peaks) -> int:
    """Return the bytes that libraries allocate on a CUDA device beside the tensors of a small step or a small chunk."""
    num_tokens, (h, w) = STEP_TOKENS[0] // 2, SIDES[0]
    chunk, curve = min(peaks.decode.chunks.items())
    device, z = codec.device, torch.zeros(1, dtype=codec.decoder_dtype, device=codec.device)
    shapes = [(1, codec.num_channels, length, h, w) for length in (1, chunk, chunk)]
    work: list[tuple[Callable[[], int], int]] = [
        (lambda: step_bytes(denoiser, 2, num_tokens, "cuda"), peaks.step.at(2 * num_tokens)),
        (lambda: coding_bytes(codec.decoder, shapes, z), curve.at(h * w * codec.spatial_factor**2)),
    ]
    most = 0
    for run, predicted in work:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        most = max(most, torch.cuda.max_memory_allocated(device) - before - predicted)
    return most


def stored_peaks(folder: Path, name: str, compute: Callable[[], Peaks]) -> Peaks:
    """Return the peaks that an earlier start has stored under this name, or compute and store them for the next one.

    A file's name ends with a digest of the code that decides about memory, so other code has another file.
    """
    path = folder / f"{name}-{torch.__version__}-{code_digest(PACKAGE)}.json".replace(" ", "_").replace("/", "_")
    try:
        return Peaks.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        peaks = compute()
    logger.info("memory peaks of %s: %s", name, peaks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(peaks.to_json()) + "\n")
        part.replace(path)
    except OSError as error:
        logger.warning("memory peaks cannot be stored (%s); the next start computes them again", error)
    return peaks


@cache
def code_digest(root: Path) -> str:
    """Return a digest of the sources below `root` on which peaks may depend: all of kernels and runtime."""
    sources = [path for part in ("kernels", "runtime") for path in (root / part).rglob("*.py")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources)))
    return digest.hexdigest()[:12]


def _encoders(folder: ModelFolder, dtype: torch.dtype) -> dict[str, int]:
    """Return the peaks of the longest prompt and of two images."""
    text, image = (empty_encoder(folder, part) for part in ("text_encoder", "image_encoder"))
    return {
        "text": 0 if text is None else _text_bytes(text, folder.limits.max_prompt_tokens, dtype),
        "image": 0 if image is None else _image_bytes(image),
    }


@cache
def _text_bytes(module: Any, num_tokens: int, dtype: torch.dtype) -> int:
    own = copy.deepcopy(module).to(dtype)
    with torch.no_grad(), LiveBytes() as live:
        own(torch.zeros(1, num_tokens, dtype=torch.int64, device="meta"))
    return live.peak_bytes


@cache
def _image_bytes(module: Any) -> int:
    side = module.config.image_size
    with torch.no_grad(), LiveBytes() as live:
        module(torch.zeros(2, 3, side, side, device="meta"), output_hidden_states=True)
    return live.peak_bytes
