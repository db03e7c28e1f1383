"""One request on its way: encode, denoise step by step, decode chunk by chunk.

Encoding and decoding are work items of bounded length; the steps between them are taken together with other requests'
(denoise.py), and what belongs to one request alone is kept here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from reprlib import repr as short

import numpy as np
import torch
from torch import Tensor

from ...kernels import backends
from ...kernels.tables import send
from ..cache.policy import Run, relative_l1
from ..cache.spec import Choice, choose
from ..cache.step_cache import StepCache
from ..checkpoints.registry import EXPERTS
from ..conditioning.given import read_given, read_video_of
from ..conditioning.latents import Conditioning, concatenate_frames, give_frames
from ..core.device import peak_bytes
from ..core.events import Progress
from ..core.request import Video, VideoMetadata, VideoRequest
from ..core.submit_options import Terms
from ..core.usage import Account
from ..layers.pack import Grid
from ..memory.fit import Fit, Needs, Size
from ..models.model import Model
from ..models.text_cache import TextCache
from ..sampler.fused import fused_step, fuses
from ..sampler.guidance import combine
from ..sampler.schedule import first_step_of, make_schedule
from ..sampler.solver import get_solver
from ..sampler.state import add_noise, predict_clean, state_bytes
from ..vae.codec import VideoCodec
from ..vae.preview import AnyPreviewer
from .holdings import needs_at
from .prompt_encoder import BranchEncoder, Branches
from .step_plan import StepPlan, plan_steps


class Trajectory:
    """A request, its latents and everything else that belongs to it alone."""

    def __init__(
        self,
        ticket: int,
        model: Model,
        request: VideoRequest,
        text_cache: TextCache,
        latents: Tensor | None = None,
        terms: Terms | None = None,
    ) -> None:
        assert request.num_inference_steps is not None
        self.ticket, self.model, self.request = ticket, model, request
        self.terms = terms or Terms()
        self.account = Account()
        width, height, num_frames = request.size
        self.shape = model.codec.latent_shape(num_frames, height, width)
        _check_latents(latents, self.shape)
        self.latents = latents
        self.generator = torch.Generator().manual_seed(request.seed)  # on the CPU: the same picture on every device
        self.schedule = make_schedule(model.solver, request.num_inference_steps, request.shift, request.solver)
        self.solver = get_solver(self.schedule.config.solver)
        self.first_step = first_step_of(self.schedule.num_steps, request.strength)  # of the schedule
        self.solver_state = self.solver.start(self.schedule, self.first_step)
        self.sigmas = self.schedule.sigmas[self.first_step :]  # of the steps that are taken, and the final 0
        self.plans = plan_steps(model, request, self.sigmas, self.schedule.timesteps[self.first_step :])
        self.branch_encoder = BranchEncoder(model, request, self.plans, text_cache)
        choice = choose(request.cache or "none", self.num_steps, model.cache_presets, model.is_distilled)
        self.cache = StepCache(choice, self._run(choice))
        p, q, r = model.experts[0].config.patch_size
        self.grid: Grid = (self.shape[1] // p, self.shape[2] // q, self.shape[3] // r)
        self.fit: Fit | None = None  # how memory lets it be run, once it has been admitted
        self.conditioning: Conditioning | None = None
        self.video: Video | None = None
        self.clean: Tensor | None = None  # [C, T, H, W], the clean latents that the last step's velocity implied
        self.pixels: Tensor | None = None  # or the preview of them, where the step's kernel has made it
        self.timings_s: dict[str, float] = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self.submitted_s = time.monotonic()
        self.arrived = 0  # the scheduler's clock at submission
        self._items: Iterator[None] | None = None
        self._frames: list[np.ndarray] = []
        self._denoising_since_s = self.submitted_s
        self._pace_from: tuple[int, float] | None = None  # (steps done, time) when denoising began here

    def charged_to(self, account: Account | None) -> Trajectory:
        """Itself, whose work is added to this account."""
        self.account = account or self.account
        return self

    # --- where it stands ------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """How many are taken: fewer than the schedule has where the clip starts from a noised source."""
        return self.schedule.num_steps - self.first_step

    @property
    def steps_done(self) -> int:
        return self.solver_state.step_index - self.first_step

    @property
    def stage(self) -> str:
        """encode, denoise or decode: what its next piece of work is."""
        if self.conditioning is None or self.branch_encoder.needs_text:
            return "encode"
        return "denoise" if self.steps_done < self.num_steps else "decode"

    @property
    def plan(self) -> StepPlan:
        """Of the step that comes next."""
        return self.plans[self.steps_done]

    @property
    def next_plan(self) -> StepPlan:
        """Of the step that comes next, or of the last one."""
        return self.plans[min(self.steps_done, self.num_steps - 1)]

    @cached_property
    def total_tokens(self) -> int:
        """Of all its model evaluations, all branches; those that its cache will skip are left out where it knows."""
        computed = self.cache.mask or (True,) * self.num_steps
        return self.num_tokens * sum(plan.num_branches for plan, runs in zip(self.plans, computed, strict=True) if runs)

    def is_late(self, now_s: float) -> bool:
        """Whether its deadline has passed; now_s by `time.monotonic`."""
        return self.terms.deadline_s is not None and now_s - self.submitted_s > self.terms.deadline_s

    def progress(self, step: int) -> Progress:
        """What to tell after a step."""
        now_s = time.monotonic()
        if self._pace_from is None:
            self._pace_from = (step - 1, self._denoising_since_s)
        first, since_s = self._pace_from
        step_s = (now_s - since_s) / (step - first)
        num_skipped = self.cache.trace[:step].count("0")
        eta_s, usage = step_s * (self.num_steps - step), self.account.usage
        return Progress(self.ticket, step, self.num_steps, step_s, eta_s, num_skipped, usage)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(ticket, branch) of each of the next step's sequences."""
        return [(self.ticket, branch) for branch in range(self.plan.num_branches)]

    @property
    def current(self) -> Tensor:
        """The latents [C, T, H, W] fp32 that the next step starts from."""
        assert self.latents is not None
        return self.latents

    @property
    def previews_next(self) -> bool:
        """Whether the step that comes next asks for a preview."""
        return bool(self.terms.preview_every) and (self.steps_done + 1) % self.terms.preview_every == 0

    @property
    def is_due(self) -> bool:
        """Whether the step just taken asks for a preview or a checkpoint before the next one."""
        step, terms = self.steps_done, self.terms
        return any(every and step % every == 0 for every in (terms.preview_every, terms.checkpoint_every))

    @property
    def frame_is_given(self) -> tuple[bool, ...]:
        """For each row of the patch grid along time."""
        assert self.conditioning is not None
        return self.conditioning.frame_is_given[:: self.model.experts[0].config.patch_size[0]]

    @property
    def num_tokens(self) -> int:
        """Of one branch."""
        return math.prod(self.grid)

    @property
    def num_branches(self) -> int:
        """Of its most expensive step."""
        return max(plan.num_branches for plan in self.plans)

    @cached_property
    def needs(self) -> Needs:
        """What it takes of the device's memory beside the model."""
        return needs_at(self, Size(*self.request.size))

    @property
    def resident_bytes(self) -> int:
        """What it will hold between two steps at most: latents, solver, conditioning, text, cache and frames."""
        return self.needs.held_bytes

    @property
    def num_bytes(self) -> int:
        """Of the tensors and pixels that it holds between two steps."""
        held = sum(tensor.nbytes for tensor in (self.latents, self.clean, self.pixels) if tensor is not None)
        held += self.branch_encoder.num_bytes
        held += self.conditioning.num_bytes if self.conditioning else 0
        return held + state_bytes(self.solver_state) + self.cache.num_bytes + sum(f.nbytes for f in self._frames)

    @property
    def codec(self) -> VideoCodec:
        """The model's, with chunks and tiles as memory lets this request have them."""
        codec = self.model.codec
        return codec if self.fit is None else codec.by(self.fit.way.chunk, self.fit.way.tiling)

    # --- work items -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def work(self) -> None:
        """The next item of encoding or decoding; `video` is there after the last one."""
        began, stage = time.perf_counter(), self.stage
        if self._items is None:
            self._items = self._encode() if stage == "encode" else self._decode()
        finished = next(self._items, "finished") == "finished"
        self.timings_s[stage] += time.perf_counter() - began
        if finished:
            self._items = None
            self._denoising_since_s = time.monotonic()
            if stage == "decode":
                self.video = self._finish()

    def _encode(self) -> Iterator[None]:
        """Prompts to rows, given frames and a source to latents, the seed to noise."""
        yield from self.branch_encoder.encode_text()
        if self.conditioning is None:  # else it comes from a checkpoint, which holds all but the text
            self.conditioning = yield from self._condition()
        if self.model.residency.is_on_device(EXPERTS[self.next_plan.expert]):
            self.branch_encoder.at(self.next_plan)

    def _condition(self) -> Generator[None, None, Conditioning]:
        """What is given and the noise; both know nothing of the prompts."""
        model, request = self.model, self.request
        given = yield from read_given(request)
        conditioning = Conditioning((False,) * self.shape[1])
        if given:
            if model.image_encoder is not None:
                yield
                model.residency.require("image_encoder")
                self.branch_encoder.image_rows = model.image_encoder.encode([piece.frames[0] for piece in given])
            yield
            encode = concatenate_frames if model.folder.concatenates_image else give_frames
            for item in encode(self.codec, request, given):
                if item is None:
                    yield
                else:
                    conditioning = item
        if self.latents is None:
            self.latents = torch.randn((1, *self.shape), generator=self.generator)[0]
        self.latents = send(self.latents.float(), model.device).contiguous()
        if request.strength is not None:
            source, chunks = (yield from read_video_of(request)), []
            for chunk in self.codec.encode_chunks(source):
                chunks.append(chunk)
                yield
            self.latents = add_noise(torch.cat(chunks, dim=1), self.latents, self.sigmas[0])
        return conditioning

    def _decode(self) -> Iterator[None]:
        """Frames, chunk by chunk, given pixels in their places."""
        assert self.conditioning is not None and self.request.num_frames is not None
        start = 0
        beside = self.fit is None or self.fit.overlaps
        for chunk in self.codec.decode(self.final_latents(), beside=beside):
            self._frames.append(self.conditioning.paste(chunk, start))
            start += len(chunk)
            if start < self.request.num_frames:
                yield

    def _finish(self) -> Video:
        assert self.request.fps is not None
        metadata = VideoMetadata(
            request=self.request,
            model=self.model.name,
            timings_s=self.timings_s,
            cache=self.cache.report(),
            cut_tokens=self.branch_encoder.cut_tokens,
            peak_bytes=peak_bytes(self.model.device),
            lossy_kernels=backends.current().lossy(self.model.device),
        )
        return Video(np.concatenate(self._frames), self.request.fps, metadata)

    # --- one denoising step ---------------------------------------------------------------------------------------

    def branches(self) -> Branches:
        """What the next step's sequences attend to."""
        return self.branch_encoder.at(self.plan)

    def model_input(self) -> Tensor:
        """The denoiser's input [C_in, T, H, W]."""
        assert self.conditioning is not None and self.latents is not None
        return self.conditioning.model_input(self.latents)

    def guide(self, velocities: Sequence[Tensor]) -> Tensor:
        """Velocities [C, T, H, W] of the branches -> the guided one, fp32, in memory of its own: caches keep it."""
        velocity = self._guided(velocities)
        shares_memory = velocity.untyped_storage().nbytes() > velocity.nbytes
        return velocity.clone() if shares_memory else velocity

    def _guided(self, velocities: Sequence[Tensor]) -> Tensor:
        if len(velocities) == 1:
            return velocities[0].float()
        assert self.plan.guidance_scale is not None
        return combine(velocities[0].float(), velocities[1].float(), self.plan.guidance_scale)

    def advance(self, velocities: Sequence[Tensor], previewer: AnyPreviewer | None = None) -> None:
        """Take the step with the branches' velocities [C, T, H, W], or with the guided one alone.

        previewer: for a step that asks for a preview, which the step's kernel makes too where no frames are given.
        """
        latents, conditioning = self.current, self.conditioning
        assert conditioning is not None
        shows, self.clean, self.pixels = self.previews_next, None, None
        if fuses(latents):
            shown = previewer.linear if shows and previewer and conditioning.given is None else None
            scale = self.plan.guidance_scale or 1.0
            moved, self.solver_state = fused_step(self.solver_state, velocities, scale, latents, shown)
            self.latents, self.pixels = moved.latents, moved.preview
            if shows and moved.preview is None:
                self.clean = conditioning.apply(moved.clean)
        else:
            velocity = self._guided(velocities)
            if shows:
                self.clean = conditioning.apply(predict_clean(latents, velocity, self.plan.sigma))
            self.latents, self.solver_state = self.solver.step(self.solver_state, velocity, latents)
        if self.steps_done == self.num_steps:  # beside others, so this is how long it took, not how long it worked
            self.timings_s["denoise"] += time.monotonic() - self._denoising_since_s

    def final_latents(self) -> Tensor:
        """[C, T, H, W] fp32, given frames in place."""
        assert self.latents is not None and self.conditioning is not None
        return self.conditioning.apply(self.latents)

    # --- what they use --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embedding_distances(self) -> tuple[float, ...]:
        """Relative L1 distance of each step's timestep embedding to the step before; the first is 0."""
        embeddings = []
        with self.model.residency.still():  # they are read where they are: nothing moves for a few rows
            for plan in self.plans:
                embedder = self.model.experts[plan.expert].condition_embedder
                timestep = send(torch.tensor([plan.timestep]), next(embedder.parameters()).device)
                embedding, _ = embedder.embed_time(timestep, torch.float32)
                embeddings.append(send(embedding, self.model.device))
        distances = [relative_l1(now, before) for before, now in pairwise(embeddings)]
        return (0.0, *(torch.stack(distances).tolist() if distances else ()))

    def _run(self, choice: Choice) -> Run:
        """What the cache policy may know: a change of expert or guidance, and a checkpoint, restart it."""
        keys = [(plan.expert, plan.guidance_scale) for plan in self.plans]
        every = self.terms.checkpoint_every
        solver, shift = self.schedule.config.solver, self.schedule.config.shift
        calibrations, num_steps = self.model.calibrations, self.schedule.num_steps
        calibration = calibrations.find(solver, num_steps, shift)
        return Run(
            sigmas=self.sigmas,
            num_blocks=self.model.experts[0].config.num_layers,
            guidance_scale=self.request.guidance_scale or 0.0,
            restarts=frozenset(
                step
                for step in range(self.num_steps)
                if step == 0 or keys[step] != keys[step - 1] or (every and step % every == 0)
            ),
            calibration=calibration and calibration.after(self.first_step),
            missing=calibrations.missing(solver, num_steps, shift, self.model.name),
            embedding_distances=self.embedding_distances() if choice.policy.name == "teacache" else (),
            coefficients=self.model.teacache_coefficients,
        )


def _check_latents(latents: object, shape: tuple[int, ...]) -> None:
    if latents is None:
        return
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents must be a tensor, got {short(latents)}")
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must be {list(shape)} for this request, got {list(latents.shape)}")
    if not latents.is_floating_point():
        raise ValueError(f"latents must be floating point, got {latents.dtype}")
