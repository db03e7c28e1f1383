"""Decoding: ONNX Runtime against eager and against diffusers, pair by pair; first frame and memory of longer clips.

Process CPU time, medians; the order within a pair alternates. Memory is the highest a process of its own has held while
it decoded a clip of each length. Ours are timed as `engine.decode(latents)` gives them, an iterator of uint8 frames.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compile.backend import versions_of
from ..runtime.config import Settings
from ..runtime.decoders import Decoders
from ..runtime.models.model import load_codec
from ..runtime.models.registry import DEMO_FOLDER, read_folder
from ..runtime.vae.codec import VideoCodec
from ..runtime.vae.wan import WanVAE, WanVAEConfig
from .machine import describe

CPU = torch.device("cpu")
FRAMES = (17, 65, 257)
BASE_32: dict[str, Any] = dict(base_dim=32, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
Decode = Callable[[torch.Tensor], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--artifacts", type=Path, help="keep what is built here; default: nowhere")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--lengths", choices=("eager", "onnxruntime"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.lengths:
        print(json.dumps(lengths(args)))
        return
    machine = describe()
    with tempfile.TemporaryDirectory() as temporary:
        args.artifacts = args.artifacts or Path(temporary)
        decoders = {name: compare(name, args) for name in ("demo", "base 32")}
        long = {name: _in_process(name, args) for name in ("eager", "onnxruntime")}
    result = {
        "benchmark": "decode",
        "machine": machine,
        "versions": versions_of("torch", "diffusers", "onnxruntime", "onnx", "onnxscript"),
        "threads": args.threads,
        "pairs": args.pairs,
        "clip": [13, args.size, args.size],
        "decoders": decoders,
        "lengths": long,
    }
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of a clip of 13 frames by each, and the ratios of the pairs."""
    codec, theirs = codec_of(name), diffusers_of(name)
    compiled = built(name, args)
    side = args.size // codec.spatial_factor
    z = torch.randn(codec.num_channels, 4, side, side, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Decode] = {
        "onnxruntime": lambda z: np.concatenate(list(compiled.decode(z))),
        "eager": lambda z: np.concatenate(list(codec.decode(z))),
        "diffusers": theirs,
    }
    frames = {way: decode(z).astype(int) for way, decode in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for pair in range(args.pairs):
        order = list(ways) if pair % 2 == 0 else list(reversed(ways))
        for way in order:
            began_s = time.process_time()
            ways[way](z)
            seconds[way].append(time.process_time() - began_s)
    ratios = {}
    for other in ("eager", "diffusers"):
        pairs = [b / a for a, b in zip(seconds["onnxruntime"], seconds[other], strict=True)]
        ratios[f"{other} / onnxruntime"] = _spread(pairs)
    pairs = [b / a for a, b in zip(seconds["eager"], seconds["diffusers"], strict=True)]
    ratios["diffusers / eager"] = _spread(pairs)
    told = {
        "cpu_s": {way: round(statistics.median(values), 4) for way, values in seconds.items()},
        "ratio": ratios,
        "largest_difference_of_255": {
            other: int(np.abs(frames["onnxruntime"] - frames[other]).max()) for other in ("eager", "diffusers")
        },
    }
    print(f"{name}: {told}", file=sys.stderr)
    return told


def lengths(args: argparse.Namespace) -> dict[str, Any]:
    """First frame and peak of clips of the demo decoder, in this process alone, from the shortest to the longest."""
    codec = built("demo", args) if args.lengths == "onnxruntime" else codec_of("demo")
    side = args.size // codec.spatial_factor
    list(codec.decode(torch.zeros(codec.num_channels, 5, side, side)))  # loads, and grows the allocator's pools
    found = {}
    for num_frames in FRAMES:
        z = torch.randn(codec.num_channels, (num_frames - 1) // 4 + 1, side, side)
        _reset_peak()
        began_s, cpu_s = time.perf_counter(), time.process_time()
        chunks = codec.decode(z)
        count = len(next(chunks))
        first = {"first_frame_s": time.perf_counter() - began_s, "first_frame_cpu_s": time.process_time() - cpu_s}
        for chunk in chunks:
            count += len(chunk)
        assert count == num_frames
        whole = {"cpu_s": time.process_time() - cpu_s, "peak_mib": _peak_bytes() / 2**20}
        found[str(num_frames)] = {key: round(value, 4) for key, value in (first | whole).items()}
    return found


def codec_of(name: str) -> VideoCodec:
    """The demo model's, or one of Wan2.1's shape with a third of its channels and random weights."""
    if name == "demo":
        return load_codec(read_folder(DEMO_FOLDER), CPU, Settings())
    vae = WanVAE(WanVAEConfig(**BASE_32)).eval().requires_grad_(False)
    weights = _reference(name).state_dict().items()
    vae.load_state_dict({key.replace(".resample.1.", ".resample."): value for key, value in weights})
    return VideoCodec(vae, device=CPU)


def built(name: str, args: argparse.Namespace) -> VideoCodec:
    """The same with ONNX Runtime, which is built if it has not been."""
    codec = codec_of(name)
    settings = Settings(compiled_dir=args.artifacts, decoder="onnxruntime")
    decoders = Decoders(name, codec, (args.size, args.size), settings)
    backend = decoders.selector.backend("onnxruntime")
    plan = backend.plan(decoders.plan)
    decoders.selector.cache.build(
        decoders.selector.key(backend, decoders.plan),
        lambda folder: backend.build(decoders.selector.coder, plan, folder),
    )
    decoders.attach()
    decoders.prepare()
    assert decoders.report.backend == "onnxruntime", decoders.report
    return codec


def diffusers_of(name: str) -> Decode:
    vae = _reference(name)
    shape = (1, -1, 1, 1, 1)
    mean, std = torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)

    @torch.inference_mode()
    def decode(z: torch.Tensor) -> np.ndarray:
        frames = vae.decode(z[None] * std + mean, return_dict=False)[0]
        return ((frames[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()

    return decode


def _reference(name: str) -> Any:
    from diffusers import AutoencoderKLWan

    if name == "demo":
        return AutoencoderKLWan.from_pretrained(DEMO_FOLDER / "vae", dtype=torch.float32).eval()
    torch.manual_seed(0)
    return AutoencoderKLWan(**BASE_32).eval().requires_grad_(False)


def _in_process(way: str, args: argparse.Namespace) -> dict[str, Any]:
    options = {"threads": args.threads, "size": args.size, "artifacts": args.artifacts, "lengths": way}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "skylapse.benchmarks.decode", *words]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(f"{way}: {told}", file=sys.stderr)
    return told


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


if __name__ == "__main__":
    main()
