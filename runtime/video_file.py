"""Frames to mp4, webp, gif and png, and back from images and videos that are checked by their headers first."""

from __future__ import annotations

import logging
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

if TYPE_CHECKING:  # imported where a video is opened: images, and whoever asks for a name alone, need no FFmpeg
    import av
    from av.container import InputContainer

Frames: TypeAlias = NDArray[np.uint8]  # [frames, height, width, 3]
Pixels: TypeAlias = NDArray[np.uint8]  # [height, width, 3]
PathLike: TypeAlias = str | os.PathLike[str]

VIDEO_SUFFIXES = (".mp4", ".webp", ".gif", ".png")
SHEET_SUFFIXES = (".png",)
SMALL_PIXELS = (
    256 * 256
)  # a frame up to this size is kept (nearly) lossless: it is watched enlarged and costs kilobytes
MIN_IMAGE_SIDE, MAX_IMAGE_SIDE, MAX_IMAGE_PIXELS, MAX_IMAGE_BYTES = 16, 8192, 40_000_000, 64 * 2**20
MAX_VIDEO_FRAMES, MAX_VIDEO_PIXELS, MAX_VIDEO_S, MAX_VIDEO_BYTES = 1025, 4096 * 2304, 600, 512 * 2**20

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


# ---------------------------------------------------------------------------------------------------------- reading


def read_image(source: PathLike | Image.Image | Pixels, width: int, height: int, name: str = "image") -> Pixels:
    """Uint8 [height, width, 3]: the image upright, aspect kept, cropped at the centre, black where transparent.

    name: the field of the request that errors speak of.
    """
    label = name
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image, label = _open_image(source, name), f"{name} {Path(source).name!r}"
    _check_image_size(label, image.width, image.height)
    with _decoding(label):
        image = _to_rgb(ImageOps.exif_transpose(image))
    return _fitted(image, width, height)


def check_image(path: PathLike, name: str = "image") -> None:
    """Refuse an image file by its header: kind, bytes, width and height. Nothing is decoded."""
    image = _open_image(path, name)
    _check_image_size(f"{name} {Path(path).name!r}", image.width, image.height)


def _fitted(image: Image.Image, width: int, height: int) -> Pixels:
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def _open_image(path: PathLike, name: str) -> Image.Image:
    """The image with its header read and its pixels not."""
    if not os.path.isfile(path):  # which a pipe is not either: reading one could wait forever
        raise ValueError(f"{name} must be an existing file, got {str(path)!r}")
    label = f"{name} {Path(path).name!r}"
    if (num_bytes := os.path.getsize(path)) > MAX_IMAGE_BYTES:
        raise ValueError(f"{label} must have at most {MAX_IMAGE_BYTES} bytes, got {num_bytes}")
    data = Path(path).read_bytes()
    opener: type[PngImageFile | JpegImageFile | WebPImageFile]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        opener = PngImageFile
    elif data.startswith(b"\xff\xd8\xff"):
        opener = JpegImageFile
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        opener = WebPImageFile
    else:
        raise ValueError(f"{label} must be a PNG, JPEG or WebP file")
    with _decoding(label):
        return opener(BytesIO(data))


@contextmanager
def _decoding(label: str) -> Iterator[None]:
    """What Pillow raises on a broken file becomes a ValueError that names the file."""
    try:
        yield
    except Image.DecompressionBombError as error:  # WebP's canvas, whose size Pillow checks before we can
        raise ValueError(f"{label} must have at most {MAX_IMAGE_PIXELS // 10**6} megapixels, got far more") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # 10,000 mutated files: the first two
        raise ValueError(f"{label} must be an intact image, got a broken one ({error})") from error


def _check_image_size(label: str, width: int, height: int) -> None:
    got = f"got {width}x{height}"
    if min(width, height) < MIN_IMAGE_SIDE:
        raise ValueError(f"{label} must be at least {MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE} pixels, {got}")
    if max(width, height) > MAX_IMAGE_SIDE:
        raise ValueError(f"{label} must be at most {MAX_IMAGE_SIDE} pixels on a side, {got}")
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{label} must have at most {MAX_IMAGE_PIXELS // 10**6} megapixels, {got}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey: convert("RGB") would clip it at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def read_video(path: PathLike, max_frames: int, max_pixels: int) -> tuple[Frames, float]:
    """Frames, uint8 [frames, height, width, 3] and upright, and frames per second of a file within the given bounds."""
    with _open_video(path, max_pixels) as (container, stream):
        if stream.frames > max_frames:
            raise ValueError(f"{_label(path)} must have at most {max_frames} frames, got {stream.frames}")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        frames = list(_decoded(path, container, stream, max_frames, max_pixels))
    if not fps:
        raise ValueError(f"{_label(path)} must have a frame rate")
    return np.stack(frames), fps


def read_frames(source: PathLike | Frames, width: int, height: int, max_frames: int) -> Iterator[Pixels]:
    """Uint8 [height, width, 3]: each frame of a file or an array, fitted as `read_image` fits an image."""
    if isinstance(source, np.ndarray):
        yield from (_fitted(Image.fromarray(frame), width, height) for frame in source)
        return
    with _open_video(source, MAX_VIDEO_PIXELS) as (container, stream):
        for frame in _decoded(source, container, stream, max_frames, MAX_VIDEO_PIXELS):
            yield _fitted(Image.fromarray(frame), width, height)


def count_frames(source: PathLike | Frames) -> int:
    """How many frames a video has, by its packets: nothing is decoded. Refuses what `read_frames` could not read."""
    if isinstance(source, np.ndarray):
        label, num_frames = "video", len(source)
        _check_image_size(label, source.shape[2], source.shape[1])
    else:
        label, num_frames = _label(source), 0
        with _open_video(source, MAX_VIDEO_PIXELS) as (container, stream):
            _check_image_size(label, stream.width, stream.height)
            for packet in islice(container.demux(stream), MAX_VIDEO_FRAMES + 2):  # the last one is empty
                if packet.is_corrupt:
                    raise ValueError(f"{label} must be an intact mp4, mov, mkv or webm file (it is cut short)")
                num_frames += packet.size > 0 and not packet.is_discard  # an edit list discards frames of the file
    if not 1 <= num_frames <= MAX_VIDEO_FRAMES:
        got = "more" if num_frames else "none"
        raise ValueError(f"{label} must have from 1 to {MAX_VIDEO_FRAMES} frames, got {got}")
    return num_frames


def _label(path: PathLike) -> str:
    return f"video {Path(path).name!r}"


@contextmanager
def _open_video(path: PathLike, max_pixels: int) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """The file and its picture, its header checked; what FFmpeg raises becomes a ValueError that names the file."""
    import av

    if not os.path.isfile(path):
        raise ValueError(f"video must be an existing file, got {str(path)!r}")
    label = _label(path)
    if (num_bytes := os.path.getsize(path)) > MAX_VIDEO_BYTES:
        raise ValueError(f"{label} must have at most {MAX_VIDEO_BYTES} bytes, got {num_bytes}")
    # Only containers that hold the video themselves: a playlist could name other files or addresses in our network.
    only = {"format_whitelist": "mov,matroska", "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{os.path.abspath(path)}", options=only) as container:
            if not container.streams.video:
                raise ValueError(f"{label} must have a picture, got none")
            stream = container.streams.video[0]
            if not 0 < stream.width * stream.height <= max_pixels:
                raise ValueError(
                    f"{label} must have at most {max_pixels} pixels a frame, got {stream.width}x{stream.height}"
                )
            if (seconds := (container.duration or 0) / av.time_base) > MAX_VIDEO_S:
                raise ValueError(f"{label} must last at most {MAX_VIDEO_S} s, got {seconds:.0f}")
            # Later frames may be larger than the header says. Decoders pad, so the codec's own bound is a loose one.
            stream.codec_context.options = {"max_pixels": str(4 * max_pixels + 2**20)}
            yield container, stream
    except av.error.FFmpegError as error:
        raise ValueError(f"{label} must be an intact mp4, mov, mkv or webm file ({error.strerror})") from error


def _decoded(
    path: PathLike, container: InputContainer, stream: av.VideoStream, max_frames: int, max_pixels: int
) -> Iterator[Pixels]:
    """From 1 to `max_frames` upright frames [height, width, 3] of one size."""
    num_frames, shape = 0, None
    for frame in islice(container.decode(stream), max_frames + 1):
        pixels, num_frames = upright(frame), num_frames + 1
        shape = shape or pixels.shape
        if pixels.shape != shape or pixels.size > 3 * max_pixels:
            raise ValueError(f"{_label(path)} must keep to the size of its header")
        yield pixels
    if not 1 <= num_frames <= max_frames:
        got = "more" if num_frames else "none"
        raise ValueError(f"{_label(path)} must have from 1 to {max_frames} frames, got {got}")


def upright(frame: av.VideoFrame) -> Pixels:
    """RGB pixels [height, width, 3], turned as the file says (telephones store portraits lying)."""
    from av.video.reformatter import Interpolation

    exact = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    pixels = frame.to_ndarray(format="rgb24", interpolation=exact)
    return np.rot90(pixels, frame.rotation // 90)
