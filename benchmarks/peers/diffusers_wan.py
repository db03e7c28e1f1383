"""diffusers' WanPipeline on a checkpoint of ours, timed stage by stage, and the caches that diffusers has for it."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...runtime.checkpoints.hub import resolve_folder
from ...runtime.core.request import VideoRequest
from ..harness import Missing
from ..metrics import Clip

STAGES = ("encode", "denoise", "decode", "whole")
MODULES = [r"blocks\.\d+\.(attn1|attn2|ffn)"]  # what TaylorSeer forecasts; its own patterns name none of Wan's modules


@dataclass(frozen=True)
class Timed:
    """A whole request: uint8 frames [F, H, W, 3], seconds by stage, and CPU seconds of the process, all threads."""

    frames: Clip
    seconds: dict[str, float]
    cpu_s: float


Run = Callable[[VideoRequest], Timed]


class DiffusersWan:
    """The pipeline, its VAE in fp32 as ours, its per-token timesteps off: the same function, and slower."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device) -> None:
        from diffusers import AutoencoderKLWan, WanPipeline
        from diffusers.utils import logging as their_logging
        from transformers.utils import logging as transformers_logging

        their_logging.disable_progress_bar()  # of loading: four pipelines draw eight
        transformers_logging.disable_progress_bar()
        folder = resolve_folder(model)
        self.device = device
        self.vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32)
        self.pipeline = WanPipeline.from_pretrained(folder, vae=self.vae, dtype=dtype).to(device)
        self.pipeline.register_to_config(expand_timesteps=False)
        self.pipeline.set_progress_bar_config(disable=True)
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(self.vae.config.latents_mean, device=device).view(shape)
        self._std = torch.tensor(self.vae.config.latents_std, device=device).view(shape)

    @torch.inference_mode()
    def __call__(self, request: VideoRequest) -> Timed:
        width, height, num_frames = request.size
        began_cpu, began = time.process_time(), self._now()
        prompt, negative = self.pipeline.encode_prompt(
            request.prompt, request.negative_prompt, max_sequence_length=512, device=self.device
        )
        encoded = self._now()
        latents = self.pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            width=width,
            height=height,
            num_frames=num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            guidance_scale_2=request.guidance_scale_2,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
        ).frames
        denoised = self._now()
        video = self.vae.decode(latents.float() * self._std + self._mean, return_dict=False)[0]
        frames = self.pipeline.video_processor.postprocess_video(video, output_type="np")[0]
        frames = (frames * 255).round().astype(np.uint8)
        done = self._now()
        stages = dict(encode=encoded - began, denoise=denoised - encoded, decode=done - denoised, whole=done - began)
        return Timed(frames, stages, time.process_time() - began_cpu)

    def _now(self) -> float:
        """Behind all that the device has been given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def compile(self) -> None:
        """As diffusers' documentation has it: the transformer and the VAE's decoder."""
        self.pipeline.transformer = torch.compile(self.pipeline.transformer)
        self.vae.decoder = torch.compile(self.vae.decoder)

    def with_cache(self, config: Any) -> Run:
        """The pipeline with one of diffusers' caches, turned on and off around each request, outside of its time."""
        transformer = self.pipeline.transformer

        def run(request: VideoRequest) -> Timed:
            transformer.enable_cache(config)
            try:
                return self(request)
            finally:
                transformer.disable_cache()

        transformer.enable_cache(config)
        hooked = [name for name, module in transformer.named_modules() if name and _has_hooks(module)]
        transformer.disable_cache()
        if not hooked:
            raise Missing("hooks nothing of WanTransformer3DModel")
        return run

    def magnitudes(self, request: VideoRequest) -> list[float]:
        """MagCache's table for this checkpoint, by its own calibration on one request: it prints the table."""
        from diffusers.hooks import MagCacheConfig

        config = MagCacheConfig(calibrate=True, num_inference_steps=request.num_inference_steps)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.with_cache(config)(request)
        tables = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
        tables = [line for line in tables if line[1:2].isdigit()]
        if not tables:
            raise Missing("its calibration printed no table")
        return [float(value) for value in ast.literal_eval(tables[0])]  # of the prompt's branch, which comes first


def _has_hooks(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)


# --- caches -----------------------------------------------------------------------------------------------------------


def first_block(peer: DiffusersWan, request: VideoRequest) -> Any:
    from diffusers.hooks import FirstBlockCacheConfig

    return FirstBlockCacheConfig()


def mag(peer: DiffusersWan, request: VideoRequest) -> Any:
    from diffusers.hooks import MagCacheConfig

    return MagCacheConfig(num_inference_steps=request.num_inference_steps, mag_ratios=peer.magnitudes(request))


def taylorseer(peer: DiffusersWan, request: VideoRequest) -> Any:
    from diffusers.hooks import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(cache_identifiers=MODULES, taylor_factors_dtype=peer.pipeline.transformer.dtype)


def taylorseer_lite(peer: DiffusersWan, request: VideoRequest) -> Any:
    from diffusers.hooks import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(use_lite_mode=True, taylor_factors_dtype=peer.pipeline.transformer.dtype)


def sea(peer: DiffusersWan, request: VideoRequest) -> Any:
    from diffusers.hooks import SeaCacheConfig

    return SeaCacheConfig()


def pyramid(peer: DiffusersWan, request: VideoRequest) -> Any:
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(  # as in its documentation; cross attention less often, as in its paper
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=4,
        current_timestep_callback=lambda: peer.pipeline.current_timestep,
    )


def faster(peer: DiffusersWan, request: VideoRequest) -> Any:
    from diffusers.hooks import FasterCacheConfig

    logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)  # that it is experimental
    return FasterCacheConfig(current_timestep_callback=lambda: peer.pipeline.current_timestep)


def text_kv(peer: DiffusersWan, request: VideoRequest) -> Any:
    from diffusers.hooks import TextKVCacheConfig

    return TextKVCacheConfig()


CACHES: dict[str, Callable[[DiffusersWan, VideoRequest], Any]] = {
    "first-block": first_block,
    "mag": mag,
    "taylorseer": taylorseer,
    "taylorseer-lite": taylorseer_lite,
    "sea": sea,
    "pyramid": pyramid,
    "faster": faster,
    "text-kv": text_kv,
}


def cache_dit(peer: DiffusersWan) -> str:
    """Turn cache-dit's DBCache on for good; returns its settings.

    They are its defaults, but that it probes one block instead of 8 where a model has fewer than 16.
    """
    try:
        import cache_dit as package
    except ImportError as error:
        raise Missing("cache-dit is not installed (pip install 'skylapse[peers]')") from error
    probed = 8 if len(peer.pipeline.transformer.blocks) >= 16 else 1
    logging.disable(logging.INFO)  # a dozen lines of what it finds; its loggers are made on the way
    try:
        package.enable_cache(peer.pipeline, cache_config=package.DBCacheConfig(Fn_compute_blocks=probed))
    finally:
        logging.disable(logging.NOTSET)
    return f"DBCacheConfig(Fn_compute_blocks={probed})"
