"""Videos that requests show: counted by their packets, refused by their headers, read at the request's size."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from skylapse.runtime.media.clips import Frames, count_frames, read_frames, read_video
from skylapse.runtime.media.frames import FrameReader
from skylapse.runtime.media.pictures import read_image
from skylapse.runtime.media.writer import write_video


@pytest.fixture
def frames() -> Frames:
    return np.random.default_rng(0).integers(0, 256, (17, 48, 64, 3), dtype=np.uint8)


def test_frames_are_counted_by_packets_and_read_at_the_asked_size(
    tmp_path: Path, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "clip.mp4", frames, fps=8)
    read = np.stack(list(read_frames(path, 32, 32, max_frames=17)))
    whole, _ = read_video(path, 17, 10_000)
    assert (read == np.stack([read_image(frame, 32, 32) for frame in whole])).all()
    assert (np.stack(list(read_frames(whole, 32, 32, max_frames=17))) == read).all()
    decoded: list[int] = []
    monkeypatch.setattr(FrameReader, "pixels", lambda self, frame: decoded.append(1))
    assert count_frames(path) == count_frames(frames) == 17 and decoded == []


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_frames_of_a_webm_which_says_nothing_of_their_number_are_counted(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "clip.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(21):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * shade, np.uint8))))
        container.mux(stream.encode())
    assert count_frames(path) == len(list(read_frames(path, 64, 48, max_frames=21))) == 21


def sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        assert isinstance(stream, av.AudioStream)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        tone.sample_rate, tone.pts = 8000, 0
        container.mux(stream.encode(tone))
        container.mux(stream.encode())


def cut_short(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (17, 48, 64, 3), dtype=np.uint8)
    data = write_video(path, noise, fps=8).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(512 * 2**20 + 1)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.write_bytes(b"no video"), "must be an mp4, mov, mkv or webm file"),
        (cut_short, "must be an intact mp4, mov, mkv or webm file (it is cut short)"),
        (sound, "must hold a clip, not sound or cover art alone"),
        (sparse, "must have at most 536870912 bytes, got 536870913"),
        (lambda path: write_video(path, np.zeros((1026, 16, 16, 3), np.uint8), 8), "must have from 1 to 1025 frames"),
        (lambda path: write_video(path, np.zeros((602, 16, 16, 3), np.uint8), 1), "must last at most 600 s, got 602"),
        (
            lambda path: write_video(path, np.zeros((1, 8, 64, 3), np.uint8), 1),
            "must be at least 16x16 pixels, got 64x8",
        ),
        (lambda path: path.mkdir(), "must be an existing file"),
    ],
    ids=["no video", "cut short", "sound alone", "large file", "too many frames", "too long", "tiny", "folder"],
)
def test_a_video_that_cannot_be_read_is_refused_before_it_is(
    tmp_path: Path, make: Callable[[Path], object], error: str
) -> None:
    make(tmp_path / "clip.mp4")
    with pytest.raises(ValueError) as caught:
        count_frames(tmp_path / "clip.mp4")
    assert str(caught.value).startswith("video ") and error in str(caught.value)


def test_a_video_with_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", np.zeros((1, 48, 64, 3), np.uint8), 8)
    with pytest.raises(ValueError, match=r"video 'clip.mp4' must have at most 3071 pixels, got 64x48"):
        read_video(path, 1, 64 * 48 - 1)
    wide = write_video(tmp_path / "wide.mp4", np.zeros((1, 16, 8194, 3), np.uint8), 8)
    for refuse in (count_frames, lambda path: next(read_frames(path, 64, 48, 1))):
        with pytest.raises(ValueError, match=r"video 'wide.mp4' must be at most 8192 pixels on a side, got 8194x16"):
            refuse(wide)
