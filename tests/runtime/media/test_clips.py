"""Clips as people send them are shown as their files say, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clip_maker import STEP, clip, combed
from sent_clips import CLIPS, SentClip

from skylapse.runtime.media.clips import count_frames, open_clip, read_frames, read_video
from skylapse.runtime.media.refusal import SENTENCES, Bounds, Refused, sentence


def corners_of(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels in the middles of the four quarters."""
    height, width = pixels.shape[:2]
    y, x = [height // 4, height // 4, -height // 4, -height // 4], [width // 4, -width // 4, width // 4, -width // 4]
    return pixels[y, x].astype(int)


def check(frames: np.ndarray, sent: SentClip) -> None:
    assert frames.shape[1:] == (*sent.size[::-1], 3)
    assert np.abs(corners_of(frames[0]) - sent.corners).max() <= sent.tolerance, corners_of(frames[0]).tolist()
    if sent.order:
        brightest = np.array([corners_of(frame).min(1).max() for frame in frames])
        assert tuple(((220 - brightest) / STEP).round().astype(int)) == sent.order


@pytest.mark.parametrize("name", [name for name, sent in CLIPS.items() if not sent.refused])
def test_a_clip_is_read_as_it_is_shown(name: str, tmp_path: Path) -> None:
    sent, path = CLIPS[name], tmp_path / "sent"
    path.write_bytes(sent.make())
    frames, fps = read_video(path, 100, 10**6)
    check(frames, sent)
    assert fps == pytest.approx(sent.fps, rel=0.03)
    assert count_frames(path) == len(frames)
    assert np.array_equal(np.stack([*read_frames(path, sent.size[0], sent.size[1], max_frames=100)]), frames)


@pytest.mark.parametrize("name", [name for name, sent in CLIPS.items() if sent.refused])
def test_a_clip_that_could_not_be_shown_is_refused_by_name(name: str, tmp_path: Path) -> None:
    sent, path = CLIPS[name], tmp_path / "sent"
    path.write_bytes(sent.make())
    with pytest.raises(Refused) as caught:
        [*read_frames(path, 64, 48, 100)]
    assert (caught.value.word, caught.value.got) == (sent.refused, sent.got)
    assert str(caught.value).startswith("video 'sent' must ") and str(caught.value).count("\n") == 0


def test_fields_become_whole_frames(tmp_path: Path) -> None:
    path, options = tmp_path / "sent", {"crf": "1", "x264-params": "tff=1:interlaced=1"}
    path.write_bytes(clip(size=(96, 64), pix_fmt="yuv420p", options=options, cards=combed()))
    frames, _ = read_video(path, 10, 10**6)
    plain = tmp_path / "plain"
    plain.write_bytes(clip(size=(96, 64), pix_fmt="yuv420p", cards=combed()))
    woven, _ = read_video(plain, 10, 10**6)

    def combs(clip_frames: np.ndarray) -> float:
        """Return the mean difference of lines from the mean of their neighbours."""
        lines = clip_frames[..., 0].astype(float)
        return float(np.abs(lines[:, 1:-1] - (lines[:, :-2] + lines[:, 2:]) / 2).mean())

    assert len(frames) == len(woven) == 5
    assert combs(frames[1:-1]) < 0.25 * combs(woven[1:-1])


def test_a_rate_picks_the_nearest_frames_by_their_times(tmp_path: Path) -> None:
    path = tmp_path / "sent"
    path.write_bytes(clip(times=[0, 1, 2, 5, 6]))
    with open_clip(path) as sent:
        assert [*sent.picks()] == [0, 1, 2, 2, 2, 3, 4]
        assert [*sent.picks(16)] == [0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4]
        assert [*sent.picks(4)] == [0, 2, 2, 4]
    path.write_bytes(clip(times=range(24), rate=24, cards=[combed(48)[0][:, :64]] * 24))
    with open_clip(path) as sent:
        assert [*sent.picks(16)] == [*(np.arange(16) * 1.5 + 0.5).astype(int)]


def test_every_reason_stands_in_the_document() -> None:
    page = " ".join((Path(__file__).parents[3] / "docs" / "files.md").read_text().split())
    of_both = {"kind", "aspect", "costly"}
    of_pictures = {"animated", "colour", "profile"} | of_both
    by_size = {"broken", "crash", "bytes", "small", "wide", "large", "long", "frames"}  # told in sentences of its own
    for word in SENTENCES.keys() - by_size:
        assert word not in of_pictures or sentence(word, "picture", Bounds()) in page
        assert word in of_pictures - of_both or sentence(word, "clip", Bounds()) in page
