"""The service's decoder, confined, reads every kind of file as the command line does, or refuses it alike."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sent_clips import CLIPS
from sent_pictures import PICTURES

from skylapse.runtime.media.clips import read_frames
from skylapse.runtime.media.pictures import read_image
from skylapse.serve.intake import media
from skylapse.serve.intake.media import decode_image, decode_video, measure_video
from skylapse.serve.wire.errors import ApiError

# One process for all of them: what one kind needs to load and another has loaded before would hide in none of two.
PROGRAM = """
import json, sys
from dataclasses import replace
from skylapse.serve.intake.media_worker import Refused, Task, confine, decode_clip, decode_picture, load_all

load_all()
bounds = dict(max_pixels=10**7, max_source_frames=1000, max_frames=100, max_cpu_s=100, max_memory_bytes=2**31)
tasks = [Task(source=name, output=name + ".out", **task, **bounds) for name, task in json.loads(sys.argv[1]).items()]
files = [(open(task.source, "rb"), open(task.output, "wb")) for task in tasks]
loaded = {*sys.modules}
confine(replace(tasks[0], width=4096, height=4096, max_frames=10))
answers = {}
for task, (source, output) in zip(tasks, files):
    try:
        answers[task.source] = (decode_picture if task.medium == "picture" else decode_clip)(source, output, task)
    except Refused as refused:
        answers[task.source] = [refused.word, refused.got]
    except BaseException as error:
        answers[task.source] = repr(error)
    output.close()
print(json.dumps({"answers": answers, "loaded": sorted({*sys.modules} - loaded)}))
"""


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder of the files, what was answered for each, and modules that had not been loaded before."""
    folder = tmp_path_factory.mktemp("sent")
    tasks = {}
    for medium, kinds in (("picture", PICTURES), ("clip", CLIPS)):
        for name, sent in kinds.items():
            (folder / f"{medium}-{name}").write_bytes(sent.make())
            tasks[f"{medium}-{name}"] = {"medium": medium, "width": sent.size[0], "height": sent.size[1]}
    command = [sys.executable, "-Wignore", "-Ic", PROGRAM, json.dumps(tasks)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=media._ENVIRONMENT)
    told = json.loads(done.stdout)
    return folder, told["answers"], told["loaded"]


def test_nothing_is_loaded_once_the_decoder_is_confined(confined: tuple[Path, dict[str, Any], list[str]]) -> None:
    assert confined[2] == []


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_command_lines(name: str, confined: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, answers, _ = confined
    sent, path = PICTURES[name], folder / f"picture-{name}"
    if sent.refused:
        assert answers[path.name] == [sent.refused, sent.got]
    else:
        assert answers[path.name] == {"width": sent.size[0], "height": sent.size[1], "frames": 1, "fps": 1.0}
        decoded = np.asarray(Image.open(f"{path}.out"))
        assert np.array_equal(decoded, read_image(path, *sent.size))


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_the_command_lines(name: str, confined: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, answers, _ = confined
    sent, path = CLIPS[name], folder / f"clip-{name}"
    if sent.refused:
        assert answers[path.name] == [sent.refused, sent.got]
        return
    frames = np.stack([*read_frames(path, sent.size[0], sent.size[1], max_frames=100)])
    told = answers[path.name]
    assert (told["width"], told["height"], told["frames"]) == (*sent.size, len(frames))
    assert told["fps"] == pytest.approx(sent.fps, rel=0.03)
    assert np.array_equal(np.load(f"{path}.out"), frames)


def test_what_the_service_says_is_what_the_command_line_says(tmp_path: Path) -> None:
    for kinds, name, decode in (
        (PICTURES, "heic", lambda path: decode_image(path, 64, 48)),
        (PICTURES, "png_cicp_pq", lambda path: decode_image(path, 64, 48)),
        (CLIPS, "turned_45", lambda path: measure_video(path)),
        (CLIPS, "encrypted", lambda path: decode_video(path, 64, 48, max_frames=9, keep="first")),
    ):
        path = tmp_path / name
        path.write_bytes(kinds[name].make())
        with pytest.raises(ApiError) as caught:
            asyncio.run(decode(path))
        with pytest.raises(ValueError) as by_hand:
            read_image(path, 64, 48) if kinds is PICTURES else [*read_frames(path, 64, 48, 9)]
        param = "input_reference" if kinds is PICTURES else "video"
        said = str(by_hand.value).partition(f"{name!r} ")[2]
        assert (caught.value.status, caught.value.message) == (400, f"Invalid '{param}': {said}.")


def test_a_clip_is_given_at_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "sent"
    path.write_bytes(CLIPS["gap"].make())
    found = asyncio.run(measure_video(path, fps=16))
    assert (found.width, found.height, found.frames, found.fps) == (64, 48, 14, 16.0)
    decoded = asyncio.run(decode_video(path, 64, 48, max_frames=found.frames, keep="first", fps=16))
    shades = np.load(decoded.frames_path)[:, 36, 48, 0].astype(int)
    assert ((220 - shades) / 20).round().astype(int).tolist() == [0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4]
