"""Frames to mp4, webp, gif and png, whole or not at all; `media` reads them back."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from .clips import Frames
from .pictures import PathLike

VIDEO_SUFFIXES = (".mp4", ".webp", ".gif", ".png")
SHEET_SUFFIXES = (".png",)
SMALL_PIXELS = (
    256 * 256
)  # a frame up to this size is kept (nearly) lossless: it is watched enlarged and costs kilobytes

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------- writing


def write_video(path: PathLike, frames: Frames, fps: int) -> Path:
    """Write uint8 `frames` [frames, height, width, 3] in the format of the suffix, whole or not at all."""
    path = check_writable(path)
    kind = path.suffix.lower()
    with replaced_when_complete(path) as unfinished:
        if kind == ".mp4":
            _write_mp4(unfinished, frames, fps)
        else:
            _write_animation(unfinished, frames, fps, kind.removeprefix("."))
    return path


def check_writable(path: PathLike, suffixes: tuple[str, ...] = VIDEO_SUFFIXES, name: str = "output") -> Path:
    """Refuse a path that cannot be written, before any work is spent on what would be written there."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{name} must end in {' or '.join(suffixes)}, got {str(path)!r}")
    if os.path.isdir(path):
        raise ValueError(f"{name} must be a file, got the folder {str(path)!r}")
    if not os.path.isdir(path.parent):
        raise ValueError(f"{name} must be in an existing folder, got {str(path)!r}")
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)  # an over-long name
        tempfile.TemporaryFile(dir=path.parent).close()  # a trial says more than mode bits: root, read-only mounts
    except OSError as error:
        raise ValueError(f"{name} must be writable, got {str(path)!r} ({error.strerror})") from error
    return path


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """A name beside `path` that becomes `path` if the block succeeds and is gone if it does not, Ctrl-C included."""
    unfinished = path.with_name(f".skylapse-{secrets.token_hex(8)}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_mp4(path: Path, frames: Frames, fps: int) -> None:
    """H.264, yuv420p, limited-range BT.709 and tagged so, index before data."""
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

    _, height, width, _ = frames.shape
    if width % 2 or height % 2:
        raise ValueError(f"mp4 needs an even width and height, got {width}x{height}")
    encoder = _h264_encoder()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(encoder, rate=fps)
        assert isinstance(stream, av.VideoStream)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        if encoder == "libx264":
            context.options = {"crf": "12" if width * height <= SMALL_PIXELS else "17"}
        else:
            context.bit_rate = max(2_000_000, width * height * fps // 4)  # no constant quality there: a generous rate
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_trc, context.color_primaries = ColorTrc.BT709, ColorPrimaries.BT709
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                dst_colorspace=Colorspace.ITU709,
                dst_color_trc=ColorTrc.BT709,
                dst_color_primaries=ColorPrimaries.BT709,
                # Without accurate rounding a flat red of 220 comes back as 213.
                interpolation=Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@cache
def _h264_encoder() -> str:
    """The best software encoder of this PyAV build; said once."""
    import av

    encoders = ("libx264", "libopenh264", "h264_videotoolbox", "mpeg4")
    encoder = next(name for name in encoders if name in av.codecs_available)
    if encoder == "libx264":
        logger.info("mp4 is encoded by libx264")
    else:
        logger.warning("mp4 is encoded by %s: this build of PyAV has no libx264", encoder)
    return encoder


def _write_animation(path: Path, frames: Frames, fps: int, kind: str) -> None:
    """GIF, animated PNG (lossless; one frame is an ordinary PNG) or animated WebP (lossless while it is small)."""
    if kind == "gif" and fps > 50:  # players show a delay below 2/100 s as 1/10 s
        raise ValueError(f"fps must be at most 50 in a gif, got {fps}")
    images = [Image.fromarray(pixels) for pixels in frames]
    tick_ms = 10 if kind == "gif" else 1
    starts_ms = [tick_ms * round(index * 1000 / fps / tick_ms) for index in range(len(images) + 1)]
    options = {"lossless": images[0].width * images[0].height <= SMALL_PIXELS, "quality": 90} if kind == "webp" else {}
    images[0].save(
        path,
        format=kind,
        save_all=True,
        append_images=images[1:],
        duration=[end - start for start, end in pairwise(starts_ms)],  # rounded so that the sum does not drift
        loop=0,
        **options,
    )


# ---------------------------------------------------------------------------------------------------- contact sheets


def contact_sheet(frames: Frames, columns: int | None = None) -> Image.Image:
    """Up to 12 evenly spaced frames, the first and the last among them, enlarged to be legible, with thin gaps."""
    count = min(len(frames), 12)
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    columns = columns or next((c for c in (6, 5, 4, 3) if count % c == 0), min(count, 6))
    rows = -(-count // columns)

    _, height, width, _ = frames.shape
    longest, gap = max(height, width), 4
    enlarged = longest <= 192
    scale = 192 // longest if enlarged else min(1.0, 480 / longest)
    size = round(width * scale), round(height * scale)

    sheet = Image.new("RGB", (columns * (size[0] + gap) + gap, rows * (size[1] + gap) + gap), (32, 32, 32))
    for index, pixels in enumerate(chosen):
        row, column = divmod(index, columns)
        method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        cell = Image.fromarray(pixels).resize(size, method)
        sheet.paste(cell, (gap + column * (size[0] + gap), gap + row * (size[1] + gap)))
    return sheet


def save_sheet(path: PathLike, frames: Frames, columns: int | None = None) -> Path:
    """Write `contact_sheet(frames)` as a PNG, whole or not at all."""
    path = check_writable(path, SHEET_SUFFIXES, "sheet")
    with replaced_when_complete(path) as unfinished:
        contact_sheet(frames, columns).save(unfinished, format="png")
    return path
