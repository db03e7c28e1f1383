"""model_index.json: the parts that a folder promises, and those of them that a Wan model is made of."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..core.json_file import read_json, shown, typed_value
from .encoder_configs import IMAGE_CLASSES, TEXT_CLASSES

logger = logging.getLogger(__name__)
FILE = "model_index.json"
EXPERTS = ("transformer", "transformer_2")
TRANSFORMER_CLASS = "WanTransformer3DModel"
VAE_CLASS = "AutoencoderKLWan"
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
CLASSES = {  # of parts whose class matters; a tokenizer's and an image processor's are told by their own files
    **dict.fromkeys(EXPERTS, (TRANSFORMER_CLASS,)),
    "vae": (VAE_CLASS,),
    "text_encoder": TEXT_CLASSES,
    "image_encoder": IMAGE_CLASSES,
}
ALWAYS = ("vae", "text_encoder", "tokenizer", "scheduler")
FOR_IMAGES = ("image_encoder", "image_processor")  # where the transformer attends to an image's rows


@dataclass(frozen=True)
class ModelIndex:
    """A folder's model_index.json, its types checked."""

    fields: dict[str, Any]
    classes: dict[str, str]  # part -> class, of the parts that are there
    boundary_ratio: float | None
    expand_timesteps: bool

    @property
    def experts(self) -> list[str]:
        """Return the transformers that diffusers would denoise with; ValueError where it would miss one."""
        there, ratio = [part for part in EXPERTS if part in self.classes], self.boundary_ratio
        if not there:
            raise ValueError(f"{FILE}: there is no transformer")
        if ratio is None or ratio == 0:
            wanted = ["transformer"]
        elif there == ["transformer_2"] and ratio == 1:
            wanted = there
        else:
            wanted = list(EXPERTS)
        for part in wanted:
            if part not in there:
                because = "" if ratio is None else f", and boundary_ratio = {shown(ratio)} needs one"
                raise ValueError(f"{FILE}: there is no {part}{because}")
        return wanted


def read_index(folder: Path, name: str) -> ModelIndex:
    """Read and check model_index.json; ValueError names the folder as it was given, or the field that is wrong.

    name: the folder's, in messages.
    """
    name = name.rstrip("/") or name
    if not (folder / FILE).is_file():
        raise ValueError(_no_index(folder, name))
    fields = read_json(folder / FILE, f"{name}/{FILE}")
    try:
        given = {field: value for field, value in fields.items() if value is not None}
        ratio = typed_value("boundary_ratio", given.get("boundary_ratio", 0), float)
        if not 0 <= ratio <= 1:
            raise ValueError(f"boundary_ratio must be from 0 to 1, got {shown(ratio)}")
        return ModelIndex(
            fields=given,
            classes={part: class_name for part in given if (class_name := _class_of(part, given[part])) is not None},
            boundary_ratio=given.get("boundary_ratio"),
            expand_timesteps=typed_value("expand_timesteps", given.get("expand_timesteps", False), bool),
        )
    except ValueError as error:
        raise ValueError(f"{FILE}: {error}") from None


def _class_of(part: str, entry: Any) -> str | None:
    """Return the class of an entry, [library, class]; None for a part that is switched off, and for what is no part."""
    known = part in (*CLASSES, *ALWAYS, *FOR_IMAGES)
    pair = isinstance(entry, list) and len(entry) == 2 and all(one is None or isinstance(one, str) for one in entry)
    if not pair:
        if known:
            raise ValueError(f"{part} must be a pair of library and class, got {shown(entry)}")
        return None
    class_name: str | None = entry[1]
    if part in CLASSES and class_name is not None and class_name not in CLASSES[part]:
        raise ValueError(f"{part} must be {' or '.join(CLASSES[part])}, got {class_name}")
    return class_name


def _no_index(folder: Path, name: str) -> str:
    """Return the refusal of a folder without a model_index.json, naming the place of one that is near."""
    told = f"{name}/{FILE} is missing: a model is a folder in diffusers' format"
    if (folder.absolute().parent / FILE).is_file():
        return f"{told}, and this is one of its parts; the model is {folder.absolute().parent}"
    nested = sorted(folder.glob(f"*/{FILE}")) or sorted(folder.glob(f"snapshots/*/{FILE}"))
    return f"{told}; there is one in {nested[0].parent}" if nested else told


def ignored_parts(folder: Path, index: ModelIndex, used: list[str]) -> dict[str, str]:
    """Return the parts, promised or there, that nothing uses, each with the reason; each is logged once."""
    ignored = {}
    there = sorted(path.parent.name for path in {*folder.glob("*/config.json"), *folder.glob("*/*.safetensors")})
    for part in dict.fromkeys((*index.classes, *there)):
        if part in used or part.startswith("."):
            continue
        if part == "transformer_2":
            reason = "boundary_ratio is not set" if "transformer_2" in index.classes else f"{FILE} does not name it"
        elif part in FOR_IMAGES:
            reason = "the transformer has no image_dim"
        else:
            reason = "a Wan model has no such part"
        ignored[part] = reason
        _tell(folder, f"{part} is ignored: {reason}")
    if (pipeline := index.fields.get("_class_name")) is not None and pipeline not in PIPELINES:
        _tell(folder, f"{FILE} names {shown(pipeline)}, and is run as WanPipeline would")
    return ignored


@cache
def _tell(folder: Path, what: str) -> None:
    """Log this about a folder once a process, however often the folder is read."""
    logger.warning("%s: %s", folder.name, what)
