"""Which models there are, where they lie, and what their folders say of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache.spec import PRESETS, parse_policy
from ..request import ModelDefaults, ModelLimits
from .checkpoint import read_json, tensor_headers
from .hub import DEMO_FOLDER, cached_folder, local_folder, resolve_folder
from .published import published

EXPERTS = ("transformer", "transformer_2")
ENCODERS = ("text_encoder", "image_encoder")
TRANSFORMER_CLASS = "WanTransformer3DModel"
VAE_CLASS = "AutoencoderKLWan"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class ModelEntry:
    name: str
    description: str
    source: str
    num_bytes: int | None


@dataclass(frozen=True)
class ComponentReport:
    name: str
    kind: str
    num_parameters: int
    num_bytes: int | None  # of its files; None where they are not here
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class ModelReport:
    name: str
    folder: str
    components: list[ComponentReport]
    tasks: list[str]
    native_sizes: list[tuple[int, int]]
    defaults: ModelDefaults
    limits: ModelLimits
    loaded_bytes: dict[str, int]  # of all weights, by precision: "bf16", "bf16+fp8", ...


@dataclass(frozen=True)
class ModelFolder:
    """What a diffusers folder's JSON files say; no weight is read."""

    path: Path
    index: dict[str, Any]
    transformers: dict[str, dict[str, Any]]  # component name -> config
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)  # skylapse.json
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)  # of text and images: component name -> config

    @property
    def transformer(self) -> dict[str, Any]:
        """The config that both experts share, where there are two."""
        return next(iter(self.transformers.values()))

    @property
    def boundary_timestep(self) -> float | None:
        """At or above it the first expert works, below it the second."""
        ratio = self.index.get("boundary_ratio")
        return None if ratio is None else ratio * self.scheduler.get("num_train_timesteps", 1000)

    @property
    def concatenates_image(self) -> bool:
        """Image-to-video through extra input channels (mask and encoded video), as Wan2.1 and Wan2.2-A14B do it."""
        z_dim: int = self.vae.get("z_dim", 16)
        return bool(self.transformer.get("in_channels", 16) != z_dim)

    @property
    def gives_frames(self) -> bool:
        """Image-to-video through clean latent frames at timestep 0, as Wan2.2-TI2V and the demo model do it."""
        return bool(self.index.get("expand_timesteps"))

    @property
    def takes_last_image(self) -> bool:
        config = self.transformer
        shows_one = config.get("image_dim") is not None and not config.get("pos_embed_seq_len")
        return self.gives_frames or (self.concatenates_image and not shows_one)

    @property
    def requires_last_image(self) -> bool:
        """Wan2.1-FLF2V's position embedding is of two images' rows, and fits no other number."""
        return self.concatenates_image and bool(self.transformer.get("pos_embed_seq_len"))

    @property
    def tasks(self) -> list[str]:
        image = self.concatenates_image or self.gives_frames
        return [
            *([] if self.concatenates_image else ["text-to-video", "video-to-video"]),
            *(["image-to-video"] if image else []),
            *(["first-and-last-frame-to-video"] if self.takes_last_image else []),
            *(["video-extension"] if image else []),
        ]

    @property
    def cache_presets(self) -> dict[str, str]:
        """What skylapse.json says of the presets: preset -> policy."""
        given: dict[str, str] = self.extra.get("cache", {})
        for preset, policy in given.items():
            if preset not in PRESETS:
                raise ValueError(f"skylapse.json: unknown cache preset {preset!r} (known: {', '.join(PRESETS)})")
            parse_policy(policy)
        return given

    @property
    def native_sizes(self) -> list[tuple[int, int]]:
        return [(int(w), int(h)) for w, h in self.extra.get("native_sizes", [])] or [
            (self.defaults.width, self.defaults.height)
        ]

    @property
    def defaults(self) -> ModelDefaults:
        """skylapse.json where the folder has one, else what `WanPipeline.__call__` has."""
        given = self.extra.get("defaults", {})
        known = {
            "width": 832,
            "height": 480,
            "num_frames": 81,
            "fps": 16,
            "num_inference_steps": 50,
            "guidance_scale": 5.0,
            "guidance_scale_2": None,
        }
        if unknown := sorted(given.keys() - known.keys()):
            raise ValueError(f"skylapse.json: unknown default {unknown[0]!r} (known: {', '.join(known)})")
        return ModelDefaults(**(known | given))

    @property
    def limits(self) -> ModelLimits:
        given = self.extra.get("limits", {})
        temporal, patch = self.vae.get("scale_factor_temporal", 4), self.transformer.get("patch_size", (1, 2, 2))
        longest = temporal * (self.transformer.get("rope_max_seq_len", 1024) * patch[0] - 1) + 1
        return ModelLimits(
            size_multiple=math.lcm(*(self.vae.get("scale_factor_spatial", 8) * p for p in patch[1:])),
            temporal_multiple=temporal * patch[0],
            max_num_frames=min(longest, given.get("max_num_frames", 1025)),
            max_pixels=given.get("max_pixels", 3840 * 2176),
        )


def read_folder(path: Path, name: str = "") -> ModelFolder:
    """Read and check a folder's JSON files; ValueError names what is missing or not supported.

    name: the model's, as it was asked for: a published one has native sizes and defaults without a skylapse.json too.
    """
    index = read_json(path / "model_index.json")
    experts = [expert for expert in EXPERTS if (index.get(expert) or [None, None])[1] is not None]
    if not experts:
        raise ValueError(f"{path.name}/model_index.json names no transformer")
    for part, expected in [*((expert, TRANSFORMER_CLASS) for expert in experts), ("vae", VAE_CLASS)]:
        found = (index.get(part) or [None, None])[1]
        if found != expected:
            raise ValueError(f"{path.name}/model_index.json: {part} must be {expected}, got {found}")
    extra = path / "skylapse.json"
    known = published().get(name, {}).get("extra", {})
    return ModelFolder(
        path=path,
        index=index,
        transformers={expert: read_json(path / expert / "config.json") for expert in experts},
        vae=read_json(path / "vae" / "config.json"),
        scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
        extra=read_json(extra) if extra.exists() else known,
        encoders={part: read_json(path / part / "config.json") for part in ENCODERS if (path / part).is_dir()},
    )


def published_folder(name: str) -> ModelFolder | None:
    """A published checkpoint as its configs in this package describe it; None for one that they do not know."""
    found = published().get(name)
    if found is None:
        return None
    return ModelFolder(path=Path(name), scheduler={"num_train_timesteps": 1000}, **found)


def list_models(cache_dir: Path | None = None) -> list[ModelEntry]:
    """The model inside the package, and the complete diffusers folders among the downloaded ones."""
    return [
        ModelEntry(
            "demo", "small Wan model for moving shapes, ships inside the package", "package", _size(DEMO_FOLDER)
        ),
        *_cached_models(cache_dir),
    ]


def _cached_models(cache_dir: Path | None) -> Iterator[ModelEntry]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(cache_dir).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda r: r.repo_id):
        for revision in repository.revisions:
            path = revision.snapshot_path / "model_index.json"
            if not any(revision.snapshot_path.glob("transformer/*.safetensors")):  # an ingress reads JSON alone
                continue
            if path.exists() and json.loads(path.read_text()).get("transformer", [None, None])[1] == TRANSFORMER_CLASS:
                yield ModelEntry(repository.repo_id, "downloaded", "hub cache", revision.size_on_disk)
                break


def describe(name: str, cache_dir: Path | None = None) -> ModelFolder:
    """A model's configs, from the disk where it is there, from this package where it is published, else downloaded."""
    if local_folder(name) is None and (known := published_folder(name)) is not None:
        return known if (path := cached_folder(name, cache_dir, None)) is None else read_folder(path, name)
    return read_folder(resolve_folder(name, cache_dir), name)


def inspect_model(name: str, cache_dir: Path | None = None) -> ModelReport:
    """What a model consists of, takes and can do, from its JSON files and its safetensors files' headers.

    Of a published checkpoint that is not there, from its configs in this package.
    """
    from .sizes import loaded_bytes, reports_of  # they build denoisers, whose configs are read with this module's help

    folder = describe(name, cache_dir)
    if folder.path.is_dir():
        parts = [(part, "diffusion_pytorch_model") for part in (*folder.transformers, "vae")]
        parts += [(part, "model") for part in folder.encoders]
        components = [_inspect_component(folder.path, part, stem) for part, stem in parts]
    else:
        components = reports_of(folder)
    return ModelReport(
        name=name,
        folder=str(folder.path) if folder.path.is_dir() else "not downloaded",
        components=components,
        tasks=folder.tasks,
        native_sizes=folder.native_sizes,
        defaults=folder.defaults,
        limits=folder.limits,
        loaded_bytes=loaded_bytes(folder, components),
    )


def _inspect_component(path: Path, part: str, stem: str) -> ComponentReport:
    config = read_json(path / part / "config.json")
    headers = list(tensor_headers(path / part, stem))
    counts = [(math.prod(shape), dtype) for _, shape, dtype in headers]
    return ComponentReport(
        name=part,
        kind=config.get("_class_name") or (config.get("architectures") or ["unknown"])[0],
        num_parameters=sum(count for count, _ in counts),
        num_bytes=sum(count * BYTES.get(dtype, 0) for count, dtype in counts),
        dtypes=tuple(sorted({dtype for _, dtype in counts})),
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
