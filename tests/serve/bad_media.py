"""Files that decoders have died of, and good ones beside them, made when they are asked for."""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from skylapse.runtime.media.writer import write_video

PNG = b"\x89PNG\r\n\x1a\n"


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_zeros(width: int, height: int, *extra: bytes) -> bytes:
    """Return a PNG of two colours, compressed a thousandfold: 12000x12000 are 17 KB, and 704 MB once decoded as RGB."""
    row = b"\0" * ((width + 7) // 8 + 1)
    packer, data = zlib.compressobj(9), b""
    for _ in range(height):
        data += packer.compress(row)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return PNG + header + b"".join(extra) + png_chunk(b"IDAT", data + packer.flush()) + png_chunk(b"IEND", b"")


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """Return a picture of noise, so that a file cannot be cut without harm."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    return encoded(kind, frames[0], save_all=True, append_images=frames[1:], duration=100)


def clip(num_frames: int = 16, fps: int = 8, width: int = 64, height: int = 48) -> bytes:
    """An mp4 whose frames are grey, each lighter than the one before it."""
    light = np.linspace(16, 240, num_frames).astype(np.uint8)
    frames = np.broadcast_to(light[:, None, None, None], (num_frames, height, width, 3))
    with tempfile.TemporaryDirectory() as folder:
        return write_video(Path(folder) / "clip.mp4", np.ascontiguousarray(frames), fps).read_bytes()


MAKERS: dict[str, Callable[[], bytes]] = {
    "png": lambda: encoded("PNG"),
    "jpeg": lambda: encoded("JPEG"),
    "webp": lambda: encoded("WEBP", lossless=True),
    "mp4": clip,
    "png_cut": lambda: encoded("PNG")[:-2000],
    "png_head": lambda: encoded("PNG")[:20],
    "png_crc": lambda: encoded("PNG")[:200] + b"\xff" * 20 + encoded("PNG")[220:],
    "jpeg_cut": lambda: encoded("JPEG")[:-700],
    "webp_cut": lambda: encoded("WEBP", lossless=True)[:-2000],
    "mp4_cut": lambda: clip()[:-100],
    "mp4_head": lambda: clip()[:100],
    "mp4_noise": lambda: clip()[:40] + np.random.default_rng(0).bytes(5000),
    "mp4_long": lambda: clip(125, fps=1, width=16, height=16),
    "mp4_wide": lambda: clip(2, width=8208, height=16),
    "text": lambda: b"this is no picture",
    "nothing": lambda: b"",
    "gif": lambda: encoded("GIF"),
    "bmp": lambda: encoded("BMP"),
    "jpeg2000": lambda: encoded("JPEG2000"),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://169.254.169.254/"/></svg>',
    "playlist": lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/latest\n#EXT-X-ENDLIST\n",
    "heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200),
    "gif_then_png": lambda: b"GIF89a" + encoded("PNG"),
    "png_then_mp4": lambda: encoded("PNG")[:33] + clip(),  # a header, and a clip where its pixels should be
    "apng": lambda: animation("PNG"),
    "webp_animation": lambda: animation("WEBP"),
    "pixel": lambda: encoded("PNG", Image.new("RGB", (1, 1))),
    "line": lambda: encoded("PNG", Image.new("RGB", (4000, 1))),
    "wide": lambda: encoded("PNG", Image.new("1", (9000, 20))),
    "bomb": lambda: png_of_zeros(12000, 12000),
    "bigger_bomb": lambda: png_of_zeros(30000, 30000),
    "profile_bomb": lambda: png_of_zeros(32, 32, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 * 2**20), 9))),
    "text_bomb": lambda: png_of_zeros(32, 32, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 * 2**20), 9))),
    "webp_bomb": lambda: (
        b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8L" + struct.pack("<IBI", 10, 0x2F, 2**28 - 1) + bytes(9)
    ),
}


@cache
def media(name: str) -> bytes:
    return MAKERS[name]()
