"""The finishing stage: sizes, lengths and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skylapse.runtime.media.clips import read_video
from skylapse.runtime.media.postprocess import THUMBNAIL_SIDE, Finish, finish, fit


@pytest.fixture
def frames() -> np.ndarray:
    """9 frames 64x96: black, with a white disc of radius 20 at the middle and a red column at the left edge."""
    rows, columns = np.mgrid[:64, :96]
    clip = np.zeros((9, 64, 96, 3), np.uint8)
    clip[:, (rows - 31.5) ** 2 + (columns - 47.5) ** 2 < 400] = 255
    clip[:, :, :4] = (255, 0, 0)
    clip[:, 0, 0, 2] = np.arange(9)  # each frame is known
    return clip


def test_what_asks_for_nothing_is_left_as_it_is(frames: np.ndarray) -> None:
    assert np.array_equal(fit(frames, Finish()), frames)
    assert np.array_equal(fit(frames, Finish(width=96, height=64, num_frames=9)), frames)


def test_surplus_frames_leave_at_the_end(frames: np.ndarray) -> None:
    assert fit(frames, Finish(num_frames=5))[:, 0, 0, 2].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at most the 9 there are, got 10"):
        fit(frames, Finish(num_frames=10))


@pytest.mark.parametrize(("width", "height"), [(192, 128), (64, 64), (48, 96), (300, 100), (1280, 720)])
def test_a_disc_stays_round_and_in_the_middle(frames: np.ndarray, width: int, height: int) -> None:
    clip = fit(frames, Finish(width=width, height=height))
    assert clip.shape == (9, height, width, 3) and clip.dtype == np.uint8
    white = clip[0].min(axis=2) > 127
    scale = max(width / 96, height / 64)
    rows, columns = np.nonzero(white)
    assert abs(rows.mean() - (height - 1) / 2) < 0.6 and abs(columns.mean() - (width - 1) / 2) < 0.6
    assert white.any(axis=0).sum() == pytest.approx(min(width, 40 * scale), abs=2)
    assert white.any(axis=1).sum() == pytest.approx(min(height, 40 * scale), abs=2)


def test_the_edges_that_do_not_fit_are_cut_on_both_sides(frames: np.ndarray) -> None:
    wide = fit(frames, Finish(width=96, height=32))
    square = fit(frames, Finish(width=64, height=64))
    assert wide[0, 16, 0].tolist() == [255, 0, 0] and square[0, 32, 0].max() == 0


def test_files_are_what_the_artifact_says(frames: np.ndarray, tmp_path: Path) -> None:
    made = finish(frames, 8, tmp_path / "clip.mp4", tmp_path / "clip.webp", Finish(width=128, height=96, num_frames=6))
    assert (made.width, made.height, made.num_frames, made.fps) == (128, 96, 6, 8)
    clip, fps = read_video(made.video, max_frames=100, max_pixels=10**6)
    assert clip.shape == (6, 96, 128, 3) and fps == 8
    assert made.thumbnail is not None
    with Image.open(made.thumbnail) as image:
        assert image.format == "WEBP" and image.size == (128, 96)
        shown = np.asarray(image.convert("RGB"))[48, 64]
    assert np.abs(shown.astype(int) - clip[3, 48, 64]).max() < 12
    data = made.video.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # playback begins before the file is there


def test_a_thumbnail_is_never_larger_than_it_need_be(frames: np.ndarray, tmp_path: Path) -> None:
    finish(frames[:1], 8, tmp_path / "clip.mp4", tmp_path / "clip.webp", Finish(width=1280, height=720))
    with Image.open(tmp_path / "clip.webp") as image:
        assert image.size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE * 720 // 1280)


def test_nothing_is_left_of_what_cannot_be_written(frames: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"thumbnail must end in \.webp"):
        finish(frames, 8, tmp_path / "clip.mp4", tmp_path / "clip.bmp")
    with pytest.raises(ValueError, match="even width and height"):
        finish(frames, 8, tmp_path / "clip.mp4", tmp_path / "clip.webp", Finish(width=65, height=64))
    assert not list(tmp_path.iterdir())
