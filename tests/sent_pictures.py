"""Pictures as people send them: each kind that the books of PNG, JPEG and WebP know, and how it is shown or refused."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Bytes = NDArray[np.uint8]

RED, GREEN, BLUE, WHITE, BLACK = (200, 30, 30), (30, 180, 30), (30, 30, 200), (220, 220, 220), (0, 0, 0)
CORNERS = (RED, GREEN, BLUE, WHITE)  # top left, top right, bottom left, bottom right
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Sent:
    """A file, and the size and four corners that it must be read with, or the reason why it is refused."""

    make: Callable[[], bytes]
    size: tuple[int, int] = (64, 48)
    corners: tuple[tuple[int, int, int], ...] = CORNERS
    tolerance: int = 0
    refused: str = ""
    got: str = ""


def card(width: int = 64, height: int = 48) -> Bytes:
    """Return a card [height, width, 3], a quarter of it in each colour."""
    pixels = np.empty((height, width, 3), np.uint8)
    for index, colour in enumerate(CORNERS):
        y, x = divmod(index, 2)
        pixels[y * height // 2 : (y + 1) * height // 2, x * width // 2 : (x + 1) * width // 2] = colour
    return pixels


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = BytesIO()
    (image or Image.fromarray(card())).save(file, kind, **options)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- PNG


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def rows_of(rows: Bytes) -> bytes:
    """Return rows [height, bytes of a row] as bytes, without a filter."""
    return b"".join(b"\0" + row.tobytes() for row in rows)


def png(
    rows: bytes, colour: int, bits: int = 8, *chunks: bytes, after: bytes = b"", size: Any = (64, 48), laced: int = 0
) -> bytes:
    """Return a PNG. colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, laced))
    return PNG + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def rgb_png(*chunks: bytes, after: bytes = b"") -> bytes:
    return png(rows_of(card().reshape(48, -1)), 2, 8, *chunks, after=after)


def deep(values: Bytes) -> Bytes:
    """Return the bytes of big-endian 16-bit values that are the same share of the whole."""
    return (values.astype(np.uint16) * 257).astype(">u2").view(np.uint8).reshape(len(values), -1)


def grey_card() -> Bytes:
    """Return a card [48, 64] of the shades that two bits can hold, 0, 85, 170 and 255."""
    shades: Bytes = np.array([[0, 85], [170, 255]], np.uint8)
    return shades.repeat(24, 0).repeat(32, 1)


GREYS = tuple((shade,) * 3 for shade in (0, 85, 170, 255))


def packed(values: Bytes, bits: int) -> Bytes:
    """Pack values of 2 or 4 bits side by side in bytes."""
    places = np.arange(8 // bits)[::-1] * bits
    return np.asarray((values.reshape(len(values), -1, 8 // bits) << places.astype(np.uint8)).sum(-1), np.uint8)


def interlaced() -> bytes:
    """Return the card interlaced by Adam7 (PNG, section 8.2)."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = (card()[y::down, x::across] for y, x, down, across in passes)
    return png(b"".join(rows_of(part.reshape(len(part), -1)) for part in parts), 2, laced=1)


def matrix_profile(padding: int = 0, gamma: float = 2.2) -> bytes:
    """Return an ICC profile of Display P3's primaries (adapted to D50) and a gamma.

    It has a private tag of so many bytes.
    """
    xyz = {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.2919, 0.6922, 0.0419), b"bXYZ": (0.1572, 0.0666, 0.7841)}
    tags = {
        b"desc": b"desc\0\0\0\0\0\0\0\3P3\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": _xyz(0.9642, 1, 0.8249),
    }
    tags |= {name: _xyz(*values) for name, values in xyz.items()}
    curve = b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(gamma * 256)) + b"\0\0"
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    if padding:
        tags[b"priv"] = b"data\0\0\0\0" + np.random.default_rng(0).bytes(padding)
    table, content = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(content), len(tag))
        content += tag
    size = 128 + len(table) + len(content)
    head = struct.pack(">I4sI4s4s4s12s4s", size, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ", bytes(12), b"acsp")
    illuminant = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))
    return head.ljust(68, b"\0") + illuminant + bytes(48) + table + content


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def profile_chunk(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"display\0\0" + zlib.compress(profile))


def grey_profile() -> bytes:
    profile = matrix_profile()
    return profile[:16] + b"GRAY" + profile[20:]


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def chromaticities(*values: float) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in values)))


P3 = chromaticities(0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
WORKFLOW = b'{"nodes": [' + b"0," * 1_500_000 + b"0]}"
# The quarters in sRGB where they are meant for other primaries and curves, by the published matrices.
OF_P3 = ((218, 0, 6), (0, 183, 0), (30, 30, 208), WHITE)
OF_P3_GAMMA_22 = ((220, 0, 0), (0, 185, 0), (24, 24, 210), (221, 221, 221))
OF_ADOBE_RGB = ((233, 24, 24), (0, 181, 0), (24, 24, 205), (221, 221, 221))
OF_LINEAR = ((229, 96, 96), (96, 219, 96), (96, 96, 229), (239, 239, 239))


# ------------------------------------------------------------------------------------------------------------- JPEG


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def adobe_rgb() -> bytes:
    """Return a JPEG with the mark of cameras for Adobe RGB: interoperability index R03 (DCF 2.0)."""
    tags = Image.Exif()
    tags[0x8769] = {0xA001: 65535, 0xA005: {1: "R03"}}
    return saved("JPEG", quality=100, subsampling=0, exif=tags.tobytes())


def jpeg(**options: Any) -> bytes:
    return saved("JPEG", quality=100, subsampling=0, **options)


def cmyk(pixels: Bytes) -> Image.Image:
    """Return a card as CMYK, of inks without black."""
    return Image.fromarray(np.concatenate([255 - pixels, np.zeros((*pixels.shape[:2], 1), np.uint8)], -1), "CMYK")


def ycck() -> bytes:
    """Return a JPEG of Adobe's CMYK as luma and chroma of the light that is left: the third transform of APP14."""
    luma = np.asarray(Image.fromarray(255 - card()).convert("YCbCr"))
    inks = np.concatenate([255 - luma, np.zeros((48, 64, 1), np.uint8)], -1)  # Pillow writes inks inverted
    data = saved("JPEG", Image.fromarray(inks, "CMYK"), quality=100, subsampling=0)
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\2" + data[at + 1 :]


def density(unit: int, across: int, down: int) -> bytes:
    data = jpeg()
    at = data.index(b"JFIF\0") + 7
    return data[:at] + struct.pack(">BHH", unit, across, down) + data[at + 5 :]


def turned(orientation: int) -> tuple[tuple[int, int], tuple[tuple[int, int, int], ...]]:
    """Return the size and corners that a card of that orientation is shown with (Exif 2.32, tag 0x0112)."""
    a, b, c, d = CORNERS
    corners = {1: (a, b, c, d), 2: (b, a, d, c), 3: (d, c, b, a), 4: (c, d, a, b)}
    corners |= {5: (a, c, b, d), 6: (c, a, d, b), 7: (d, b, c, a), 8: (b, d, a, c)}
    return ((64, 48) if orientation < 5 else (48, 64)), corners[orientation]


def clear_left(mode: str) -> Image.Image:
    """Return the card with its left half clear."""
    image = Image.fromarray(card()).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 32, 1).repeat(48, 0)))
    return image.convert(mode)


def animation(kind: str, num_frames: int = 3) -> bytes:
    frames = [Image.fromarray(np.roll(card(), shift, 0)) for shift in range(num_frames)]
    return saved(kind, frames[0], save_all=True, append_images=frames[1:], duration=100, lossless=True)


LEFT_IS_BLACK = (BLACK, GREEN, BLACK, WHITE)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
XMP += b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'

PICTURES: dict[str, Sent] = {
    # JPEG
    **{f"jpeg_orientation_{tag}": Sent(partial(jpeg, exif=exif(tag)), *turned(tag), 2) for tag in range(1, 9)},
    "jpeg_exif_broken": Sent(lambda: jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), tolerance=2),
    "jpeg_grey": Sent(lambda: saved("JPEG", Image.fromarray(grey_card()), quality=100), corners=GREYS, tolerance=2),
    "jpeg_progressive": Sent(lambda: jpeg(progressive=True), tolerance=2),
    "jpeg_rgb_by_adobe": Sent(lambda: jpeg(keep_rgb=True), tolerance=2),
    "jpeg_cmyk": Sent(lambda: saved("JPEG", cmyk(card()), quality=100), tolerance=2),
    "jpeg_ycck": Sent(ycck, tolerance=4),
    "jpeg_profile": Sent(lambda: jpeg(icc_profile=matrix_profile()), corners=OF_P3_GAMMA_22, tolerance=4),
    "jpeg_profile_of_greys_on_colours": Sent(lambda: jpeg(icc_profile=grey_profile()), tolerance=2),
    "jpeg_adobe_rgb": Sent(adobe_rgb, corners=OF_ADOBE_RGB, tolerance=3),
    "jpeg_pixel_shape": Sent(lambda: density(0, 2, 1), (128, 48), tolerance=2),
    "jpeg_density_of_a_fax": Sent(lambda: density(1, 204, 102), (64, 96), tolerance=2),
    "jpeg_trailing_bytes": Sent(lambda: jpeg() + b"MotionPhoto" + bytes(999), tolerance=2),
    # PNG
    "png_16_bits": Sent(lambda: png(rows_of(deep(card())), 2, 16)),
    "png_grey_16_bits": Sent(lambda: png(rows_of(deep(grey_card())), 0, 16), corners=GREYS),
    "png_grey_2_bits": Sent(lambda: png(rows_of(packed(grey_card() // 85, 2)), 0, 2), corners=GREYS),
    "png_grey_4_bits": Sent(lambda: png(rows_of(packed(grey_card() // 17, 4)), 0, 4), corners=GREYS),
    "png_interlaced": Sent(interlaced),
    "png_alpha": Sent(lambda: saved("PNG", clear_left("RGBA")), corners=LEFT_IS_BLACK),
    "png_grey_alpha": Sent(
        lambda: saved("PNG", Image.merge("LA", (Image.fromarray(grey_card()), clear_left("RGBA").getchannel("A")))),
        corners=(BLACK, GREYS[1], BLACK, GREYS[3]),
    ),
    "png_palette_alpha": Sent(
        lambda: png(
            rows_of(packed(grey_card() // 85, 2)),
            3,
            2,
            chunk(b"PLTE", bytes(sum(CORNERS, ()))),
            chunk(b"tRNS", b"\0\xff\0"),
        ),
        corners=LEFT_IS_BLACK,
    ),
    "png_key_of_grey_2_bits": Sent(
        lambda: png(rows_of(packed(grey_card() // 85, 2)), 0, 2, chunk(b"tRNS", b"\0\3")), corners=(*GREYS[:3], BLACK)
    ),
    "png_key_of_grey_16_bits": Sent(
        lambda: png(rows_of(deep(grey_card())), 0, 16, chunk(b"tRNS", b"\xff\xff")), corners=(*GREYS[:3], BLACK)
    ),
    "png_key_of_rgb": Sent(lambda: rgb_png(chunk(b"tRNS", struct.pack(">3H", *RED))), corners=(BLACK, *CORNERS[1:])),
    "png_key_of_rgb_16_bits": Sent(
        lambda: png(rows_of(deep(card())), 2, 16, chunk(b"tRNS", struct.pack(">3H", *(257 * v for v in RED)))),
        corners=(BLACK, *CORNERS[1:]),
    ),
    "png_profile": Sent(lambda: rgb_png(profile_chunk(matrix_profile())), corners=OF_P3_GAMMA_22, tolerance=4),
    "png_profile_of_3_mib": Sent(
        lambda: rgb_png(profile_chunk(matrix_profile(3 * 2**20))), corners=OF_P3_GAMMA_22, tolerance=4
    ),
    "png_profile_of_17_mib": Sent(lambda: rgb_png(profile_chunk(bytes(17 * 2**20))), refused="profile", got="more"),
    "png_profile_of_srgb": Sent(lambda: rgb_png(profile_chunk(srgb_profile()))),
    "png_profile_broken": Sent(lambda: rgb_png(chunk(b"iCCP", b"display\0\0no profile"))),
    "png_gamma_1": Sent(
        lambda: rgb_png(chunk(b"gAMA", struct.pack(">I", 100_000))),
        corners=OF_LINEAR,
        tolerance=1,
    ),
    "png_gamma_of_srgb": Sent(lambda: rgb_png(chunk(b"gAMA", struct.pack(">I", 45455)))),
    "png_primaries": Sent(lambda: rgb_png(P3), corners=OF_P3, tolerance=2),
    "png_srgb_before_gamma": Sent(lambda: rgb_png(chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100_000)))),
    "png_cicp_p3": Sent(lambda: rgb_png(chunk(b"cICP", b"\x0c\x0d\0\1")), corners=OF_P3, tolerance=2),
    "png_cicp_pq": Sent(lambda: rgb_png(chunk(b"cICP", b"\x09\x10\0\1")), refused="colour", got="PQ"),
    "png_workflow": Sent(lambda: rgb_png(chunk(b"tEXt", b"workflow\0" + WORKFLOW))),
    "png_workflow_packed": Sent(lambda: rgb_png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW)))),
    "png_workflow_after_the_pixels": Sent(
        lambda: rgb_png(after=chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(WORKFLOW)))
    ),
    "png_orientation": Sent(lambda: saved("PNG", exif=exif(6)), *turned(6)),
    "png_orientation_in_xmp": Sent(lambda: rgb_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)), *turned(6)),
    "png_pixel_shape": Sent(lambda: rgb_png(chunk(b"pHYs", struct.pack(">IIB", 1, 2, 0))), (128, 48)),
    "png_pixel_shape_of_nothing": Sent(
        lambda: rgb_png(chunk(b"pHYs", struct.pack(">IIB", 1, 9, 0))), refused="aspect", got="9:1"
    ),
    "png_of_one_frame": Sent(lambda: animation("PNG", 1)),
    "png_animated": Sent(lambda: animation("PNG"), refused="animated", got="3 frames"),
    "png_trailing_bytes": Sent(lambda: rgb_png() + bytes(999)),
    # WebP
    "webp_lossy": Sent(lambda: saved("WEBP", quality=100), tolerance=6),
    "webp_lossless": Sent(lambda: saved("WEBP", lossless=True)),
    "webp_alpha": Sent(lambda: saved("WEBP", clear_left("RGBA"), lossless=True, exact=True), corners=LEFT_IS_BLACK),
    "webp_orientation": Sent(lambda: saved("WEBP", lossless=True, exif=exif(8)), *turned(8)),
    "webp_profile": Sent(
        lambda: saved("WEBP", lossless=True, icc_profile=matrix_profile()), corners=OF_P3_GAMMA_22, tolerance=4
    ),
    "webp_animated": Sent(lambda: animation("WEBP"), refused="animated", got="3 frames"),
    # others
    "gif": Sent(lambda: saved("GIF"), refused="kind", got="GIF"),
    "bmp": Sent(lambda: saved("BMP"), refused="kind", got="BMP"),
    "tiff": Sent(lambda: saved("TIFF"), refused="kind", got="TIFF"),
    "heic": Sent(lambda: b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200), refused="kind", got="HEIC"),
    "heic_of_telephones": Sent(
        lambda: b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(200), refused="kind", got="HEIC"
    ),
    "avif": Sent(lambda: saved("AVIF"), refused="kind", got="AVIF"),
    "jpeg2000": Sent(lambda: saved("JPEG2000"), refused="kind", got="JPEG 2000"),
    "svg": Sent(lambda: b"<svg/>", refused="kind", got="SVG"),
}
