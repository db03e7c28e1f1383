"""Convert the colours of pictures to sRGB: profiles by LittleCMS, gamma and primaries by their formulas."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.ExifTags import IFD

from .png import PngFacts
from .refusal import Subject

# x and y of white, red, green and blue (IEC 61966-2-1; SMPTE EG 432-1 with D65; ITU-R BT.2020; Adobe RGB (1998)).
D65 = (0.3127, 0.3290)
SRGB = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
DISPLAY_P3 = (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
BT2020 = (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
ADOBE_RGB, ADOBE_GAMMA = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 563 / 256
CICP_PRIMARIES = {1: SRGB, 2: SRGB, 9: BT2020, 12: DISPLAY_P3}  # ITU-T H.273, table 2
CICP_SDR = (1, 2, 6, 13, 14, 15)  # table 3; decoded by sRGB's curve, as browsers do
CICP_NAMES = {8: "linear light", 16: "PQ", 18: "HLG"}

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of a profile: what Pillow calls pixels of its colour space


def to_srgb(image: Image.Image, facts: PngFacts, subject: Subject) -> Image.Image:
    """Return 8-bit RGB pixels for sRGB, black where the picture is clear.

    The first of these that the file has says what its colours are: cICP, profile, sRGB, gamma and primaries (the order
    of PNG's third edition), the Adobe RGB mark of cameras; without any they are sRGB's. A profile that is broken, or of
    other colours than the picture's, is passed over, as browsers do.
    """
    pixels, alpha = _parts(image, facts.bits)
    pixels = _converted(pixels, facts, image, subject)
    if alpha is not None:
        pixels = Image.composite(pixels, Image.new("RGB", pixels.size, "black"), alpha)
    return pixels


def _parts(image: Image.Image, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours alone (L, RGB or CMYK, 8 bits), and a mask of where the picture is not clear.

    The colour that stands for "clear" (tRNS) has as many bits as the file's values, Pillow's pixels have 8 or 16.
    """
    key = image.info.get("transparency")
    if image.mode in ("RGBA", "LA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if key is not None and image.mode in ("P", "PA"):
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    if image.mode.startswith("I;16"):  # convert("L") would clip it at 255
        values = np.asarray(image)
        return Image.fromarray((values >> 8).astype(np.uint8)), _all_but(key, values)
    mode = {"1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    colours = Image.fromarray(np.asarray(image)) if image.mode in ("L", "RGB") else image.convert(mode)
    if key is not None and mode != "CMYK":
        top = 2**bits - 1
        scaled = tuple(value * 255 // top for value in key) if isinstance(key, tuple) else int(key) * 255 // top
        return colours, _all_but(scaled, np.asarray(colours))
    return colours, None


def _all_but(key: int | tuple[int, ...] | None, values: NDArray[np.uint8] | NDArray[np.uint16]) -> Image.Image | None:
    if key is None:
        return None
    is_key = values == np.asarray(key)
    return Image.fromarray(np.where(is_key.all(-1) if is_key.ndim == 3 else is_key, 0, 255).astype(np.uint8))


def _converted(pixels: Image.Image, facts: PngFacts, image: Image.Image, subject: Subject) -> Image.Image:
    if facts.cicp is not None:
        return _by_cicp(pixels.convert("RGB"), facts.cicp, subject)
    if (profile := facts.profile or image.info.get("icc_profile")) is not None:
        return _by_profile(pixels, profile)
    if facts.is_srgb:
        return pixels.convert("RGB")
    if facts.gamma or facts.chromaticities:
        return by_numbers(pixels.convert("RGB"), facts.gamma, facts.chromaticities or SRGB)
    if _has_adobe_mark(image):
        return by_numbers(pixels.convert("RGB"), 1 / ADOBE_GAMMA, ADOBE_RGB)
    return pixels.convert("RGB")


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = MODES.get(source.profile.xcolor_space)
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if mode != image.mode:
            return image.convert("RGB")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")
    if mode == "RGB" and _changes_nothing(transform):
        return image
    return transform.apply(image)


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a transform moves no value of 125 colours by more than one: then the profile is sRGB's own."""
    steps = np.linspace(0, 255, 5).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    moved = np.asarray(transform.apply(Image.fromarray(colours))).astype(int) - colours
    return bool(np.abs(moved).max() <= 1)


def _by_cicp(image: Image.Image, cicp: tuple[int, int, int, int], subject: Subject) -> Image.Image:
    primaries, transfer, matrix, _ = cicp
    if primaries not in CICP_PRIMARIES or transfer not in CICP_SDR or matrix != 0:
        numbers = f"cICP {primaries}/{transfer}/{matrix}"
        raise subject.refused("colour", CICP_NAMES.get(transfer, numbers))
    return by_numbers(image, None, CICP_PRIMARIES[primaries])


def by_numbers(image: Image.Image, gamma: float | None, chromaticities: tuple[float, ...]) -> Image.Image:
    """Convert RGB pixels to sRGB by numbers. gamma: the exponent that light was raised to, None for sRGB's curve."""
    matrix = to_srgb_matrix(chromaticities)
    is_srgbs = gamma is None or (matrix is None and abs(gamma - 1 / 2.2) < 0.01)  # 45455 stands for sRGB's curve
    has_own_gamma = not is_srgbs and gamma is not None and 0.01 < gamma < 10
    if not has_own_gamma and matrix is None:
        return image
    values = np.linspace(0, 1, 256, dtype=np.float32)
    light = values ** np.float32(1 / gamma) if has_own_gamma and gamma else _light_of_srgb(values)
    if matrix is None:
        table = (_srgb_of_light(light) * 255).round().astype(np.uint8)
        return Image.fromarray(table[np.asarray(image)])
    rows = [_srgb_of_light(light[row] @ matrix.T) for row in np.asarray(image)]  # by rows: floats of 40 MP are 480 MB
    return Image.fromarray(np.stack([(row * 255).round().astype(np.uint8) for row in rows]))


def _light_of_srgb(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _srgb_of_light(light: NDArray[np.float32]) -> NDArray[np.float32]:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)


def to_srgb_matrix(chromaticities: tuple[float, ...]) -> NDArray[np.float32] | None:
    """Return the matrix from linear RGB of these primaries to sRGB's, white to white.

    None where they are sRGB's, or impossible."""
    if np.abs(np.subtract(chromaticities, SRGB)).max() < 0.005 or min(chromaticities[1::2]) <= 0:
        return None
    try:
        matrix = np.linalg.solve(_to_xyz(SRGB), _to_xyz(chromaticities))
    except np.linalg.LinAlgError:
        return None
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)  # (1, 1, 1) stays white


def _to_xyz(chromaticities: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the matrix from linear RGB to XYZ (SMPTE RP 177): its columns are the primaries and add up to white."""
    (wx, wy), *primaries = np.reshape(chromaticities, (4, 2))
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    white = np.array([wx / wy, 1, (1 - wx - wy) / wy])
    return columns * np.linalg.solve(columns, white)


def _has_adobe_mark(image: Image.Image) -> bool:
    """Return whether Exif's interoperability index is R03, which says Adobe RGB (DCF 2.0)."""
    try:
        return image.getexif().get_ifd(IFD.Interop).get(1) == "R03"
    except Exception:  # Pillow raises many kinds for a broken Exif, which says nothing then
        return False
