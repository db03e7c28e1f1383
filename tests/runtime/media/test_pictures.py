"""Pictures as people send them are shown as their files say, or refused by name."""

from __future__ import annotations

import errno
from pathlib import Path

import av
import numpy as np
import pytest
from sent_pictures import PICTURES, Sent

from skylapse.runtime.media.pictures import check_image, picture_of, read_image
from skylapse.runtime.media.refusal import PICTURE_BOUNDS, Refused, Subject


def corners_of(pixels: np.ndarray) -> np.ndarray:
    """The middles of the four quarters."""
    height, width = pixels.shape[:2]
    y, x = [height // 4, height // 4, -height // 4, -height // 4], [width // 4, -width // 4, width // 4, -width // 4]
    return pixels[y, x].astype(int)


def check(pixels: np.ndarray, sent: Sent) -> None:
    assert pixels.shape == (*sent.size[::-1], 3)
    assert np.abs(corners_of(pixels) - sent.corners).max() <= sent.tolerance, corners_of(pixels).tolist()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says it beside the picture
@pytest.mark.parametrize("name", [name for name, sent in PICTURES.items() if not sent.refused])
def test_a_picture_is_read_as_it_is_shown(name: str, tmp_path: Path) -> None:
    sent, path = PICTURES[name], tmp_path / "sent"
    path.write_bytes(sent.make())
    with path.open("rb") as file:
        check(np.asarray(picture_of(file, "image")), sent)
    check_image(path)
    check(read_image(path, *sent.size), sent)


@pytest.mark.parametrize("name", [name for name, sent in PICTURES.items() if sent.refused])
def test_a_picture_that_could_not_be_shown_is_refused_by_name(name: str, tmp_path: Path) -> None:
    sent, path = PICTURES[name], tmp_path / "sent"
    path.write_bytes(sent.make())
    with pytest.raises(Refused) as caught:
        read_image(path, *sent.size)
    assert (caught.value.word, caught.value.got) == (sent.refused, sent.got)
    assert str(caught.value).startswith("image 'sent' must ") and str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError("image file is truncated"), "broken"),
        (SyntaxError("broken PNG file"), "broken"),
        (av.error.PatchWelcomeError(-0x45574150, "Not yet implemented"), "broken"),
        (av.error.InvalidDataError(-0x41444E49, "Invalid data"), "broken"),
        (MemoryError(), "costly"),
        (av.error.FFmpegError(errno.ENOMEM, "Cannot allocate memory"), "costly"),
        (OSError("out of memory error when reading image file"), "costly"),
        (OSError(errno.EMFILE, "Too many open files"), ""),
        (OSError(errno.EIO, "Input/output error"), ""),
        (av.error.FFmpegError(errno.EMFILE, "Too many open files"), ""),
        (ModuleNotFoundError("No module named 'PIL.ImageCms'"), ""),
        (AttributeError("a mistake of ours"), ""),
    ],
    ids=repr,
)
def test_a_failure_is_the_files_or_ours(error: Exception, word: str) -> None:
    subject = Subject("image", "picture", PICTURE_BOUNDS)
    with pytest.raises(Refused if word else type(error)) as caught, subject.decoding():
        raise error
    assert caught.value is error if not word else getattr(caught.value, "word", None) == word
