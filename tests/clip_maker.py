"""Clips of numbered cards in any container, codec, timing and colours, and changes to the boxes of an mp4."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np
from sent_pictures import Bytes, card

Setup = Callable[[Any], None]
X264 = {"crf": "1"}
BT709 = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}
STEP = 20  # by so much the white quarter of a frame is darker than that of the frame before it


def numbered(count: int, size: tuple[int, int] = (64, 48)) -> list[Bytes]:
    """Cards that tell which one they are."""
    cards = [card(*size) for _ in range(count)]
    for index, pixels in enumerate(cards):
        pixels[size[1] // 2 :, size[0] // 2 :] -= np.uint8(STEP * index)
    return cards


def clip(
    codec: str = "libx264",
    kind: str = "mp4",
    pix_fmt: str = "yuv444p",
    times: Sequence[int] = range(5),
    *,
    rate: int = 8,
    time_base: Fraction | None = None,
    size: tuple[int, int] = (64, 48),
    tags: dict[str, int] = BT709,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    setup: Setup = lambda stream: None,
    cards: Sequence[Bytes] | None = None,
    coded: dict[str, int] | None = None,
    cover: str = "",
) -> bytes:
    """A clip of numbered cards, shown at these times in units of `time_base` (1/rate).

    tags: what the file says of its colours; coded: how they are, if that is something else.
    """
    file = BytesIO()
    file.name = f"clip.{kind}"
    with av.open(file, "w", format=kind, options=muxer or {}) as container:
        covers = [cover_of(container)] if cover == "first" else []
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        context.time_base = time_base or Fraction(1, rate)
        context.options = options if options is not None else (X264 if codec == "libx264" else {})
        for name, value in tags.items():
            setattr(context, name, value)
        setup(stream)
        covers += [cover_of(container)] if cover == "last" else []
        for pixels, time in zip(cards or numbered(len(times), size), times, strict=True):
            frame = frame_of(pixels, pix_fmt, tags if coded is None else coded)
            frame.pts, frame.time_base = time, context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for one in covers:
            container.mux(one.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 128, np.uint8))))
            container.mux(one.encode())
    return file.getvalue()


def frame_of(pixels: Bytes, pix_fmt: str, tags: dict[str, int] = BT709) -> av.VideoFrame:
    """By formulas of our own (ITU-T H.273, 8.3), so that the reader's are not judged by themselves."""
    if pixels.shape[2] == 4 or not pix_fmt.startswith(("yuv444", "gray")):
        from av.video.reformatter import ColorRange, Colorspace

        spaces = {1: Colorspace.ITU709, 9: Colorspace.BT2020}
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgba" if pixels.shape[2] == 4 else "rgb24")
        space, wide = spaces.get(tags.get("colorspace", 2), Colorspace.ITU601), tags.get("color_range") == 2
        target = ColorRange.JPEG if wide else ColorRange.MPEG
        return frame.reformat(format=pix_fmt, dst_colorspace=space, dst_color_range=target)
    kr, kb = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}.get(
        tags.get("colorspace", 2), (0.299, 0.114)
    )
    r, g, b = np.moveaxis(pixels / 255.0, -1, 0)
    luma = kr * r + (1 - kr - kb) * g + kb * b
    blue, red = (b - luma) / (2 * (1 - kb)), (r - luma) / (2 * (1 - kr))
    bits = 10 if "10" in pix_fmt else 8
    top, step = 2**bits - 1, 2 ** (bits - 8)
    if tags.get("color_range") == 2:
        planes = [top * luma, top * blue + 128 * step, top * red + 128 * step]
    else:
        planes = [step * (219 * luma + 16), step * (224 * blue + 128), step * (224 * red + 128)]
    frame = av.VideoFrame(pixels.shape[1], pixels.shape[0], pix_fmt)
    for plane, values in zip(frame.planes, planes, strict=False):
        whole = np.clip(values.round(), 0, top).astype("<u2" if bits == 10 else np.uint8)
        lines = np.zeros((plane.height, plane.line_size), np.uint8)
        lines[:, : whole.view(np.uint8).shape[1]] = whole.view(np.uint8)
        plane.update(lines)
    return frame


def cover_of(container: Any) -> Any:
    """A stream for a picture that is no clip, of another size and colour."""
    stream = container.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
    stream.codec_context.time_base = Fraction(1, 1)
    stream.disposition = av.stream.Disposition.attached_pic
    return stream


def sound(covered: bool) -> bytes:
    """A file without a clip, with cover art or none."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        cover = cover_of(container) if covered else None
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        tone.sample_rate, tone.pts = 8000, 0
        container.mux([*stream.encode(tone), *stream.encode()])
        if cover:
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 128, np.uint8))
            container.mux([*cover.encode(picture), *cover.encode()])
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------- boxes

HEADERS = {b"stsd": 16, b"avc1": 86, b"hev1": 86, b"dref": 16}
CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")


def boxes(data: bytes, path: Sequence[bytes], start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Return (start, size) of each box on the way to the first one of that path."""
    end = len(data) if end is None else end
    while start < end:
        size, name = struct.unpack_from(">I4s", data, start)
        if name == path[0]:
            inner = start + HEADERS.get(name, 8)
            return [(start, size)] + (boxes(data, path[1:], inner, start + size) if len(path) > 1 else [])
        start += size
    raise KeyError(path)


ENTRY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")


def with_box(data: bytes, path: Sequence[bytes], box: bytes) -> bytes:
    """The index stands at the end of these files, so that no offset changes."""
    way = boxes(data, path)
    at = sum(way[-1])
    changed = bytearray(data[:at] + box + data[at:])
    for start, size in way:
        struct.pack_into(">I", changed, start, size + len(box))
    return bytes(changed)


def patched(data: bytes, path: Sequence[bytes], offset: int, value: bytes) -> bytes:
    """With bytes of a box's content changed."""
    at = boxes(data, path)[-1][0] + 8 + offset
    return data[:at] + value + data[at + len(value) :]


def edited(*edits: tuple[int, int, int], **options: Any) -> bytes:
    """(duration in ms, first time of the medium or -1, rate in 1/65536) in place of the file's own edit list."""
    data = clip(options={**X264, "bf": "0"}, **options)
    start, _ = boxes(data, (b"moov", b"trak", b"edts"))[-1]
    data = data[: start + 4] + b"free" + data[start + 8 :]
    content = struct.pack(">II", 0, len(edits)) + b"".join(struct.pack(">IiI", *edit) for edit in edits)
    elst = struct.pack(">I4s", 8 + len(content), b"elst") + content
    return with_box(data, (b"moov", b"trak"), struct.pack(">I4s", 8 + len(elst), b"edts") + elst)


def clap(width: int, height: int, x: int, y: int) -> bytes:
    return struct.pack(">I4s4I4i", 40, b"clap", width, 1, height, 1, x, 1, y, 1)


def with_brand(major: bytes, *compatible: bytes) -> bytes:
    box = struct.pack(">I4s4sI", 16 + 4 * len(compatible), b"ftyp", major, 512) + b"".join(compatible)
    data = clip(muxer={"movflags": "frag_keyframe+empty_moov+default_base_moof"})  # whose offsets are relative
    return box + data[int.from_bytes(data[:4]) :]


def matrix(*values: float) -> Setup:
    a, b, c, d = (round(value * 65536) for value in values)
    return lambda stream: stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 2**30])


def shaped(width: int, height: int) -> Setup:
    return lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", Fraction(width, height))


def two_tracks(default: int) -> bytes:
    """Two clips in a file, of which one is switched on; the other is dark."""
    file = BytesIO()
    with av.open(file, "w", format="mov") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in range(2)]
        for index, stream in enumerate(streams):
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
            stream.codec_context.options = X264
            stream.disposition = av.stream.Disposition.default if index == default else av.stream.Disposition(0)
        for index, stream in enumerate(streams):
            for time, pixels in enumerate(numbered(5)):
                frame = frame_of(pixels if index == default else np.zeros_like(pixels), "yuv444p", {})
                frame.pts, frame.time_base = time, Fraction(1, 8)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return file.getvalue()


def resized() -> bytes:
    """A clip whose frames grow."""
    file = BytesIO()
    with av.open(file, "w", format="webm") as copy:
        stream, time = None, 0
        for size in ((64, 48), (96, 64)):
            with av.open(BytesIO(clip("libvpx", "webm", "yuv420p", size=size))) as source:
                stream = stream or copy.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream, packet.pts, packet.dts = stream, time, time
                        time += 125
                        copy.mux(packet)
    return file.getvalue()


def from_the_second_key_on() -> bytes:
    """Cut without decoding anew: frames before the key in time, after it in the file, refer to what is gone."""
    options = {"x265-params": "log-level=0:qp=4:keyint=4:min-keyint=4:bframes=2:b-adapt=0:open-gop=1:scenecut=0"}
    file = BytesIO()
    whole = BytesIO(clip("libx265", "matroska", "yuv420p", range(9), options=options))
    with av.open(whole) as source, av.open(file, "w", format="matroska") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        second = [index for index, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second:]:
            packet.stream = stream
            copy.mux(packet)
    return file.getvalue()


def combed(height: int = 64) -> list[Bytes]:
    """A bar that moves by a field: even lines are half a frame older than odd ones."""
    frames = []
    for index in range(5):
        pixels = np.zeros((height, 96, 3), np.uint8)
        for field in (0, 1):
            start = 8 + 12 * index + 6 * field
            pixels[field::2, start : start + 12] = 220
        frames.append(pixels)
    return frames


def pq(pixels: Bytes, white: float) -> Bytes:
    """Coded by SMPTE ST 2084, SDR's white at so many cd/m2; BT.1886 decodes SDR."""
    light = (pixels / 255.0) ** 2.4 * white / 10_000
    root = light**0.1593017578125
    return 255 * ((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root)) ** 78.84375


def without_ftyp() -> bytes:
    """As QuickTime wrote before there were brands: `wide`, `mdat`, and the index at the end."""
    data = clip(kind="mov")
    size = int.from_bytes(data[:4])
    return struct.pack(">I4s", size, b"wide") + data[8:]


def dolby_vision() -> bytes:
    """A track that is Dolby Vision alone, by its sample entry."""
    data = clip("libx265", options={"x265-params": "log-level=0"})
    assert data.count(b"hev1") == 1
    return data.replace(b"hev1", b"dvh1")


def in_hdr(transfer: int, white: float = 100.0) -> bytes:
    """A grey of 220 whose SDR white is at so many cd/m2."""
    cards = [np.full((48, 64, 3), 220, np.uint8)] * 5
    coded = {16: pq, 18: hlg}[transfer]
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1}
    options = {"x265-params": "log-level=0:qp=4"}
    return clip(
        "libx265", pix_fmt="yuv444p10le", tags=tags, options=options, cards=[coded(one, white) for one in cards]
    )


def hlg(pixels: Bytes, white: float) -> Bytes:
    """Coded by ITU-R BT.2100 for a display of 1000 cd/m2; grey alone."""
    scene = ((pixels / 255.0) ** 2.4 * white / 1000) ** (1 / 1.2)
    coded = np.where(scene <= 1 / 12, (3 * scene) ** 0.5, 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073)
    return 255 * coded
