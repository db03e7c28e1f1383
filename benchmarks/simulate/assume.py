"""What a plan assumes where nothing was measured: a device, a model, requests, a service. Read from a JSON file.

The default is a device like an H100 and Wan2.1-T2V-1.3B. Its step times are arithmetic, not measurements: operations
and bytes as `kernels/roofline.py` counts them, over the device's published limits times efficiencies that are guesses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...kernels import roofline
from ...runtime.engine.scheduler import SchedulerConfig
from ..load.workloads import Kind, Workload, our_prompts
from .cost import Shape, StepCost
from .service import MAX_CALLS, Service

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Device(Strict):
    """Limits as the vendor publishes them (H100 SXM, bf16 dense), and the shares of them that are assumed."""

    name: str = "H100-like"
    operations_per_s: Positive = 989.4e12
    bytes_per_s: Positive = 3.35e12
    linear_efficiency: Share = 0.55
    attention_efficiency: Share = 0.5
    bandwidth_efficiency: Share = 0.7
    launch_s: Seconds = 0.003  # of a step: what the host adds
    encode_s: Seconds = 0.05  # text of a request
    decode_s_per_megapixel: Seconds = 0.08  # of frames
    finish_s_per_megapixel: Seconds = 0.02  # of frames: mp4 and its upload, beside the engine


class Model(Strict):
    """Wan2.1-T2V-1.3B's config."""

    name: str = "Wan2.1-T2V-1.3B"
    dim: Count = 1536
    layers: Count = 30
    heads: Count = 12
    ffn_dim: Count = 8960
    text_tokens: Count = 512
    itemsize: Count = 2
    pixels_per_token: Count = 16  # of a side: the VAE's 8 times the patch's 2
    frames_per_latent: Count = 4
    latents_per_item: Count = 4  # SKYLAPSE_DECODE_CHUNK
    branches: Count = 2


class Request(Strict):
    weight: Count = 1
    width: Count = 832
    height: Count = 480
    num_frames: Count = 81
    num_steps: Count = 30
    fps: Positive = 16.0


class Setup(Strict):
    """deploy/serve.yaml's, and how often a replica dies. dispatchers: null is as many as all slots need."""

    slots: Count = 8
    max_batch_tokens: Count = 32768
    policy: str = "fair"
    dispatchers: Count | None = None
    checkpoint_every: Count = 5
    mtbf_h: Positive = 720.0
    load_s: Seconds = 90.0
    detect_s: Seconds = 1.0


class Assumptions(Strict):
    device: Device = Device()
    model: Model = Model()
    requests: Annotated[dict[str, Request], Field(min_length=1)] = {
        "short": Request(weight=3, num_frames=33),
        "long": Request(),
    }
    service: Setup = Setup()

    def cost(self) -> StepCost:
        """Of one step of a pack; see `kernels/roofline.py` for what each part counts."""
        device, model = self.device, self.model
        dim, head_dim, size = model.dim, model.dim // model.heads, model.itemsize
        linear = model.layers * 2 * (6 * dim * dim + 2 * dim * model.ffn_dim)  # qkv, o, cross q and o; two of the MLP
        cross = roofline.attention([1], [model.text_tokens], model.heads, head_dim, size)
        pair = roofline.attention([1], [1], model.heads, head_dim, size)
        many = 100_000  # tables and weights do not count a token
        moved = (
            roofline.adaln(many, dim, size).num_bytes
            + 2 * roofline.gated_residual_adaln(many, dim, size).num_bytes
            + roofline.qk_norm_rope(many, model.heads, head_dim, size).num_bytes
        ) / many
        linear_per_s = device.operations_per_s * device.linear_efficiency
        attention_per_s = device.operations_per_s * device.attention_efficiency
        bytes_per_s = device.bytes_per_s * device.bandwidth_efficiency
        weights = model.layers * (8 * dim * dim + 2 * dim * model.ffn_dim) * size
        return StepCost(
            fixed_s=device.launch_s + weights / bytes_per_s,
            token_s=linear / linear_per_s + model.layers * (cross.operations / attention_per_s + moved / bytes_per_s),
            pair_s=model.layers * pair.operations / attention_per_s,
        )

    def shapes(self) -> dict[str, Shape]:
        return {name: self._shape(name, request) for name, request in self.requests.items()}

    def workload(self) -> Workload:
        kinds = [Kind(n, r.weight, {"num_inference_steps": r.num_steps}, r.num_frames / r.fps) for n, r in self._each()]
        return Workload("assumed", tuple(kinds), our_prompts(8))

    def serving(self, replicas: int) -> Service:
        """`replicas` of them."""
        setup = self.service
        return Service(
            replicas=replicas,
            slots=setup.slots,
            scheduler=SchedulerConfig(policy=setup.policy, max_batch_tokens=setup.max_batch_tokens),
            dispatchers=setup.dispatchers or math.ceil(replicas * setup.slots / MAX_CALLS),
            checkpoint_every=setup.checkpoint_every,
            mtbf_s=3600 * setup.mtbf_h,
            load_s=setup.load_s,
            detect_s=setup.detect_s,
        )

    def _each(self) -> Iterator[tuple[str, Request]]:
        yield from self.requests.items()

    def _shape(self, name: str, request: Request) -> Shape:
        device, model = self.device, self.model
        if (request.num_frames - 1) % model.frames_per_latent:
            raise ValueError(f"num_frames of {name!r} must be {model.frames_per_latent}k+1, got {request.num_frames}")
        latents = 1 + (request.num_frames - 1) // model.frames_per_latent
        side = model.pixels_per_token
        tokens = latents * math.ceil(request.width / side) * math.ceil(request.height / side)
        megapixels = request.width * request.height / 1e6
        frames = [1] + [  # of each item of decoding: the first latent frame alone, as the engine has it
            model.frames_per_latent * min(model.latents_per_item, latents - start)
            for start in range(1, latents, model.latents_per_item)
        ]
        return Shape(
            name=name,
            tokens=model.branches * tokens,
            num_steps=request.num_steps,
            encode_s=(device.encode_s,),
            decode_s=tuple(device.decode_s_per_megapixel * megapixels * count for count in frames),
            finish_s=device.finish_s_per_megapixel * megapixels * request.num_frames,
            num_branches=model.branches,
            video_s=request.num_frames / request.fps,
        )


def read_assumptions(path: Path | None) -> Assumptions:
    """What the file does not say is the default's. ValueError names the file and what is wrong in it."""
    if path is None:
        return Assumptions()
    try:
        found = Assumptions.model_validate(json.loads(path.read_text(encoding="utf-8")))
        found.shapes()
        found.serving(1)
        return found
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} must be JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path.name} holds no assumptions: {where}: {first['msg']}") from None
