"""Pictures and clips that clients send: what comes out of the decoder, and every way in which nothing does."""

from __future__ import annotations

import asyncio
import errno
import io
import resource
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from skylapse.runtime.media.clips import read_video
from skylapse.runtime.media.pictures import read_image
from skylapse.serve.intake import media as decoders
from skylapse.serve.intake.media import decode_image, decode_video
from skylapse.serve.wire.errors import ApiError

from ..bad_media import encoded, media, picture


@pytest.fixture
def upload(tmp_path: Path) -> Any:
    """A file as it lies in the spool, by its bytes or by its name in bad_media."""

    def write(content: bytes | str) -> Path:
        path = tmp_path / "0"
        path.write_bytes(media(content) if isinstance(content, str) else content)
        return path

    return write


def refused(decoding: Coroutine[Any, Any, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(decoding)
    return caught.value


def turned(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag  # orientation
    return encoded("JPEG", exif=exif.tobytes(), quality=95)


def half_clear() -> Image.Image:
    image = picture(mode="RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


PICTURES = {
    "png": lambda: media("png"),
    "webp": lambda: media("webp"),
    "jpeg_on_its_side": lambda: turned(6),
    "jpeg_upside_down": lambda: turned(3),
    "jpeg_cmyk": lambda: encoded("JPEG", picture(mode="CMYK")),
    "jpeg_grey": lambda: encoded("JPEG", picture(mode="L")),
    "jpeg_progressive": lambda: encoded("JPEG", progressive=True),
    "png_half_clear": lambda: encoded("PNG", half_clear()),
    "png_palette": lambda: encoded("PNG", picture().quantize(16), transparency=3),
    "png_16_bits": lambda: encoded("PNG", Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21)),
    "png_interlaced_text": lambda: encoded("PNG", exif=Image.Exif().tobytes(), dpi=(72, 72)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_the_pixels_that_the_runtime_would_read(name: str, upload: Any) -> None:
    path = upload(PICTURES[name]())
    png = asyncio.run(decode_image(path, 32, 40))
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode, image.size, image.info) == ("PNG", "RGB", (32, 40), {})  # pixels and nothing else
    assert np.array_equal(np.asarray(image), read_image(path, 32, 40))
    assert [*path.parent.iterdir()] == [path]


CLIP_FRAMES = 16


@pytest.mark.parametrize(("keep", "kept"), [("first", slice(0, 5)), ("last", slice(11, 16))])
def test_a_clip_gives_its_first_or_last_frames_at_the_native_size(keep: Any, kept: slice, upload: Any) -> None:
    path = upload("mp4")
    decoded = asyncio.run(decode_video(path, 32, 32, max_frames=5, keep=keep))
    assert (decoded.source_width, decoded.source_height, decoded.source_frames, decoded.fps) == (64, 48, 16, 8.0)
    frames = np.load(decoded.frames_path)
    whole, _ = read_video(path, CLIP_FRAMES, 2**20)
    assert frames.dtype == np.uint8 and decoded.frames_path.parent == path.parent
    assert np.array_equal(frames, np.stack([read_image(frame, 32, 32) for frame in whole[kept]]))


def test_a_clip_that_is_shorter_than_asked_is_taken_whole(upload: Any) -> None:
    for keep in ("first", "last"):
        decoded = asyncio.run(decode_video(upload("mp4"), 64, 48, max_frames=200, keep=keep))
        assert len(np.load(decoded.frames_path)) == decoded.source_frames == CLIP_FRAMES


def test_a_clip_that_was_filmed_on_its_side_stands_upright(upload: Any, tmp_path: Path) -> None:
    with av.open(io.BytesIO(media("mp4"))) as source, av.open(str(tmp_path / "side.mp4"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        stream.set_display_matrix([0, 65536, 0, -65536, 0, 0, 0, 0, 2**30])
        copy.mux([packet for packet in source.demux(video=0) if packet.size])
    decoded = asyncio.run(
        decode_video(upload((tmp_path / "side.mp4").read_bytes()), 48, 64, max_frames=1, keep="first")
    )
    assert (decoded.source_width, decoded.source_height) == (48, 64)


NOT_A_PICTURE = (
    *("text", "nothing", "gif", "bmp", "jpeg2000", "svg", "playlist", "heic", "gif_then_png", "mp4"),
    *("png_cut", "png_head", "png_crc", "jpeg_cut", "webp_cut", "png_then_mp4"),
)
NAMED = {"gif": "GIF", "bmp": "BMP", "jpeg2000": "JPEG 2000", "svg": "SVG", "heic": "HEIC", "gif_then_png": "GIF"}
NAMED |= {"mp4": "MP4", "png": "PNG", "png_then_mp4": "PNG"}
UNKNOWN = ("text", "nothing", "playlist")


def sentence(name: str, files: str, a: str, known: str) -> str:
    """Return the message for a file of another kind, or for a broken one of the right kind."""
    if name in UNKNOWN:
        return f"must be {a} {files} file."
    if name in NAMED and not name.startswith(known):
        return f"must be {a} {files} file, got {NAMED[name]}."
    return f"must be an intact {files} file."


NOT_A_CLIP = ("text", "nothing", "gif", "png", "playlist", "heic", "mp4_cut", "mp4_head", "mp4_noise", "png_then_mp4")


@pytest.mark.parametrize("name", NOT_A_PICTURE)
def test_what_is_no_intact_picture_is_refused_in_fixed_words(name: str, upload: Any) -> None:
    error = refused(decode_image(upload(name), 32, 32))
    assert (error.status, error.code, error.param) == (400, "invalid_image", "input_reference")
    assert error.message == f"Invalid 'input_reference': {sentence(name, 'PNG, JPEG or WebP', 'a', 'png')}"


@pytest.mark.parametrize("name", NOT_A_CLIP)
def test_what_is_no_intact_clip_is_refused_in_fixed_words(name: str, upload: Any) -> None:
    path = upload(name)
    error = refused(decode_video(path, 32, 32, max_frames=4, keep="last"))
    assert (error.status, error.code) == (400, "invalid_video")
    assert error.message == f"Invalid 'video': {sentence(name, 'mp4, mov, mkv or webm', 'an', 'mp4')}"
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("pixel", "invalid_image", "at least 16x16"),
        ("line", "invalid_image", "at least 16x16"),
        ("wide", "file_too_large", "at most 8192 pixels on a side, got 9000x20"),
        ("bomb", "file_too_large", "at most 8192 pixels on a side, got 12000x12000"),
        ("bigger_bomb", "file_too_large", "at most 8192 pixels on a side, got 30000x30000"),
        ("webp_bomb", "file_too_large", "at most 40000000 pixels, got far more"),
        ("profile_bomb", "file_too_large", "at most 16 MiB, got more"),
        ("apng", "invalid_image", "not an animation, got 3 frames"),
        ("webp_animation", "invalid_image", "not an animation, got 3 frames"),
    ],
)
def test_a_picture_out_of_bounds_is_refused_by_its_header(name: str, code: str, says: str, upload: Any) -> None:
    error = refused(decode_image(upload(name), 32, 32))
    assert (error.status, error.code) == (400, code) and says in error.message


def test_a_clip_out_of_bounds_is_refused_before_it_is_decoded(upload: Any) -> None:
    asked = dict(max_frames=4, keep="first")
    error = refused(decode_video(upload("mp4_long"), 32, 32, **asked))
    assert (error.code, "at most 120 s, got 125" in error.message) == ("file_too_large", True)
    error = refused(decode_video(upload("mp4_wide"), 32, 32, **asked))
    assert (error.code, "8192 pixels on a side, got 8208x16" in error.message) == ("file_too_large", True)
    error = refused(decode_video(upload("mp4"), 32, 32, **asked, max_pixels=1000))
    assert (error.code, "1000 pixels, got 64x48" in error.message) == ("file_too_large", True)


def test_a_codec_beyond_the_list_is_refused(upload: Any, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    error = refused(decode_video(upload((tmp_path / "clip.mp4").read_bytes()), 32, 32, max_frames=4, keep="first"))
    assert error.code == "invalid_video" and error.message.endswith(" video, got mjpeg.")


def test_texts_that_nobody_unpacks_do_no_harm(upload: Any) -> None:
    png = asyncio.run(decode_image(upload("text_bomb"), 32, 32))
    assert Image.open(io.BytesIO(png)).size == (32, 32)


# ------------------------------------------------------------------------------------------- a decoder that misbehaves

READY = "import os, sys, json; print('ready', flush=True); task = json.loads(sys.argv[1]); "
GOOD = '{"width": 32, "height": 32, "frames": 1, "fps": 1.0}'


def writes(content: bytes) -> str:
    """Return a program that leaves such a file and reports success."""
    return f"open(task['output'], 'wb').write({content!r}); print('{GOOD}')"


def npy(shape: tuple[int, ...], num_bytes: int, descr: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(num_bytes)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (f"os.kill(os.getpid(), {signal.SIGXCPU})", "must take less time and memory to decode"),
        ("""print('{"refused": "costly", "got": ""}')""", "must take less time and memory to decode"),
        (f"os.kill(os.getpid(), {signal.SIGSEGV})", "ends the program that decodes it"),
        ("os.abort()", "ends the program that decodes it"),
    ],
)
def test_what_a_file_does_to_its_decoder_is_told_of_the_file(
    program: str, says: str, upload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_PYTHON", (sys.executable, "-ISc", READY + program))
    path = upload("png")
    error = refused(decode_image(path, 32, 32))
    assert (error.status, error.code) == (400, "invalid_image") and says in error.message
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    "program",
    [
        "os.kill(os.getpid(), 9)",  # as the kernel does when the machine's memory runs out
        "os.kill(os.getpid(), 15)",
        f"os.kill(os.getpid(), {signal.SIGSYS})",  # by a filter of system calls
        "sys.exit(3)",
        "raise RuntimeError('heap at 0x7f3a1c')",
        "import nothing_of_this_name",
        "raise OSError(28, 'No space left on device')",
        "print('{')",
        "print('[' * 900)",
        "",
        "print('x' * 10**7)",
        "os.write(1, os.urandom(5000))",
        """print('{"refused": "because of /etc/passwd"}')""",
        """print('{"refused": "small", "got": "/etc/passwd\\n"}')""",
        f"print('{GOOD}')",  # but wrote nothing
        writes(b""),
        writes(b"\x93NUMPY\1\0" + bytes(500)),
        writes(media("png")),  # of another size
    ],
)
def test_a_failure_of_ours_is_never_told_as_the_clients(
    program: str, upload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_PYTHON", (sys.executable, "-ISc", READY + program))
    path = upload("png")
    error = refused(decode_image(path, 32, 32))
    assert (error.status, error.code, error.headers) == (503, "decoder_unavailable", {"retry-after": "5"})
    assert "0x7f3a1c" not in error.message and "/etc" not in error.message
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY" + bytes(500),
        b"\x93NUMPY\1\0\x76\0" + b"{" * 117 + b"\n",
        b"PK\3\4" + bytes(500),
        npy((1, 32, 32, 3), 3071),
        npy((5, 32, 32, 3), 5 * 3072),  # four were asked for
        npy((0, 32, 32, 3), 0),
        npy((1, 32, 64, 3), 6144),
        npy((1, 32, 32, 3), 6144, "<u2"),
        npy((1, 32, 32, 3), 8 * 3072, "|O"),  # which a careless reader would unpickle
    ],
)
def test_frames_that_are_not_what_was_asked_for_are_not_taken(
    content: bytes, upload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_PYTHON", (sys.executable, "-ISc", READY + writes(content)))
    path = upload("mp4")
    error = refused(decode_video(path, 32, 32, max_frames=4, keep="last"))
    assert (error.status, error.code) == (503, "decoder_unavailable")
    assert [*path.parent.iterdir()] == [path]


def test_a_decoder_that_gets_no_core_is_ended_and_our_fault(upload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = READY + "sys.stdin.close(); r, w = os.pipe(); os.read(r, 1)"
    monkeypatch.setattr(decoders, "_PYTHON", (sys.executable, "-ISc", program))
    monkeypatch.setattr(decoders, "WALL_PER_CPU", 0.02)
    error = refused(decode_image(upload("png"), 32, 32))
    assert (error.status, error.code) == (503, "decoder_unavailable")


def test_a_decoder_that_cannot_start_is_our_fault(
    upload: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoders, "_PYTHON", (sys.executable, "-ISc", "import nothing_of_this_name"))
    error = refused(decode_image(upload("png"), 32, 32))
    assert (error.status, error.code, error.headers) == (503, "decoder_unavailable", {"retry-after": "5"})
    assert "nothing_of_this_name" in caplog.text and "nothing" not in error.message


def test_a_decoder_has_no_more_memory_and_time_than_its_bounds(upload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real worker, with bounds that a good picture does not fit into."""
    path = upload(encoded("PNG", picture(1500, 1500), compress_level=0))
    monkeypatch.setattr(decoders, "MEMORY_BYTES", 0)
    monkeypatch.setattr(decoders, "MEMORY_BYTES_A_PIXEL", 96)  # 216 MB + 13, of which 221 are used before
    error = refused(decode_image(path, 32, 32, max_pixels=2_250_000))
    assert (error.status, error.code) == (400, "invalid_image") and "less time and memory" in error.message
    monkeypatch.undo()
    monkeypatch.setattr(decoders, "IMAGE_CPU_S", 0)
    monkeypatch.setattr(decoders, "WALL_PER_CPU", 10.0)
    assert refused(decode_image(path, 32, 32)).status in (400, 503)  # before it is ready, on a machine that is slow


def test_a_decoder_can_open_nothing_once_it_is_confined(tmp_path: Path) -> None:
    program = """
import socket
from skylapse.serve.intake.media_worker import Task, confine
bounds = dict(width=1, height=1, max_pixels=1, max_cpu_s=9, max_memory_bytes=2**30)
confine(Task(source="", output="", medium="picture", **bounds))
for attempt in (lambda: open("/etc/hostname"), lambda: open("new", "w"), socket.socket):
    try:
        attempt()
    except OSError as error:
        print(error.errno)
"""
    done = subprocess.run([sys.executable, "-Ic", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EMFILE)] * 3 and [*tmp_path.iterdir()] == []


def test_a_decoder_imports_neither_torch_nor_ray_and_sees_no_secret() -> None:
    program = (
        "import sys, skylapse.serve.intake.media_worker; print(sorted({*sys.modules} & {'torch', 'ray', 'pydantic'}))"
    )
    done = subprocess.run(
        [sys.executable, "-Ic", program], env=decoders._ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n" and [*decoders._ENVIRONMENT] == ["OPENBLAS_NUM_THREADS"]


def test_a_bomb_costs_us_no_memory(upload: Any) -> None:
    paths = [upload("bomb")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        refused(decode_image(path, 32, 32))
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 20_000  # the child has a limit of its own, and the largest of our children is another test's


def test_more_uploads_than_places_are_asked_to_come_back(upload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = upload("png")
    program = READY + "print('" + '{"refused": "animated"}' + "')"
    monkeypatch.setattr(decoders, "_PYTHON", (sys.executable, "-ISc", program))

    async def all_at_once() -> list[int]:
        answers = await asyncio.gather(*(decode_image(path, 32, 32) for _ in range(20)), return_exceptions=True)
        return [answer.status for answer in answers if isinstance(answer, ApiError)]

    assert sorted(asyncio.run(all_at_once())) == [400] * 18 + [503] * 2
    assert refused(decode_image(path, 32, 32)).status == 400  # and there is place again
