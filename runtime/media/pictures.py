"""Pictures as they are shown: upright, in sRGB, with square pixels, black where they are clear."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import PIL.TiffImagePlugin  # noqa: F401  # reads Exif; Pillow would import it when it is first needed
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .colour import to_srgb
from .kinds import PICTURES, kind_of
from .png import PngFacts, split
from .refusal import PICTURE_BOUNDS, Bounds, Subject

Pixels: TypeAlias = NDArray[np.uint8]  # [height, width, 3]
PathLike: TypeAlias = str | os.PathLike[str]

OPENERS: dict[str, type[PngImageFile | JpegImageFile | WebPImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
}
MAX_ASPECT = 4.0  # of a pixel
Image.preinit()


def read_image(source: PathLike | Image.Image | Pixels, width: int, height: int, name: str = "image") -> Pixels:
    """Return a picture as it is shown, uint8 [height, width, 3], its aspect kept, cropped at the centre.

    name: the field of the request in errors. Raises ValueError (Refused) for what is no picture within the bounds.
    """
    if not isinstance(source, np.ndarray | Image.Image):
        with _opened(source, name) as file:
            return fitted(picture_of(file, f"{name} {Path(source).name!r}"), width, height)
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else source
    subject = Subject(name, "picture", PICTURE_BOUNDS)
    subject.check_size(image.width, image.height)
    with subject.decoding():
        return fitted(to_srgb(_upright(image), PngFacts(), subject), width, height)


def check_image(path: PathLike, name: str = "image") -> None:
    """Refuse a picture by its header: kind, bytes, width, height and pixel shape. No pixel is decoded."""
    with _opened(path, name) as file:
        _header_of(file, Subject(f"{name} {Path(path).name!r}", "picture", PICTURE_BOUNDS))


def picture_of(file: BinaryIO, label: str, bounds: Bounds = PICTURE_BOUNDS) -> Image.Image:
    """Return the picture in an open file as it is shown, an RGB image."""
    subject = Subject(label, "picture", bounds)
    image, facts = _header_of(file, subject)
    with subject.decoding():
        image.load()
        width, height = _shown_size(image, facts, subject)
        pixels = to_srgb(image, facts, subject)
        if (width, height) != pixels.size:
            pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
        return _turned(pixels, _orientation(image))


def fitted(image: Image.Image, width: int, height: int) -> Pixels:
    """Return pixels, uint8 [height, width, 3], scaled (Lanczos) to cover width x height and cropped at the centre."""
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def _opened(path: PathLike, name: str) -> BinaryIO:
    if not os.path.isfile(path):  # which a pipe is not either: reading one could wait forever
        raise ValueError(f"{name} must be an existing file, got {str(path)!r}")
    return Path(path).open("rb")


def _header_of(file: BinaryIO, subject: Subject) -> tuple[Image.Image, PngFacts]:
    """Read and check a picture's header; its pixels are not decoded."""
    if (num_bytes := os.fstat(file.fileno()).st_size) > subject.bounds.max_bytes:
        raise subject.refused("bytes", str(num_bytes))
    kind = kind_of(file)
    if kind not in PICTURES:
        raise subject.refused("kind", kind)
    data, facts = file.read(), PngFacts()
    if kind == "PNG":
        data, facts = split(data, subject)
    with subject.decoding():
        try:
            image = OPENERS[kind](BytesIO(data))
        except Image.DecompressionBombError as error:  # a WebP's canvas is checked by Pillow before we can
            raise subject.refused("large", "far more") from error
    subject.check_size(image.width, image.height)
    _shown_size(image, facts, subject)
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1:  # its first frame may be a title; whoever sent it knows which one is meant
        raise subject.refused("animated", f"{num_frames} frames")
    return image, facts


def _shown_size(image: Image.Image, facts: PngFacts, subject: Subject) -> tuple[int, int]:
    """Return width and height before the picture is turned, with square pixels: the shorter side of a pixel grows."""
    across, down = facts.density
    if image.format == "JPEG" and "jfif_density" in image.info:
        x, y = image.info["jfif_density"]
        # Without a unit they are the shape of a pixel (JFIF 1.02, page 5; FFmpeg writes it so), else pixels a unit.
        across, down = (y, x) if image.info.get("jfif_unit") == 0 else (x, y)
    if not across or not down or across == down:
        return image.width, image.height
    if max(across, down) > MAX_ASPECT * min(across, down):
        raise subject.refused("aspect", f"{down}:{across}")
    width, height = image.width, image.height
    if down > across:
        width = round(width * down / across)
    else:
        height = round(height * across / down)
    subject.check_size(width, height)
    return width, height


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(0x0112, 1)  # of Exif, else of XMP
    except Exception:  # Pillow raises many kinds for a broken Exif, which says nothing then
        return 1
    return found if isinstance(found, int) else 1


TURNS = {  # Exif 2.32, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _upright(image: Image.Image) -> Image.Image:
    return _turned(image, _orientation(image))
