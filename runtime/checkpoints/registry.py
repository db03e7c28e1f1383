"""List models, find and read their configs, and tell what a model is made of and can do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.json_file import read_json, typed
from ..core.request import ModelDefaults, ModelLimits
from ..families.wan.agreement import check_agreement
from ..families.wan.config import WanConfig
from ..sampler.config import SolverConfig
from ..vae.wan_config import WanVAEConfig
from .card import DEFAULTS, Limits, check_fields, check_shapes
from .configs import parse_config
from .encoder_configs import encoder_fields, image_encoder_config, text_encoder_config
from .hub import DEMO_FOLDER, cached_folder, local_folder, resolve_folder
from .model_index import ALWAYS, CLASSES, FOR_IMAGES, ModelIndex, ignored_parts, read_index
from .model_index import EXPERTS as EXPERTS
from .model_index import TRANSFORMER_CLASS as TRANSFORMER_CLASS
from .model_index import VAE_CLASS as VAE_CLASS
from .published import published

ENCODERS = ("text_encoder", "image_encoder")
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
    ignored: dict[str, str] = field(default_factory=dict)  # parts of the folder that nothing uses -> why


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder's JSON files, read and checked; no weight is read."""

    path: Path
    index: dict[str, Any]
    transformers: dict[str, dict[str, Any]]  # component name -> config
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)  # skylapse.json
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)  # of text and images: component name -> config
    ignored: dict[str, str] = field(default_factory=dict)  # parts that are there and not used -> why

    @property
    def transformer(self) -> dict[str, Any]:
        """The config that both experts share, where there are two."""
        return next(iter(self.transformers.values()))

    @property
    def boundary_timestep(self) -> float | None:
        """Return the timestep from which up the first expert works, and below it the second; None for one expert."""
        ratio = self.index.get("boundary_ratio")
        return None if ratio is None else ratio * self.scheduler.get("num_train_timesteps", 1000)

    @property
    def concatenates_image(self) -> bool:
        """Return whether images go into extra input channels (mask and encoded video), as in Wan2.1 and Wan2.2-A14B."""
        z_dim: int = self.vae.get("z_dim", 16)
        return bool(self.transformer.get("in_channels", 16) != z_dim)

    @property
    def gives_frames(self) -> bool:
        """Return whether images become clean latent frames at timestep 0, as in Wan2.2-TI2V and the demo model."""
        return bool(self.index.get("expand_timesteps"))

    @property
    def takes_last_image(self) -> bool:
        config = self.transformer
        shows_one = config.get("image_dim") is not None and not config.get("pos_embed_seq_len")
        return self.gives_frames or (self.concatenates_image and not shows_one)

    @property
    def requires_last_image(self) -> bool:
        """Return whether it takes two images alone: Wan2.1-FLF2V's position embedding is of two images' rows."""
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
        """Return the presets of skylapse.json: preset -> policy."""
        given: dict[str, str] = self.extra.get("cache", {})
        return given

    @property
    def native_sizes(self) -> list[tuple[int, int]]:
        return [(int(w), int(h)) for w, h in self.extra.get("native_sizes", [])] or [
            (self.defaults.width, self.defaults.height)
        ]

    @property
    def defaults(self) -> ModelDefaults:
        """Return skylapse.json's defaults, else those of `WanPipeline.__call__`, as near as the model makes them."""
        given = {name: value for name, value in self.extra.get("defaults", {}).items() if value is not None}
        limits, nearest = self.limits, dict(DEFAULTS)
        for side in ("width", "height"):
            nearest[side] = max(1, DEFAULTS[side] // limits.size_multiple) * limits.size_multiple
        nearest["num_frames"] = min(DEFAULTS["num_frames"], limits.max_num_frames)
        return ModelDefaults(**(nearest | given))

    @property
    def limits(self) -> ModelLimits:
        given = typed(Limits, self.extra.get("limits", {}), "limits")
        temporal, patch = self.vae.get("scale_factor_temporal", 4), self.transformer.get("patch_size", (1, 2, 2))
        longest = temporal * (self.transformer.get("rope_max_seq_len", 1024) * patch[0] - 1) + 1
        return ModelLimits(
            size_multiple=math.lcm(*(self.vae.get("scale_factor_spatial", 8) * p for p in patch[1:])),
            temporal_multiple=temporal * patch[0],
            max_num_frames=min(longest, given.max_num_frames),
            max_pixels=given.max_pixels,
        )


def read_folder(path: Path, name: str = "") -> ModelFolder:
    """Read and check a folder's JSON files; ValueError names the model, the file, the field and what is allowed.

    name: the model's, as it was asked for; a published model has native sizes and defaults without a skylapse.json.
    No weight is looked at; `check_loadable` does that.
    """
    try:
        folder = _read(path, name)
        check_shapes(folder)
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}" if name else str(error)) from error
    return folder


def _read(path: Path, name: str) -> ModelFolder:
    index = read_index(path, name if name and Path(name).is_dir() else str(path))  # as it was given
    transformers = {part: _component(path, part) for part in index.experts}
    configs = {part: parse_config(WanConfig, fields, part) for part, fields in transformers.items()}
    config = next(iter(configs.values()))
    needed = [*ALWAYS, *(FOR_IMAGES if config.image_dim is not None else ())]
    for part in needed:
        if part not in index.classes:
            raise ValueError(f"model_index.json: there is no {part}, which the model needs")
        if not (path / part).is_dir():
            raise ValueError(f"{part} is missing: model_index.json names it, and there is no folder {path / part}")
    encoders = {
        part: encoder_fields(part, read_json(path / part / "config.json"), index.classes[part])
        for part in ENCODERS
        if part in needed
    }
    vae, scheduler = _component(path, "vae"), _scheduler(path, index)
    image = encoders.get("image_encoder")
    check_agreement(
        configs,
        parse_config(WanVAEConfig, vae, "vae"),
        text_encoder_config(encoders["text_encoder"]),
        None if image is None else image_encoder_config(image),
        index.expand_timesteps,
    )
    card = path / "skylapse.json"
    return ModelFolder(
        path=path,
        index=index.fields,
        transformers=transformers,
        vae=vae,
        scheduler=scheduler,
        extra=check_fields(read_json(card)) if card.exists() else published().get(name, {}).get("extra", {}),
        encoders=encoders,
        ignored=ignored_parts(path, index, [*transformers, *needed]),
    )


def _component(path: Path, part: str) -> dict[str, Any]:
    """Return the fields of a denoiser's or a VAE's config.json; null means the default, as does a missing field."""
    given = {name: value for name, value in read_json(path / part / "config.json").items() if value is not None}
    if (found := given.get("_class_name")) not in (None, *CLASSES[part]):
        raise ValueError(f"{part}/config.json: _class_name must be {CLASSES[part][0]}, got {found}")
    return given


def _scheduler(path: Path, index: ModelIndex) -> dict[str, Any]:
    fields = read_json(path / "scheduler" / "scheduler_config.json")
    given = {name: value for name, value in fields.items() if value is not None}
    promised, found = index.classes["scheduler"], given.setdefault("_class_name", index.classes["scheduler"])
    SolverConfig.from_diffusers(given)
    if found != promised:
        raise ValueError(
            f"scheduler/scheduler_config.json: _class_name must be {promised}, as in model_index.json, got {found}"
        )
    return given


def published_folder(name: str) -> ModelFolder | None:
    """Return a published checkpoint as its configs in this package describe it; None for one that they do not know."""
    found = published().get(name)
    if found is None:
        return None
    return ModelFolder(path=Path(name), scheduler={"num_train_timesteps": 1000}, **found)


def list_models(cache_dir: Path | None = None) -> list[ModelEntry]:
    """Return the model inside the package, and the complete diffusers folders among the downloaded ones."""
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
    """Return a model's configs: from the disk, else from this package if it is published, else downloaded."""
    return known_folder(name, cache_dir) or read_folder(resolve_folder(name, cache_dir), name)


def known_folder(name: str, cache_dir: Path | None = None) -> ModelFolder | None:
    """Return a model's configs if they are on this machine: local, downloaded or published; None if a hub has them."""
    path = local_folder(name) or cached_folder(name, cache_dir, None)
    return published_folder(name) if path is None else read_folder(path, name)


def inspect_model(name: str, cache_dir: Path | None = None) -> ModelReport:
    """Tell a model's components, limits and tasks, from its JSON files and its safetensors files' headers.

    A published checkpoint that is not there is told from its configs in this package, and a folder without weights from
    its JSON files alone. A model that could not be loaded is refused, with the ValueError that loading would raise.
    """
    from ..memory.sizes import loaded_bytes, reports_of
    from ..models.parts import holds_weights  # these import torch, which a service that reads JSON alone does without

    folder = describe(name, cache_dir)
    where = str(folder.path) if folder.path.is_dir() else "not downloaded"
    if not folder.path.is_dir() or not holds_weights(folder):
        where += ", without weights" if folder.path.is_dir() else ""
        components = reports_of(folder)
    else:
        from ..models.loadable import check_loadable

        try:
            check_loadable(folder)
        except ValueError as error:
            raise ValueError(f"model {name!r}: {error}") from error
        parts = [(part, "diffusion_pytorch_model") for part in (*folder.transformers, "vae")]
        parts += [(part, "model") for part in folder.encoders]
        components = [_inspect_component(folder.path, part, stem) for part, stem in parts]
    return ModelReport(
        name=name,
        folder=where,
        components=components,
        tasks=folder.tasks,
        native_sizes=folder.native_sizes,
        defaults=folder.defaults,
        limits=folder.limits,
        loaded_bytes=loaded_bytes(folder, components),
        ignored=folder.ignored,
    )


def _inspect_component(path: Path, part: str, stem: str) -> ComponentReport:
    from .weights import tensor_headers

    config = read_json(path / part / "config.json")
    counts = [(math.prod(shape), dtype) for shape, dtype in tensor_headers(path / part, stem).values()]
    return ComponentReport(
        name=part,
        kind=config.get("_class_name") or (config.get("architectures") or ["unknown"])[0],
        num_parameters=sum(count for count, _ in counts),
        num_bytes=sum(count * BYTES.get(dtype, 0) for count, dtype in counts),
        dtypes=tuple(sorted({dtype for _, dtype in counts})),
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
