"""Tell kinds of files by their first bytes: names and media types are the sender's word."""

from __future__ import annotations

from typing import BinaryIO

PICTURES = ("PNG", "JPEG", "WebP")
CLIPS = ("MP4", "Matroska")
HEAD_BYTES = 4096  # an `ftyp` box with more brands than this holds is none

# ISO base media files (ISO/IEC 14496-12). What they are is said by the major brand and the compatible ones together:
# cameras and packagers have major brands of their own (XAVC, MSNV, `f4v `, M4VH, cmfc, msdh) beside isom or mp42.
CLIP_BRANDS = {
    *(b"iso" + bytes([digit]) for digit in b"m23456789abc"),
    *(b"mp41", b"mp42", b"avc1", b"hvc1", b"M4V ", b"M4VH", b"M4VP", b"qt  ", b"mqt ", b"XAVC", b"MSNV", b"mmp4"),
    *(b"dash", b"cmfc", b"cmfs", b"cmff", b"cmfl", b"msdh", b"msix", b"hlsf", b"f4v ", b"F4V ", b"F4P ", b"NDSC"),
    *(b"3gp" + bytes([digit]) for digit in b"456789"),
    *(b"3g2" + bytes([digit]) for digit in b"abc"),
    *(b"3gr6", b"3gs6", b"3ge6", b"3gg6", b"av01", b"vp09"),
}
# Pictures in the same boxes, which FFmpeg would open, too; an AVIF animation has iso8 among its compatible brands.
PICTURE_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"crx ": "Canon RAW", b"jxl ": "JPEG XL", b"jp2 ": "JPEG 2000"}
PICTURE_BRANDS |= {
    brand: "HEIC"
    for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1")
}
OLD_QUICKTIME = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp")  # files without a `ftyp` begin so

OTHERS = {  # what people send besides, so that the refusal can name it
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "a Photoshop file",
    b"%PDF": "PDF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"<svg": "SVG",
    b"OggS": "Ogg",
    b"FLV": "FLV",
    b"\0\0\x01\xba": "MPEG-PS",
    b"G@": "MPEG-TS",
    b"0&\xb2u": "WMV",
    b"PK\3\4": "ZIP",
}


def kind_of(file: BinaryIO) -> str:
    """Return a file's kind: a name in PICTURES or CLIPS, that of another known kind, or ""; leaves `file` at 0."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"RIFF"):
        return {b"WEBP": "WebP", b"AVI ": "AVI"}.get(head[8:12], "")
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "Matroska"
    if head[4:8] == b"ftyp":
        return _by_brands(head)
    if head[4:8] in OLD_QUICKTIME:
        return "MP4"
    return next((name for start, name in OTHERS.items() if head.startswith(start)), "")


def _by_brands(head: bytes) -> str:
    end, major = int.from_bytes(head[:4]), head[8:12]
    if major in PICTURE_BRANDS:
        return PICTURE_BRANDS[major]
    brands = {major, *(head[start : start + 4] for start in range(16, min(end, len(head)) - 3, 4))}
    if brands & CLIP_BRANDS:
        return "MP4"
    return next((name for brand, name in PICTURE_BRANDS.items() if brand in brands), "")
