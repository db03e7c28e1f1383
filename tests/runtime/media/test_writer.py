"""Video files: what is written is read again, nothing is half-written, given files are checked by their headers."""

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from skylapse.runtime.media import writer as video_file
from skylapse.runtime.media.clips import read_video
from skylapse.runtime.media.pictures import check_image, read_image
from skylapse.runtime.media.writer import check_writable, contact_sheet, save_sheet, write_video

Frames = NDArray[np.uint8]


@pytest.fixture
def frames() -> Frames:
    """Return frames [17, 48, 64, 3]: flat stripes of strong colours under a square that moves right."""
    stripes = np.array([(220, 40, 40), (40, 200, 60), (40, 60, 230), (240, 240, 240)], np.uint8)
    clip = np.tile(stripes.repeat(16, axis=0), (17, 48, 1, 1))
    for index, pixels in enumerate(clip):
        pixels[:16, 2 * index : 2 * index + 16] = (250, 220, 30)
    return clip


def psnr(a: Frames, b: Frames) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


# ---------------------------------------------------------------------------------------------------------- writing


def test_mp4_keeps_frame_count_rate_size_and_colours(tmp_path: Path, frames: Frames) -> None:
    path = write_video(tmp_path / "clip.mp4", frames, fps=8)
    read, fps = read_video(path, max_frames=17, max_pixels=64 * 48)
    assert (read.shape, str(read.dtype), fps) == (frames.shape, "uint8", 8.0)
    flat = (slice(None), slice(24, None), slice(4, 12))  # within one stripe, away from the square
    assert np.abs(read[flat].astype(int) - frames[flat]).max() <= 6  # BT.601 for BT.709 would be off by 20


def test_mp4_is_h264_tagged_bt709_with_its_index_first(tmp_path: Path, frames: Frames) -> None:
    path = write_video(tmp_path / "clip.mp4", frames, fps=24)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert container.duration == pytest.approx(17 / 24 * 1e6, abs=1000)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_single_frame_is_a_video_and_a_plain_png(tmp_path: Path, frames: Frames) -> None:
    read, _ = read_video(write_video(tmp_path / "one.mp4", frames[:1], fps=8), max_frames=1, max_pixels=10_000)
    assert len(read) == 1
    with Image.open(write_video(tmp_path / "one.png", frames[:1], fps=8)) as image:
        assert not getattr(image, "is_animated", False)
        assert (np.asarray(image) == frames[0]).all()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_small_animation_is_lossless(tmp_path: Path, frames: Frames, suffix: str) -> None:
    with Image.open(write_video(tmp_path / f"clip{suffix}", frames, fps=8)) as image:
        read = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    assert (np.stack(read) == frames).all()


def test_gif_lasts_as_long_as_the_video(tmp_path: Path, frames: Frames) -> None:
    with Image.open(write_video(tmp_path / "clip.gif", frames, fps=24)) as image:
        durations_ms = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert sum(durations_ms) == pytest.approx(17 / 24 * 1000, abs=5)  # though each is 40 or 50


def test_odd_size_is_refused_in_mp4_and_leaves_nothing(tmp_path: Path, frames: Frames) -> None:
    with pytest.raises(ValueError, match="mp4 needs an even width and height, got 63x48"):
        write_video(tmp_path / "clip.mp4", frames[:, :, :63], fps=8)
    assert list(tmp_path.iterdir()) == []


def test_gif_faster_than_players_show_is_refused(tmp_path: Path, frames: Frames) -> None:
    with pytest.raises(ValueError, match="fps must be at most 50 in a gif, got 60"):
        write_video(tmp_path / "clip.gif", frames, fps=60)


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, frames: Frames, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old one")

    def write_half(unfinished: Path, frames: Frames, fps: int) -> None:
        unfinished.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(video_file, "_write_mp4", write_half)
    with pytest.raises(type(failure)):
        write_video(path, frames, fps=8)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the old one"


def test_another_encoder_is_used_and_named_when_libx264_is_missing(
    tmp_path: Path, frames: Frames, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    video_file._h264_encoder.cache_clear()
    with caplog.at_level(logging.WARNING):
        path = write_video(tmp_path / "clip.mp4", frames, fps=8)
    video_file._h264_encoder.cache_clear()
    assert "mp4 is encoded by mpeg4" in caplog.text
    read, _ = read_video(path, max_frames=17, max_pixels=10_000)
    assert psnr(read[:, 24:], frames[:, 24:]) > 20


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("clip.avi", "output must end in .mp4 or .webp or .gif or .png, got '{}'"),
        ("clip", "output must end in .mp4 or .webp or .gif or .png, got '{}'"),
        ("folder.mp4", "output must be a file, got the folder '{}'"),
        ("absent/clip.mp4", "output must be in an existing folder, got '{}'"),
        ("file.txt/clip.mp4", "output must be in an existing folder, got '{}'"),
        ("x" * 300 + ".mp4", "output must be writable, got '{}' (File name too long)"),
    ],
    ids=["suffix", "no suffix", "folder", "no parent", "parent is a file", "name too long"],
)
def test_unwritable_path_is_refused_before_any_work(tmp_path: Path, path: str, error: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError) as caught:
        check_writable(tmp_path / path)
    assert str(caught.value) == error.format(tmp_path / path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="/proc is the one folder that refuses root, too")
def test_folder_without_permission_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output must be writable, got '/proc/clip.mp4' \("):
        check_writable("/proc/clip.mp4")


def test_writable_check_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- contact sheets


@pytest.mark.parametrize(
    ("num_frames", "columns", "cells"),
    [(1, None, (1, 1)), (5, None, (5, 1)), (9, None, (3, 3)), (17, None, (6, 2)), (81, 4, (4, 3)), (7, None, (6, 2))],
)
def test_contact_sheet_is_a_grid_of_at_most_12_frames(num_frames: int, columns: int, cells: tuple[int, int]) -> None:
    sheet = contact_sheet(np.zeros((num_frames, 64, 64, 3), np.uint8), columns)
    assert sheet.size == (cells[0] * 196 + 4, cells[1] * 196 + 4)


def test_contact_sheet_begins_with_the_first_frame_and_ends_with_the_last() -> None:
    shades = np.arange(100, 181, dtype=np.uint8)
    sheet = contact_sheet(np.broadcast_to(shades[:, None, None, None], (81, 32, 64, 3)))
    assert sheet.getpixel((4, 4)) == (100, 100, 100)
    assert sheet.getpixel((sheet.width - 5, sheet.height - 5)) == (180, 180, 180)


def test_large_frames_are_made_smaller_on_the_sheet() -> None:
    assert contact_sheet(np.zeros((1, 720, 1280, 3), np.uint8)).size == (488, 278)


def test_sheet_is_a_png(tmp_path: Path, frames: Frames) -> None:
    path = save_sheet(tmp_path / "sheet.png", frames)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"sheet must end in .png, got 'sheet.jpg'"):
        save_sheet("sheet.jpg", frames)


# ---------------------------------------------------------------------------------------------------- reading images


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


def webp_header(width: int, height: int) -> bytes:
    canvas = b"VP8X\x0a\0\0\0\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + len(canvas + b"WEBP").to_bytes(4, "little") + b"WEBP" + canvas


def test_image_keeps_its_aspect_and_is_cropped_at_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, :40], pixels[:, 40:80], pixels[:, 80:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    for source in (tmp_path / "wide.png", str(tmp_path / "wide.png"), pixels, Image.fromarray(pixels)):
        image = read_image(source, width=20, height=20)
        assert (image.shape, str(image.dtype)) == ((20, 20, 3), "uint8")
        assert (image[:, 3:-3] == (0, 255, 0)).all()


def test_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the left half is above
    Image.fromarray(pixels).save(tmp_path / "lying.jpg", exif=exif)
    image = read_image(tmp_path / "lying.jpg", width=32, height=64)
    assert image[:24].min() > 240
    assert image[-24:].max() < 15


@pytest.mark.parametrize(
    ("suffix", "make"),
    [
        (".png", lambda grey: Image.fromarray(grey.astype(np.uint16) * 257)),
        (".png", lambda grey: Image.fromarray(grey)),
        (".png", lambda grey: Image.fromarray(grey).convert("P")),
        (".png", lambda grey: Image.fromarray(grey).convert("RGBA")),
        (".jpg", lambda grey: Image.merge("CMYK", [*[Image.new("L", (64, 64))] * 3, Image.fromarray(255 - grey)])),
        (".webp", lambda grey: Image.fromarray(grey).convert("RGB")),
    ],
    ids=["16-bit", "grey", "palette", "rgba", "cmyk", "webp"],
)
def test_any_kind_of_pixel_becomes_rgb(
    tmp_path: Path, suffix: str, make: Callable[[NDArray[np.uint8]], Image.Image]
) -> None:
    grey = np.full((64, 64), 200, np.uint8)
    path = tmp_path / f"image{suffix}"
    make(grey).save(path)
    assert np.abs(read_image(path, 64, 64).astype(int) - 200).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_black(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (16, 0, 32, 32))
    image.convert(mode).save(tmp_path / "half.png")
    pixels = read_image(tmp_path / "half.png", 32, 32)
    assert pixels[:, :16].max() == 0
    assert pixels[:, 16:].min() == 255


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "image 'given.png' must be a PNG, JPEG or WebP file"),
        (b"GIF89a" + bytes(64), "image 'given.png' must be a PNG, JPEG or WebP file, got GIF"),
        (b"<svg/>", "image 'given.png' must be a PNG, JPEG or WebP file, got SVG"),
        (png_header(8, 8), "image 'given.png' must be at least 16x16 pixels, got 8x8"),
        (png_header(9000, 64), "image 'given.png' must be at most 8192 pixels on a side, got 9000x64"),
        (png_header(8000, 8000), "image 'given.png' must have at most 40000000 pixels, got 8000x8000"),
        (png_header(65535, 65535), "image 'given.png' must be at most 8192 pixels on a side, got 65535x65535"),
        (webp_header(16000, 16000), "image 'given.png' must have at most 40000000 pixels, got far more"),
        (png_header(64, 64)[:20], "image 'given.png' must be an intact PNG, JPEG or WebP file (Truncated File Read)"),
    ],
    ids=["empty", "gif", "svg", "tiny", "wide", "many pixels", "png bomb", "webp bomb", "truncated header"],
)
def test_image_is_refused_by_its_header(tmp_path: Path, data: bytes, error: str) -> None:
    (tmp_path / "given.png").write_bytes(data)
    for refuse in (check_image, lambda path: read_image(path, 64, 64)):
        with pytest.raises(ValueError) as caught:
            refuse(tmp_path / "given.png")
        assert str(caught.value) == error


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_truncated_image_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"cut.{kind}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"image 'cut.{kind}' must be an intact PNG, JPEG or WebP file \("):
        read_image(path, 64, 64)


def test_image_file_too_large_to_read_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(ValueError, match=r"image 'sparse.png' must have at most 67108864 bytes, got 67108865"):
        check_image(tmp_path / "sparse.png")


def test_absent_image_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(ValueError, match="image must be an existing file, got"):
            check_image(path)


def test_given_array_and_pil_image_have_the_same_bounds() -> None:
    tiny = np.zeros((8, 8, 3), np.uint8)
    for source in (tiny, Image.fromarray(tiny)):
        with pytest.raises(ValueError, match="image must be at least 16x16 pixels, got 8x8"):
            read_image(source, 64, 64)


# ---------------------------------------------------------------------------------------------------- reading videos


@pytest.mark.parametrize(
    ("max_frames", "max_pixels", "error"),
    [
        (16, 10_000, "video 'clip.mp4' must have from 1 to 16 frames, got more"),
        (17, 64 * 48 - 1, "video 'clip.mp4' must have at most 3071 pixels, got 64x48"),
    ],
)
def test_video_beyond_the_bounds_is_refused_by_its_header(
    tmp_path: Path, frames: Frames, max_frames: int, max_pixels: int, error: str
) -> None:
    path = write_video(tmp_path / "clip.mp4", frames, fps=8)
    with pytest.raises(ValueError) as caught:
        read_video(path, max_frames, max_pixels)
    assert str(caught.value) == error


def test_playlist_that_names_other_files_is_not_followed(tmp_path: Path, frames: Frames) -> None:
    write_video(tmp_path / "secret.mp4", frames, fps=8)
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match=r"video 'list.mp4' must be an mp4, mov, mkv or webm file"):
        read_video(tmp_path / "list.mp4", 81, 10_000)


def test_broken_or_absent_video_is_an_error_that_names_it(tmp_path: Path, frames: Frames) -> None:
    path = write_video(tmp_path / "clip.mp4", frames, fps=8)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"video 'clip.mp4' must be an intact mp4, mov, mkv or webm file"):
        read_video(path, 81, 10_000)
    with pytest.raises(ValueError, match=r"video must be an existing file, got 'absent.mp4'"):
        read_video("absent.mp4", 81, 10_000)


def test_video_is_turned_as_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "lying.mp4"
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(-90)  # shown turned by 90 degrees clockwise: the left half is above
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    read, _ = read_video(path, 1, 10_000)
    assert read.shape == (1, 64, 48, 3)
    assert read[0, :24].min() > 200
    assert read[0, -24:].max() < 50
