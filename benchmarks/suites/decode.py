"""`bench decode`: all that decodes and encodes here beside diffusers' own; first frame and peak memory of long clips.

All are timed as `engine.decode(latents)` gives clips, an iterator of uint8 frames, and as `engine.encode(frames)` takes
them. Ours are built, checked and chosen as `skylapse compile` does it. Long clips are decoded in a process of their own
each, the demo decoder's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...compile.backend import versions_of
from ...runtime.checkpoints.hub import DEMO_FOLDER
from ...runtime.checkpoints.registry import read_folder
from ...runtime.core.config import Settings
from ...runtime.models.model import load_codec
from ...runtime.vae.backends import Decoders, backends
from ...runtime.vae.codec import VideoCodec
from ...runtime.vae.wan import WanVAE, WanVAEConfig
from ..harness import Budget, Clock, CudaClock, Missing, Run, WallClock, ratios, reason_of, take_turns
from ..peak import held_bytes, peak_while
from ..sheet import Labels, Sheet, note, suite_parser
from .apart import Died, run_apart

BACKENDS = ("eager", "onnxruntime", "inductor", "tensorrt")
ENCODING = ("eager", "onnxruntime", "tensorrt")  # an encoder by inductor takes minutes to build
DECODERS = ("demo", "base-32")
FRAMES = 13  # of the clips that take turns
LONG = (17, 65, 257)
BASE_32: dict[str, Any] = dict(base_dim=32, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
Code = Callable[[Any], np.ndarray]


def decode(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.model != "demo":
        raise ValueError(f"--model must be demo: the other decoder here has random weights, got {options.model!r}")
    if options.size < 16 or options.size % 16:
        raise ValueError(f"--size must be a multiple of 16, got {options.size}")
    wanted = tuple(dict.fromkeys(options.backend or [b for b in BACKENDS if not (options.quick and b == "inductor")]))
    with tempfile.TemporaryDirectory() as temporary:
        suite = Decoding(options, wanted, options.artifacts or Path(temporary))
        decoders, lengths = (DECODERS[:1], LONG[:2]) if options.quick else (DECODERS, LONG)
        with suite.sheet.running(cases=2 * len(decoders) + len(lengths) * len(suite.lasting)):
            for part in ("decoder", "encoder"):
                for decoder in decoders:
                    suite.turns(part, decoder)
            for num_frames in lengths:
                for backend in suite.lasting:
                    suite.long(num_frames, backend)
    return suite.sheet.status


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("decode", "Every decoder that is here, beside diffusers', and long clips.", threads=1)
    option = parser.add_argument
    option("--backend", action="append", choices=BACKENDS, help="some of them; default: all, without inductor if quick")
    option("--size", type=int, default=128, metavar="N", help="pixels a side; default: 128")
    option("--artifacts", type=Path, metavar="DIR", help="keep what is built here; default: nowhere")
    return parser


class Decoding:
    def __init__(self, options: argparse.Namespace, wanted: Sequence[str], artifacts: Path) -> None:
        self.options, self.wanted, self.artifacts = options, wanted, artifacts
        self.lasting = [b for b in wanted if b in ("eager", "onnxruntime", "tensorrt")]  # of which long clips are made
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        versions = versions_of("diffusers", "onnxruntime", "onnx", "onnxscript", "tensorrt")
        self.sheet = Sheet("decode", options, {"size": options.size, "frames": FRAMES, "versions": versions})
        self.clock: Clock = CudaClock(self.device) if self.device.type == "cuda" else WallClock()
        quick = options.quick
        self.budget = Budget(seconds=4.0 if quick else 20.0, width=0.05 if quick else 0.02, most=60)
        self.rounds = 1 if quick else 3
        self.absent: dict[str, str] = {}  # backends -> why long clips need not be tried

    def turns(self, part: str, decoder: str) -> None:
        """A clip of 13 frames by everyone's decoder or encoder."""
        group = f"{part.removesuffix('r')}/{decoder}"
        self.sheet.check_time(group)
        codec, work = codec_of(decoder, self.device), WORK[part]
        given = example(part, codec, self.options.size)
        backends = [b for b in self.wanted if part == "decoder" or b in ENCODING]
        runs: dict[str, Run] = {"eager": lambda: work(codec, given)}
        for backend in backends:
            if backend != "eager":
                note(f"{group}: {backend} is built")
                if (ours := self._built(group, part, decoder, backend)) is not None:
                    runs[backend] = lambda ours=ours: work(ours, given)  # type: ignore[misc]
        try:
            theirs = diffusers_of(part, decoder, self.device)
            runs["diffusers"] = lambda: theirs(given)
        except Missing as reason:
            self.sheet.missing(f"{group}/diffusers", str(reason))
        labels: Labels = {"width": self.options.size, "height": self.options.size, "num_frames": FRAMES}
        self._differences(group, runs, labels, "of 255" if part == "decoder" else "of a deviation")
        turns = take_turns(runs, self.clock, self.budget)
        self.sheet.turns(group, turns, "eager", labels)
        for backend in backends:
            if backend != "eager" and {backend, "diffusers"} <= turns.samples.keys():
                for suffix, samples in {"": turns.samples, "/cpu": turns.cpu_s}.items():
                    if samples:
                        times = ratios(samples["diffusers"], samples[backend])
                        name = f"{group}/diffusers/over-{backend}{suffix}"
                        self.sheet.compared(name, "diffusers", backend, times, labels, shown=not suffix)

    def _built(self, group: str, part: str, decoder: str, backend: str) -> VideoCodec | None:
        try:
            return built(part, decoder, backend, self.options.size, self.artifacts, self.device)
        except Missing as reason:
            why = str(reason)
            self.sheet.missing(f"{group}/{backend}", why)
        except Exception as error:  # a build that fails is that backend's result
            why = reason_of(error)
            self.sheet.failed(f"{group}/{backend}", why)
        if part == "decoder":
            self.absent[backend] = why
        return None

    def _differences(self, group: str, runs: dict[str, Run], labels: Labels, unit: str) -> None:
        """By how much the others' frames are off ours in eager mode, or their latents, whose deviation is about 1."""
        frames = {}
        for name, run in runs.items():
            try:
                frames[name] = np.asarray(run()).astype(np.float64)
            except Exception as error:  # it will fall out of the turns with this reason
                note(f"{group}/{name}: {reason_of(error)}")
        for name in frames.keys() - {"eager"} if "eager" in frames else ():
            worst = float(np.abs(frames[name] - frames["eager"]).max())
            self.sheet.measured(f"{group}/{name}/difference", unit, [worst], labels=labels)

    def long(self, num_frames: int, backend: str) -> None:
        """Time to the first frame and peak memory of one clip, in fresh processes."""
        name = f"decode/long/{num_frames}/{backend}"
        self.sheet.check_time(name)
        if backend in self.absent:
            self.sheet.missing(name, self.absent[backend])
            return
        asked = {
            "backend": backend,
            "num_frames": num_frames,
            "size": self.options.size,
            "artifacts": str(self.artifacts),
            "threads": self.options.threads,
        }
        try:
            found = [run_apart(long_clip, asked) for _ in range(self.rounds)]
        except Died as error:
            self.sheet.failed(name, reason_of(error))
            return
        labels: Labels = {"width": self.options.size, "height": self.options.size, "num_frames": num_frames}
        for key, unit in LONG_UNITS.items():
            if found[0][key] is not None:
                shown = key in ("first_frame_s", "peak_bytes")
                key_name = key.removesuffix("_s").removesuffix("_bytes").replace("_", "-")
                self.sheet.measured(f"{name}/{key_name}", unit, [one[key] for one in found], labels=labels, shown=shown)


LONG_UNITS = {
    "first_frame_s": "s",
    "first_frame_cpu_s": "cpu_s",
    "whole_s": "s",
    "whole_cpu_s": "cpu_s",
    "peak_bytes": "bytes",
    "above_bytes": "bytes",
}


def long_clip(backend: str, num_frames: int, size: int, artifacts: str, threads: int | None) -> dict[str, float | None]:
    """In this process alone: above_bytes is the peak less what was held before, weights and all."""
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = (
        codec_of("demo", device)
        if backend == "eager"
        else built("decoder", "demo", backend, size, Path(artifacts), device)
    )
    side = size // codec.spatial_factor
    _whole(codec, torch.zeros(codec.num_channels, 5, side, side))  # loads, and grows the allocator's pools
    z = torch.randn(codec.num_channels, (num_frames - 1) // 4 + 1, side, side)
    held, times = held_bytes(device), {}

    def run() -> None:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        chunks = codec.decode(z)
        count = len(next(chunks))  # on the host: nothing is left to wait for
        times["first_frame_s"] = time.perf_counter() - began_s
        times["first_frame_cpu_s"] = time.process_time() - cpu_s
        count += sum(len(chunk) for chunk in chunks)
        times["whole_s"], times["whole_cpu_s"] = time.perf_counter() - began_s, time.process_time() - cpu_s
        assert count == num_frames, count

    peak = peak_while(run, device)
    above = None if peak is None or held is None else max(0, peak - held)
    return {**times, "peak_bytes": peak, "above_bytes": above}


# --- who decodes ------------------------------------------------------------------------------------------------------


def codec_of(decoder: str, device: torch.device) -> VideoCodec:
    """The demo model's, or one of Wan2.1's shape with a third of its channels and random weights."""
    if decoder == "demo":
        return load_codec(read_folder(DEMO_FOLDER), device, Settings())
    vae = WanVAE(WanVAEConfig(**BASE_32)).eval().requires_grad_(False)
    weights = _reference(decoder).state_dict().items()
    vae.load_state_dict({key.replace(".resample.1.", ".resample."): value for key, value in weights})
    return VideoCodec(vae.to(device), device=device)


def built(part: str, decoder: str, backend: str, size: int, artifacts: Path, device: torch.device) -> VideoCodec:
    """The same with a compiled part, which is built if it has not been. Missing where this machine cannot."""
    found = next(one for one in backends(device) if one.name == backend)
    codec = codec_of(decoder, device)
    settings = Settings(compiled_dir=artifacts, decoder="eager", encoder="eager")
    decoders = Decoders(decoder, codec, (size, size), replace(settings, **{part: backend}))  # type: ignore[arg-type]
    if reason := found.missing(decoders.plan):
        raise Missing(reason)
    choice = decoders.selector_of(part).build(found, None, measure_at=decoders.default_size)
    if choice.backend != backend:
        raise RuntimeError(f"{backend} was built and is not used: {choice.why}")
    decoders.attach()
    return codec


def diffusers_of(part: str, decoder: str, device: torch.device) -> Code:
    """Missing where it is not installed."""
    vae = _reference(decoder).to(device)
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(v, device=device).view(shape) for v in (vae.config.latents_mean, vae.config.latents_std))

    @torch.inference_mode()
    def decode(z: torch.Tensor) -> np.ndarray:
        frames = vae.decode(z[None].to(device) * std + mean, return_dict=False)[0]
        levels = ((frames[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()

    @torch.inference_mode()
    def encode(frames: np.ndarray) -> np.ndarray:
        clip = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None] / 127.5 - 1
        latents = (vae.encode(clip).latent_dist.mode() - mean) / std
        return latents[0].cpu().numpy()

    return decode if part == "decoder" else encode


def _reference(decoder: str) -> Any:
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise Missing("diffusers is not installed") from error
    if decoder == "demo":
        return AutoencoderKLWan.from_pretrained(DEMO_FOLDER / "vae", dtype=torch.float32).eval()
    torch.manual_seed(0)
    return AutoencoderKLWan(**BASE_32).eval().requires_grad_(False)


def _whole(codec: VideoCodec, z: torch.Tensor) -> np.ndarray:
    return np.concatenate(list(codec.decode(z)))


def _latents(codec: VideoCodec, frames: np.ndarray) -> np.ndarray:
    return codec.encode(frames).cpu().numpy()


WORK: dict[str, Callable[[VideoCodec, Any], np.ndarray]] = {"decoder": _whole, "encoder": _latents}


def example(part: str, codec: VideoCodec, size: int) -> Any:
    """What a part is given: latents of a clip of FRAMES, or its frames."""
    generator = torch.Generator().manual_seed(0)
    if part == "encoder":
        return torch.randint(0, 256, (FRAMES, size, size, 3), dtype=torch.uint8, generator=generator).numpy()
    side = size // codec.spatial_factor
    return torch.randn(codec.num_channels, (FRAMES - 1) // 4 + 1, side, side, generator=generator)
