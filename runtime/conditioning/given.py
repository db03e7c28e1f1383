"""What a request shows of its clip in pixels: frames that are given, and the source that a clip starts from.

Files are counted at submission and read when the request's turn to be encoded comes: who waits holds no pixels.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from ..core.request import VideoRequest
from ..media.clips import Frames, count_frames, read_frames
from ..media.pictures import read_image

FRAMES_AN_ITEM = 4  # of a video, read in one work item; one of 1080p takes 0.07 s on a busy CPU core


@dataclass(frozen=True, eq=False)
class Given:
    """Frames of the clip, from frame `start` on, that are kept as they are."""

    start: int  # 4j, where latent frame j ends
    frames: Frames  # uint8 [4k+1, H, W, 3]


def count_given(request: VideoRequest) -> list[int]:
    """How many frames each of `read_given`'s pieces has."""
    beginning = [count_video(request)] if request.continues_video else []
    return beginning + [1 for image in (request.image, request.last_image) if image is not None]


def count_video(request: VideoRequest) -> int:
    """How many frames its video has, counted without decoding; ValueError unless they are 4k+1."""
    assert request.video is not None
    length = count_frames(request.video)
    if surplus := (length - 1) % 4:
        nearest = f"{length - surplus} or {length - surplus + 4}"
        raise ValueError(f"video must have 4k+1 frames, got {length} (nearest: {nearest})")
    return length


def check_length(request: VideoRequest, length: int) -> None:
    """ValueError unless a clip of num_frames can go on from a video of `length` frames, or be made of it."""
    _, _, num_frames = request.size
    if request.strength is None and length >= num_frames:
        raise ValueError(f"num_frames must be above the {length} frames of video, got {num_frames}")
    if request.strength is not None and length != num_frames:
        raise ValueError(f"num_frames must be that of video beside strength, {length}, got {num_frames}")


def read_given(request: VideoRequest) -> Generator[None, None, tuple[Given, ...]]:
    """Returns the beginning of the clip and its last frame, as far as they are given; yields after each work item."""
    width, height, num_frames = request.size
    given = []
    if request.continues_video:
        given.append(Given(0, (yield from read_video_of(request))))
    if request.image is not None:
        given.append(Given(0, read_image(request.image, width, height)[None]))
    if request.last_image is not None:
        given.append(Given(num_frames - 1, read_image(request.last_image, width, height, "last_image")[None]))
    return tuple(given)


def read_video_of(request: VideoRequest) -> Generator[None, None, Frames]:
    """Returns its video's frames, uint8 [F, H, W, 3] of the request's size; yields after each work item."""
    assert request.video is not None
    width, height, num_frames = request.size
    frames: list[Frames] = []
    for frame in read_frames(request.video, width, height, max_frames=num_frames):
        frames.append(frame)
        if len(frames) % FRAMES_AN_ITEM == 0:
            yield
    if len(frames) != (counted := count_video(request)):
        raise ValueError(f"video must be intact: it has {counted} frames, of which {len(frames)} can be read")
    check_length(request, counted)  # the file may be another by now
    return np.stack(frames)
