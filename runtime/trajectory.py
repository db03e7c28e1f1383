"""One request on its way: encode, denoise step by step, decode chunk by chunk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .conditioning import Conditioning, concatenate_image, give_frames
from .models.model import Model
from .models.text_cache import TextCache
from .pack import Pack, Sequence, TextContext, build_pack
from .request import Video, VideoMetadata, VideoRequest
from .sampler.guidance import combine, guidance_is_on
from .sampler.schedule import make_schedule
from .sampler.solver import get_solver
from .video_file import check_image, read_image


@dataclass(frozen=True)
class _Prepared:
    """A pack that stays the same from step to step, until the expert or the guidance changes."""

    expert: int
    guided: bool
    pack: Pack


class Trajectory:
    """A request, its latents and everything that belongs to it alone."""

    def __init__(
        self, ticket: int, model: Model, request: VideoRequest, text_cache: TextCache, latents: Tensor | None
    ) -> None:
        assert request.num_inference_steps is not None
        self.ticket = ticket
        self.model = model
        self.request = request
        self.text_cache = text_cache
        width, height, num_frames = request.size
        self.shape = model.codec.latent_shape(num_frames, height, width)
        if latents is not None and tuple(latents.shape) != self.shape:
            raise ValueError(f"latents must be {list(self.shape)} for this request, got {list(latents.shape)}")
        self.latents = latents
        self.schedule = make_schedule(model.solver, request.num_inference_steps, request.shift, request.solver)
        self.solver = get_solver(self.schedule.config.solver)
        self.solver_state = self.solver.start(self.schedule)
        self.conditioning: Conditioning | None = None
        self.image_rows: Tensor | None = None
        self.video: Video | None = None
        self.just_stepped = False
        self.timings_s: dict[str, float] = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self._prepared: _Prepared | None = None
        self._chunks: Iterator[np.ndarray] | None = None
        self._frames: list[np.ndarray] = []

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    @property
    def steps_done(self) -> int:
        return self.solver_state.step_index

    @torch.inference_mode()
    def advance(self) -> None:
        """The next work item: encode what is given, one denoising step, or one decoded chunk."""
        began = time.perf_counter()
        self.just_stepped = False
        if self.conditioning is None:
            stage = "encode"
            self._encode()
        elif self.steps_done < self.num_steps:
            stage = "denoise"
            self._denoise()
        else:
            stage = "decode"
            self._decode()
        self.timings_s[stage] += time.perf_counter() - began
        if stage == "decode" and self._chunks is None:
            self.video = self._finish()

    def final_latents(self) -> Tensor:
        """[C, T, H, W] fp32, given frames in place."""
        assert self.latents is not None and self.conditioning is not None
        return self.conditioning.apply(self.latents)

    # --- the three kinds of work item -----------------------------------------------------------------------------

    def _encode(self) -> None:
        """Prompts to rows, images to latents, the seed to noise."""
        model, request = self.model, self.request
        width, height, _ = request.size
        first, last = (
            None if image is None else read_image(image, width, height) for image in (request.image, request.last_image)
        )
        if first is None:
            self.conditioning = Conditioning((False,) * self.shape[1])
        elif model.folder.concatenates_image:
            self.conditioning = concatenate_image(model.codec, request, first, last)
        else:
            self.conditioning = give_frames(model.codec, request, first)
        if model.image_encoder is not None and first is not None:
            self.image_rows = model.image_encoder.encode([first] if last is None else [first, last])
        if self.latents is None:
            generator = torch.Generator().manual_seed(request.seed)  # on the CPU: the same picture on every device
            self.latents = torch.randn((1, *self.shape), generator=generator)[0]
        self.latents = self.latents.to(model.device, torch.float32)
        self._prepare(0)

    def _denoise(self) -> None:
        """One step: velocity of every guidance branch in one pack, combined, then the solver."""
        assert self.latents is not None and self.conditioning is not None
        timestep = self.schedule.timesteps[self.steps_done]
        prepared = self._prepare(self.steps_done)
        denoiser = self.model.experts[prepared.expert]
        given = any(self.conditioning.frame_is_given)
        timesteps = torch.tensor([timestep, 0.0] if given else [timestep], device=self.model.device)
        x = self.conditioning.model_input(self.latents)
        velocities = denoiser(prepared.pack, [x] * len(prepared.pack.grids), timesteps)
        velocity = velocities[0].float()
        if prepared.guided:
            velocity = combine(velocity, velocities[1].float(), self._guidance_scale(prepared.expert))
        self.latents, self.solver_state = self.solver.step(self.solver_state, velocity, self.latents)
        self.just_stepped = True

    def _decode(self) -> None:
        """The next chunk of frames; `_chunks` is None again after the last one."""
        assert self.conditioning is not None
        if self._chunks is None:
            latents = self.final_latents()
            if not torch.isfinite(latents).all():
                raise FloatingPointError(f"latents are not finite after {self.num_steps} steps")
            self._chunks = self.model.codec.decode(latents)
        chunk = next(self._chunks, None)
        if chunk is None:
            self._chunks = None
        else:
            self._frames.append(self.conditioning.paste(chunk, sum(map(len, self._frames))))

    # --- what they use --------------------------------------------------------------------------------------------

    def _prepare(self, step: int) -> _Prepared:
        """The pack for a step: kept from the step before unless the expert or the guidance changes there."""
        expert = self.model.expert_at(self.schedule.timesteps[step])
        guided = guidance_is_on(self._guidance_scale(0)) and self._guidance_scale(expert) != 1
        prepared = self._prepared
        if prepared is None or (prepared.expert, prepared.guided) != (expert, guided):
            prompts = [self.request.prompt, self.request.negative_prompt] if guided else [self.request.prompt]
            prepared = _Prepared(expert, guided, self._build_pack(expert, prompts))
            self._prepared = prepared
        return prepared

    def _build_pack(self, expert: int, prompts: list[str]) -> Pack:
        assert self.conditioning is not None
        denoiser = self.model.experts[expert]
        p, q, r = denoiser.config.patch_size
        grid = (self.shape[1] // p, self.shape[2] // q, self.shape[3] // r)
        given = self.conditioning.frame_is_given[::p]
        image = None if self.image_rows is None else denoiser.encode_image(self.image_rows)
        sequences = [Sequence(grid, tuple(map(int, given)), self._text(expert, prompt), image) for prompt in prompts]
        return build_pack(sequences, denoiser.config.attention_head_dim, self.model.device)

    def _text(self, expert: int, prompt: str) -> TextContext:
        denoiser = self.model.experts[expert]
        return self.text_cache.get(
            (str(expert), prompt), lambda: denoiser.encode_text(self.model.text_encoder.encode(prompt))
        )

    def _guidance_scale(self, expert: int) -> float:
        scale = self.request.guidance_scale
        assert scale is not None
        if expert == 1 and self.request.guidance_scale_2 is not None:
            return self.request.guidance_scale_2
        return scale

    def _finish(self) -> Video:
        fps = self.request.fps
        assert fps is not None
        metadata = VideoMetadata(request=self.request, model=self.model.name, timings_s=self.timings_s)
        return Video(np.concatenate(self._frames), fps, metadata)


def check_supported(model: Model, request: VideoRequest) -> None:
    """Raise ValueError for what this model, or this engine as yet, cannot do with a request."""
    folder = model.folder
    if request.image is not None and not (folder.concatenates_image or folder.gives_frames):
        raise ValueError(f"image is not supported by model {model.name!r} (text-to-video only)")
    if request.image is None and folder.concatenates_image:
        raise ValueError(f"image is required by model {model.name!r} (image-to-video only)")
    if request.last_image is not None and not folder.takes_last_image:
        raise ValueError(f"last_image is not supported by model {model.name!r}")
    if request.last_image is not None and request.num_frames == 1:
        raise ValueError("last_image needs num_frames above 1, got 1")
    if request.guidance_scale_2 is not None and len(model.experts) < 2:
        raise ValueError(f"guidance_scale_2 is only for models with two experts, and {model.name!r} has one")
    for name in ("video", "strength"):
        if getattr(request, name) is not None:
            raise ValueError(f"{name} is not supported yet")
    for image in (request.image, request.last_image):
        if isinstance(image, str | os.PathLike):
            check_image(image)
