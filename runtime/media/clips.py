"""Clips as they are shown: one stream, whole, upright, in SDR, at a constant frame rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .boxes import TrackFacts, tracks_of
from .frames import Deinterlacer, FrameReader
from .kinds import CLIPS, kind_of
from .pictures import PathLike, Pixels, fitted
from .refusal import CLIP_BOUNDS, Bounds, Subject
from .timeline import Timeline, timeline_of

if TYPE_CHECKING:  # imported where a clip is opened: pictures, and whoever asks for a name alone, need no FFmpeg
    import av
    from av.container import InputContainer

Frames: TypeAlias = NDArray[np.uint8]  # [frames, height, width, 3]

FORMATS = {"MP4": "mp4", "Matroska": "matroska"}
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "prores")
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these pass over the second picture
DOLBY_VISION_ALONE = ("dvh1", "dvhe", "dva1", "dvav", "dav1")  # without a base that others can show
NOT_THE_CLIP = ("attached_pic", "timed_thumbnails", "still_image", "dependent", "multilayer")


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip whose header, timing and first frame have been read."""

    width: int  # as it is shown
    height: int
    timeline: Timeline
    _file: BinaryIO
    _subject: Subject

    @property
    def fps(self) -> float:
        return self.timeline.fps

    def picks(self, fps: float | None = None) -> NDArray[np.intp]:
        """Return the frames of a clip of `fps` (None: its own rate), as indices for `frames`."""
        picks = self.timeline.picks(fps)
        if len(picks) > self._subject.bounds.max_frames:
            raise self._subject.refused("frames", str(len(picks)))
        return picks

    def frames(self, picks: NDArray[np.intp]) -> Iterator[Pixels]:
        """Yield the frames of these rising indices, uint8 [height, width, 3], each decoded when it is asked for."""
        num_picked, index = 0, -1
        with _opened(self._file, self._subject) as (container, stream, track):
            reader: FrameReader | None = None
            for index, frame in enumerate(_decoded(container, stream, self._subject)):
                reader = reader or _reader(frame, stream, track, self._subject)
                end = int(np.searchsorted(picks, index, side="right"))
                if end > num_picked:
                    with self._subject.decoding():
                        pixels = reader.pixels(frame)
                    for _ in range(num_picked, end):
                        yield pixels
                    num_picked = end
                if num_picked == len(picks):
                    return
        counted = f"it has {len(self.timeline.starts)} frames, of which {index + 1} can be read"
        raise self._subject.refused("broken", detail=counted)


def read_video(path: PathLike, max_frames: int, max_pixels: int) -> tuple[Frames, float]:
    """Return a file's frames as they are shown, uint8 [frames, height, width, 3], and its frames per second.

    Raises Refused for a file out of the bounds.
    """
    with open_clip(path, Bounds(max_pixels=max_pixels, max_frames=max_frames)) as clip:
        return np.stack([*clip.frames(clip.picks())]), clip.fps


def read_frames(source: PathLike | Frames, width: int, height: int, max_frames: int) -> Iterator[Pixels]:
    """Yield each frame of a file or an array, uint8 [height, width, 3], fitted as `read_image` fits a picture."""
    if isinstance(source, np.ndarray):
        yield from (fitted(Image.fromarray(frame), width, height) for frame in source)
        return
    with open_clip(source, Bounds(max_frames=max_frames)) as clip:
        for frame in clip.frames(clip.picks()):
            yield fitted(Image.fromarray(frame), width, height)


def count_frames(source: PathLike | Frames) -> int:
    """Return the number of frames that `read_frames` gives; decodes the first one alone. Refuses an unreadable clip."""
    if not isinstance(source, np.ndarray):
        with open_clip(source) as clip:
            return len(clip.picks())
    subject = Subject("video", "clip", CLIP_BOUNDS)
    subject.check_size(source.shape[2], source.shape[1])
    if not 1 <= len(source) <= CLIP_BOUNDS.max_frames:
        raise subject.refused("frames", str(len(source)))
    return len(source)


@contextmanager
def open_clip(source: PathLike | BinaryIO, bounds: Bounds = CLIP_BOUNDS, label: str = "video") -> Iterator[Clip]:
    """Open the clip of a path or of an open file. Raises Refused for what is no clip within the bounds."""
    if not isinstance(source, str | os.PathLike):
        yield _clip_of(source, Subject(label, "clip", bounds))
        return
    if not os.path.isfile(source):
        raise ValueError(f"{label} must be an existing file, got {str(source)!r}")
    with open(source, "rb") as file:
        yield _clip_of(file, Subject(f"{label} {Path(source).name!r}", "clip", bounds))


def _clip_of(file: BinaryIO, subject: Subject) -> Clip:
    with _opened(file, subject) as (container, stream, _):
        timeline = _timeline(container, stream, subject)
    with _opened(file, subject) as (container, stream, track):
        frame = next(iter(_decoded(container, stream, subject)), None)
        if frame is None:
            raise subject.refused("broken", detail="no frame of it can be read")
        reader = _reader(frame, stream, track, subject)
    return Clip(reader.width, reader.height, timeline, file, subject)


@contextmanager
def _opened(file: BinaryIO, subject: Subject) -> Iterator[tuple[InputContainer, av.VideoStream, TrackFacts]]:
    """Open the container and find the stream that is the clip; its header is checked.

    FFmpeg is given an open file and one format: it tries no others, and a playlist could not name other files.
    """
    import av

    if (num_bytes := os.fstat(file.fileno()).st_size) > subject.bounds.max_bytes:
        raise subject.refused("bytes", str(num_bytes))
    kind = kind_of(file)
    if kind not in CLIPS:
        raise subject.refused("kind", kind)
    tracks = tracks_of(file) if kind == "MP4" else []
    with subject.decoding():
        container = av.open(file, "r", format=FORMATS[kind], options={"codec_whitelist": ",".join(CODECS)})
    with container:
        stream = _stream_of(container, subject)
        track = tracks[stream.index] if stream.index < len(tracks) else TrackFacts()
        if not track.keeps_speed:
            raise subject.refused("speed")
        yield container, stream, track


def _stream_of(container: InputContainer, subject: Subject) -> av.VideoStream:
    """Return the first track that is switched on, else the first; cover art and thumbnails are no clip."""
    streams = [
        stream
        for stream in container.streams.video
        if not any(stream.disposition & getattr(type(stream.disposition), name) for name in NOT_THE_CLIP)
    ]
    if not container.streams:
        raise subject.refused("broken", detail="it has no index")
    if not streams:
        raise subject.refused("picture")
    stream = next((stream for stream in streams if stream.disposition & type(stream.disposition).default), streams[0])
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        raise subject.refused("codec", context.name if context else "")
    if context.codec_tag in DOLBY_VISION_ALONE:
        raise subject.refused("transfer", "Dolby Vision")
    if context.width and context.height:
        subject.check_size(context.width, context.height)
    context.thread_count = 1  # memory is one frame's, not one a thread; in the service the cores have other work
    context.options = _options(subject)
    return stream


def _options(subject: Subject) -> dict[str, str]:
    """Return the codec's own bound of pixels: a loose one, since decoders pad and frames may lie."""
    return {"max_pixels": str(4 * subject.bounds.max_pixels + 2**20)}


def _timeline(container: InputContainer, stream: av.VideoStream, subject: Subject) -> Timeline:
    """Return the clip's timeline, by its packets: nothing is decoded. Refuses a file that was cut short."""
    bounds = subject.bounds
    times: list[int] = []
    durations: dict[int, int] = {}
    first_key: int | None = None
    with subject.decoding():
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise subject.refused("broken", detail="it is cut short")
            if packet.has_sidedata("encryption_info"):
                raise subject.refused("encrypted")
            if not packet.size:
                continue
            if (time := packet.pts if packet.pts is not None else packet.dts) is None:
                raise subject.refused("timing")
            if first_key is None and packet.is_keyframe:
                first_key = time
            if not packet.is_discard:  # an edit list discards frames of the file
                times.append(time)
                durations[time] = packet.duration or 0
            if len(times) > bounds.max_frames:
                raise subject.refused("frames", "more")
    times = sorted(time for time in times if first_key is None or time >= first_key)
    if not times:
        raise subject.refused("frames", "none")
    assert stream.time_base is not None
    told = (stream.average_rate, stream.guessed_rate)
    timeline = timeline_of(times, stream.time_base, durations[times[-1]], told)
    if timeline.end > bounds.max_seconds:
        raise subject.refused("long", f"{timeline.end:.0f}")
    return timeline


def _reader(frame: av.VideoFrame, stream: av.VideoStream, track: TrackFacts, subject: Subject) -> FrameReader:
    return FrameReader(frame, stream.sample_aspect_ratio, track.aperture, subject)


def _decoded(container: InputContainer, stream: av.VideoStream, subject: Subject) -> Iterator[av.VideoFrame]:
    """Yield the frames that are shown, in their order."""
    import av

    context: av.VideoCodecContext = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and context.name in WITH_ALPHA:
        context = av.CodecContext.create(WITH_ALPHA[context.name], "r")  # type: ignore[assignment]
        context.options = _options(subject)
    fields, first_key = Deinterlacer(), None
    assert stream.time_base is not None
    with subject.decoding():
        for packet in container.demux(stream):
            if first_key is None and packet.is_keyframe:
                first_key = packet.pts
            for frame in context.decode(packet if packet.size else None):
                if frame.is_corrupt:
                    raise subject.refused("broken", detail="a frame of it is damaged")
                # Frames before the first whole one refer to what was cut away; decoders make some of them, of grey.
                if first_key is None or frame.pts is None or frame.pts >= first_key:
                    assert stream.time_base is not None
                    yield from fields.push(frame, stream.time_base)
        yield from fields.finish()
