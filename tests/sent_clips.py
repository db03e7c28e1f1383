"""Clips as people send them: kinds that the books of ISO media and Matroska know, and how each is shown or refused."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from clip_maker import (
    BT709,
    ENTRY,
    X264,
    clap,
    clip,
    dolby_vision,
    edited,
    from_the_second_key_on,
    in_hdr,
    matrix,
    patched,
    resized,
    shaped,
    sound,
    two_tracks,
    with_box,
    with_brand,
    without_ftyp,
)
from sent_pictures import CORNERS, GREYS, LEFT_IS_BLACK, OF_P3, Sent, clear_left, grey_card, turned


@dataclass(frozen=True)
class SentClip(Sent):  # type: ignore[misc]
    """A clip, and which of its frames are shown at which rate."""

    tolerance: int = 2
    order: tuple[int, ...] = (0, 1, 2, 3, 4)
    fps: float = 8.0


def tagged(**tags: int) -> dict[str, int]:
    return BT709 | tags


half_clear = np.array(clear_left("RGBA"))
grey_rgb = np.repeat(grey_card()[..., None], 3, 2)
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
ENCRYPTED = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "01" * 16}
TICKS = 2048  # of the medium, between two frames of 8 a second
VPX = {"crf": "4", "b": "0"}
X265 = {"x265-params": "log-level=0:qp=4"}
A, B, C, D = CORNERS


def in_brand(major: bytes, *compatible: bytes) -> SentClip:
    return SentClip(lambda: with_brand(major, *compatible))


def in_matrix(number: int) -> SentClip:
    return SentClip(lambda: clip(tags=tagged(colorspace=number)))


CLIPS: dict[str, SentClip] = {
    # how a frame is shown
    "plain": SentClip(clip),
    "turned_90": SentClip(lambda: clip(setup=matrix(0, 1, -1, 0)), *turned(6)),
    "turned_180": SentClip(lambda: clip(setup=matrix(-1, 0, 0, -1)), *turned(3)),
    "turned_270": SentClip(lambda: clip(setup=matrix(0, -1, 1, 0)), *turned(8)),
    "mirrored": SentClip(lambda: clip(setup=matrix(-1, 0, 0, 1)), *turned(2)),
    "mirrored_down": SentClip(lambda: clip(setup=matrix(1, 0, 0, -1)), *turned(4)),
    "mirrored_and_turned": SentClip(lambda: clip(setup=matrix(0, 1, 1, 0)), *turned(5)),
    "turned_45": SentClip(lambda: clip(setup=matrix(0.7, 0.7, -0.7, 0.7)), refused="turned", got="45 degrees"),
    "wide_pixels": SentClip(lambda: clip(setup=shaped(2, 1)), (128, 48)),
    "high_pixels": SentClip(lambda: clip(setup=shaped(1, 2)), (64, 96)),
    "wide_pixels_turned": SentClip(
        lambda: clip(setup=lambda stream: (shaped(2, 1)(stream), matrix(0, 1, -1, 0)(stream))), (48, 128), (C, A, D, B)
    ),
    "pixels_of_nothing": SentClip(lambda: clip(setup=shaped(9, 1)), refused="aspect", got="9:1"),
    "track_wider_than_stored": SentClip(
        lambda: patched(clip(), (b"moov", b"trak", b"tkhd"), 76, struct.pack(">II", 128 << 16, 48 << 16)), (128, 48)
    ),
    "aperture": SentClip(lambda: with_box(clip(), ENTRY, clap(32, 24, 0, 0)), (32, 24)),
    "aperture_off_the_middle": SentClip(
        lambda: with_box(clip(), ENTRY, clap(32, 24, -16, -12)), (32, 24), (A,) * 4, order=()
    ),
    "odd_size": SentClip(lambda: clip(size=(65, 49)), (65, 49)),
    "grows": SentClip(resized, refused="resized", got="96x64"),
    # which stream
    "cover_first": SentClip(lambda: clip(cover="first")),
    "cover_last": SentClip(lambda: clip(cover="last")),
    "first_of_two_tracks": SentClip(lambda: two_tracks(0)),
    "second_of_two_tracks": SentClip(lambda: two_tracks(1)),
    "sound": SentClip(lambda: sound(covered=False), refused="picture"),
    "sound_with_cover": SentClip(lambda: sound(covered=True), refused="picture"),
    # when a frame is shown
    "gap": SentClip(lambda: clip(times=[0, 1, 2, 5, 6]), order=(0, 1, 2, 2, 2, 3, 4)),
    "one_frame_dropped": SentClip(lambda: clip(times=[0, 1, 2, 3, 5, 6]), order=(0, 1, 2, 3, 3, 4, 5)),
    "jitter": SentClip(lambda: clip(times=[0, 9, 21, 29, 40], time_base=Fraction(1, 80)), fps=8.0),
    "milliseconds": SentClip(
        lambda: clip(kind="matroska", times=[0, 42, 83, 125, 167], time_base=Fraction(1, 1000), rate=24), fps=24.0
    ),
    "one_frame": SentClip(lambda: clip(times=[0]), order=(0,)),
    "fragments": SentClip(lambda: clip(muxer=FRAGMENTED)),
    "trimmed_at_the_start": SentClip(
        lambda: edited((375, 2 * TICKS, 1 << 16)), corners=(A, B, C, (180,) * 3), order=(2, 3, 4)
    ),
    "trimmed_at_the_end": SentClip(lambda: edited((375, 0, 1 << 16)), order=(0, 1, 2)),
    "starts_late": SentClip(lambda: edited((500, -1, 1 << 16), (625, 0, 1 << 16))),
    "shown_twice": SentClip(lambda: edited((625, 0, 1 << 16), (625, 0, 1 << 16)), order=(0, 1, 2, 3, 4) * 2),
    "held_by_an_edit": SentClip(lambda: edited((500, 0, 0), (625, 0, 1 << 16)), refused="speed"),
    "slowed_by_an_edit": SentClip(lambda: edited((1250, 0, 1 << 15)), refused="speed"),
    "cut_between_keys": SentClip(
        from_the_second_key_on, corners=(A, B, C, (140,) * 3), order=(4, 5, 6, 7, 8), tolerance=3
    ),
    # colours
    "full_range": SentClip(lambda: clip(tags=tagged(color_range=2))),
    **{f"matrix_{number}": in_matrix(number) for number in (1, 4, 5, 6, 7, 9)},
    "untagged_sd": SentClip(lambda: clip(tags={})),
    "untagged_hd": SentClip(lambda: clip(times=[0], size=(1280, 720), tags={}, coded=BT709), (1280, 720), order=(0,)),
    "matrix_ycgco": SentClip(lambda: clip(tags=tagged(colorspace=8)), refused="matrix", got="YCgCo"),
    "rgb": SentClip(lambda: clip("libx264rgb", pix_fmt="rgb24", tags={"colorspace": 0}, options=X264)),
    "grey": SentClip(lambda: clip(pix_fmt="gray", tags={}, cards=[grey_rgb] * 5), corners=GREYS, order=()),
    "ten_bits": SentClip(lambda: clip("libx265", pix_fmt="yuv444p10le", options=X265)),
    "p3": SentClip(lambda: clip(tags=tagged(color_primaries=12)), corners=OF_P3, order=()),
    "pq": SentClip(lambda: in_hdr(16), corners=((200,) * 3,) * 4, order=()),
    "hlg": SentClip(lambda: in_hdr(18), corners=((200,) * 3,) * 4, order=()),
    "pq_white_at_203": SentClip(lambda: in_hdr(16, 203), corners=((227,) * 3,) * 4, order=()),
    "linear_light": SentClip(lambda: clip(tags=tagged(color_trc=8)), refused="transfer", got="linear light"),
    "alpha_vp9": SentClip(
        lambda: clip("libvpx-vp9", "webm", "yuva420p", cards=[half_clear] * 5), corners=LEFT_IS_BLACK, order=()
    ),
    "alpha_prores": SentClip(
        lambda: clip("prores_ks", "mov", "yuva444p10le", cards=[half_clear] * 5), corners=LEFT_IS_BLACK, order=()
    ),
    # codecs and containers
    "hevc": SentClip(lambda: clip("libx265", pix_fmt="yuv420p", options=X265)),
    "vp8_webm": SentClip(
        lambda: clip("libvpx", "webm", "yuv420p", tags={}, options={"crf": "4", "b": "4M"}), tolerance=4
    ),
    "vp9_webm": SentClip(lambda: clip("libvpx-vp9", "webm", "yuv420p", options=VPX)),
    "vp9_mp4": SentClip(lambda: clip("libvpx-vp9", "mp4", "yuv420p", options=VPX)),
    "mpeg4": SentClip(lambda: clip("mpeg4", "mp4", "yuv420p", options={"q": "2"}), tolerance=6),
    "prores": SentClip(lambda: clip("prores_ks", "mov", "yuv422p10le")),
    "mkv": SentClip(lambda: clip(kind="matroska")),
    "mov": SentClip(lambda: clip(kind="mov")),
    "quicktime_without_ftyp": SentClip(without_ftyp),
    "motion_jpeg": SentClip(lambda: clip("mjpeg", "mov", "yuvj420p"), refused="codec", got="mjpeg"),
    "encrypted": SentClip(lambda: clip(muxer=ENCRYPTED), refused="encrypted"),
    "dolby_vision_alone": SentClip(dolby_vision, refused="transfer", got="Dolby Vision"),
    # brands
    "brand_xavc": in_brand(b"XAVC", b"XAVC", b"mp42", b"iso2"),
    "brand_msnv": in_brand(b"MSNV", b"MSNV", b"mp42", b"isom"),
    "brand_f4v": in_brand(b"f4v ", b"isom", b"mp42", b"m4v "),
    "brand_m4vh": in_brand(b"M4VH", b"M4V ", b"M4A ", b"mp42", b"isom"),
    "brand_cmfc": in_brand(b"cmfc", b"iso6", b"cmfc"),
    "brand_msdh": in_brand(b"msdh", b"msdh", b"msix"),
    "brand_3gp": in_brand(b"3gp5", b"isom", b"3gp4"),
    "brand_unknown_beside_isom": in_brand(b"zzzz", b"isom"),
    "brand_unknown": SentClip(lambda: with_brand(b"zzzz", b"yyyy"), refused="kind"),
    "brand_heic": SentClip(lambda: with_brand(b"heic", b"mif1", b"heic"), refused="kind", got="HEIC"),
    "brand_avif_animation": SentClip(
        lambda: with_brand(b"avis", b"avis", b"msf1", b"iso8"), refused="kind", got="AVIF"
    ),
}
