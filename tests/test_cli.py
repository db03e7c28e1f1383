"""The command line: what is asked of the engine, what is printed, exit codes, and that nothing half-made is left."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from command import Command, FakeEngine, command_in
from PIL import Image

import skylapse
from skylapse.runtime.core.request import ModelDefaults, ModelLimits, VideoRequest
from skylapse.runtime.media.writer import write_video


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return command_in(tmp_path, capsys, monkeypatch)


# --------------------------------------------------------------------------------------------------------- generate


def test_prompt_becomes_out_mp4(command: Command) -> None:
    result = command("generate", "a red circle")
    assert (result.status, result.stdout, result.files) == (0, "out.mp4\n", ["out.mp4"])
    assert command.engine.loaded == [
        {"name": "demo", "device": None, "dtype": None, "cache_dir": None, "quantize": None, "offload": None}
    ]
    assert command.engine.requests[0].size == (64, 48, 9)


def test_every_option_reaches_the_engine(command: Command) -> None:
    Image.new("RGB", (32, 32)).save("first.png")
    write_video("in.mp4", np.zeros((13, 64, 96, 3), np.uint8), fps=8)
    result = command(
        *("generate", "a red circle", "-o", "a.webp", "--sheet", "b.png", "--model", "org/model", "--size", "96x64"),
        *("--frames", "13", "--fps", "10", "--steps", "5", "--guidance", "3.5", "--guidance-2", "2", "--seed", "7"),
        *("--negative", "blur", "--solver", "euler", "--shift", "5", "--image", "first.png"),
        *("--device", "cpu", "--dtype", "bf16", "--cache", "easy:0.1", "--last-image", "first.png"),
        *("--video", "in.mp4", "--strength", "0.6", "--quantize", "int8", "--offload", "none"),
    )
    assert (result.status, result.stdout) == (0, "a.webp\nb.png\n")
    assert result.files == ["a.webp", "b.png", "first.png", "in.mp4"]
    loaded = {"name": "org/model", "device": "cpu", "dtype": "bf16", "cache_dir": None, "quantize": "int8"}
    loaded["offload"] = "none"
    assert command.engine.loaded == [loaded]
    assert command.engine.requests == [
        VideoRequest(
            prompt="a red circle", negative_prompt="blur", width=96, height=64, num_frames=13, fps=10, seed=7,
            num_inference_steps=5, guidance_scale=3.5, guidance_scale_2=2, solver="euler", shift=5, image="first.png",
            cache="easy:0.1", last_image="first.png", video="in.mp4", strength=0.6,
        )
    ]  # fmt: skip


def test_json_is_one_object_with_what_was_made_and_what_it_cost(command: Command) -> None:
    result = command("generate", "a red circle", "-o", "a.mp4", "--seed", "7", "--json")
    summary = json.loads(result.stdout)
    timings_s, peak = summary.pop("timings_s"), summary.pop("peak_memory_bytes")
    assert summary == {
        "output": "a.mp4",
        "sheet": None,
        "model": "demo",
        "device": "cpu",
        "dtype": "float32",
        "quantize": None,
        "prompt": "a red circle",
        "negative_prompt": "",
        "seed": 7,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "guidance_scale_2": None,
        "solver": "unipc",
        "shift": 3.0,
        "cache": "none",
        "caching": None,
        "image": None,
        "last_image": None,
        "video": None,
        "strength": None,
        "width": 64,
        "height": 48,
        "num_frames": 9,
        "fps": 8,
        "duration_s": 1.125,
        "peak_device_bytes": None,
        "cut_tokens": {"negative_prompt": 3},
        "lossy_kernels": [],
    }
    assert list(timings_s) == ["load", "denoise", "decode", "write"]
    assert peak > 10 * 2**20


def test_progress_is_told_in_lines_on_stderr_when_it_is_no_terminal(command: Command) -> None:
    assert command("generate", "a red circle").stderr.splitlines() == [
        "skylapse: loading demo",
        "skylapse: reading the prompt",
        "skylapse: denoising, step 1 of 3",
        "skylapse: denoising, step 2 of 3",
        "skylapse: denoising, step 3 of 3",
        "skylapse: decoding",
        "skylapse: writing out.mp4",
    ]


def test_many_steps_are_told_in_tenths(command: Command) -> None:
    assert command("generate", "a red circle", "--steps", "1000").stderr.count("denoising") == 11


def test_progress_is_a_bar_on_a_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    result = command("generate", "a red circle", "-o", "out[1].mp4")
    assert (result.status, result.stdout) == (0, "out[1].mp4\n")
    assert "writing out[1].mp4" in result.stderr
    assert "skylapse:" not in result.stderr


@pytest.mark.parametrize(
    ("seconds", "num_frames"), [("1", 9), ("2", 17), ("2.125", 17), ("2.13", 21), ("0.01", 1), ("10.125", 81)]
)
def test_seconds_are_the_fewest_frames_that_last_so_long(command: Command, seconds: str, num_frames: int) -> None:
    command("generate", "a red circle", "--seconds", seconds)
    assert command.engine.requests[0].num_frames == num_frames


def test_seconds_count_at_the_asked_frame_rate(command: Command) -> None:
    command("generate", "a red circle", "--seconds", "1.1", "--fps", "10")
    assert command.engine.requests[0].num_frames == 13


def test_a_clip_made_of_a_video_is_as_long_as_it(command: Command) -> None:
    write_video("in.mp4", np.zeros((13, 48, 64, 3), np.uint8), fps=8)
    command("generate", "a red circle", "--video", "in.mp4", "--strength", "0.6")
    command("generate", "a red circle", "--video", "in.mp4")  # goes on from it: as long as the model's clips are
    assert [request.num_frames for request in command.engine.requests] == [13, 9]


# ------------------------------------------------------------------------------------------------ mistakes, failures

MISTAKES = {
    "no prompt": ([], "PROMPT is missing"),
    "empty prompt": ([""], "prompt must not be empty, got ''"),
    "long prompt": (["x" * 10_001], "prompt must have at most 10000 characters, got 10001"),
    "prompt that is no UTF-8": (["caf\udce9"], "prompt must be valid Unicode, got a broken character at 3"),
    "unknown option": (["a", "--step", "3"], "there is no option --step; did you mean --steps?"),
    "frames not 4k+1": (["a", "--frames", "16"], "num_frames must be 4k+1 for this model, got 16 (nearest: 13 or 17)"),
    "frames beyond": (["a", "--frames", "82"], "num_frames must be 4k+1 for this model, got 82 (nearest: 81)"),
    "frames of a model on a hub": (["a", "--frames", "16", "--model", "a/b"], "num_frames must be 4k+1, got 16"),
    "no frames": (["a", "--frames", "0"], "num_frames must be from 1 to 1025, got 0"),
    "frames no number": (["a", "--frames", "many"], "--frames must be a whole number, got 'many'"),
    "frames and seconds": (["a", "--frames", "5", "--seconds", "1"], "--seconds and --frames exclude each other"),
    "half a size": (["a", "--size", "64"], "--size must be WIDTHxHEIGHT, for example 64x64, got '64'"),
    "size multiple": (
        ["a", "--size", "63x64"],
        "width must be a multiple of 16 for this model, got 63 (nearest: 48 or 64)",
    ),
    "size on a hub": (
        ["a", "--size", "63x64", "--model", "a/b"],
        "width must be a multiple of 8 (of 32 to suit every model), got 63",
    ),
    "tiny size": (["a", "--size", "8x8"], "width must be from 16 to 4096, got 8"),
    "no steps": (["a", "--steps", "0"], "num_inference_steps must be from 1 to 1000, got 0"),
    "guidance NaN": (["a", "--guidance", "nan"], "guidance_scale must be from 0 to 100, got nan"),
    "guidance inf": (["a", "--guidance", "inf"], "guidance_scale must be from 0 to 100, got inf"),
    "shift": (["a", "--shift", "0"], "shift must be above 0 and at most 100, got 0.0"),
    "negative seed": (["a", "--seed=-1"], "seed must be from 0 to 9223372036854775807, got -1"),
    "solver": (["a", "--solver", "ddim"], "--solver must be unipc or euler or dpmpp, got 'ddim'"),
    "fps": (["a", "--fps", "0"], "fps must be from 1 to 120, got 0"),
    "output suffix": (["a", "-o", "a.avi"], "output must end in .mp4 or .webp or .gif or .png, got 'a.avi'"),
    "output folder": (["a", "-o", "no/a.mp4"], "output must be in an existing folder, got 'no/a.mp4'"),
    "sheet suffix": (["a", "--sheet", "b.gif"], "sheet must end in .png, got 'b.gif'"),
    "sheet is output": (["a", "-o", "a.png", "--sheet", "./a.png"], "sheet must not be the output itself"),
    "strength": (["a", "--strength", "0"], "strength must be above 0 and at most 1, got 0.0"),
    "video absent": (["a", "--video", "no.mp4"], "video must be an existing file, got 'no.mp4'"),
    "video unreadable": (["a", "--video", "text.png"], "video 'text.png' must be an mp4, mov, mkv or webm file"),
    "last image absent": (["a", "--last-image", "no.png"], "last_image must be an existing file, got 'no.png'"),
    "last image tiny": (["a", "--last-image", "tiny.png"], "last_image 'tiny.png' must be at least 16x16 pixels"),
    "image absent": (["a", "--image", "no.png"], "image must be an existing file, got 'no.png'"),
    "image unreadable": (["a", "--image", "text.png"], "image 'text.png' must be a PNG, JPEG or WebP file"),
    "image tiny": (["a", "--image", "tiny.png"], "image 'tiny.png' must be at least 16x16 pixels, got 8x8"),
    "image huge": (["a", "--image", "huge.png"], "image 'huge.png' must be at most 8192 pixels on a side, got 9000x16"),
    "size of the model": (["a", "--size", "72x64"], "width must be a multiple of 16 for this model, got 72"),
    "frames of the model": (["a", "--frames", "85"], "num_frames must be at most 81 for this model, got 85"),
    "size near the most pixels": (
        ["a", "--size", "488x136"],
        "width must be a multiple of 16 for this model, got 488 (nearest: 480)",
    ),
    "pixels of the model": (["a", "--size", "512x512"], "width x height must be at most 65536 pixels for this model"),
    "seconds": (["a", "--seconds", "11"], "seconds must be above 0 and at most 10.125 at 8 fps for this model, got 11"),
    "no seconds": (["a", "--seconds", "0"], "seconds must be above 0 and at most 10.125"),
    "seconds NaN": (["a", "--seconds", "nan"], "seconds must be above 0 and at most 10.125"),
}


@pytest.fixture
def bad_images(command: Command) -> None:
    (command.folder / "text.png").write_text("not an image")
    Image.new("1", (8, 8)).save(command.folder / "tiny.png")
    Image.new("1", (9000, 16)).save(command.folder / "huge.png")


@pytest.mark.usefixtures("bad_images")
@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line_with_exit_code_2_and_no_file(command: Command, case: str) -> None:
    arguments, error = MISTAKES[case]
    result = command("generate", *arguments)
    (line,) = result.stderr.splitlines()
    assert result.status == 2
    assert line.startswith("skylapse: error: ")
    assert error in line
    assert command.engine.loaded == [], "told before the weights are read"
    assert (result.stdout, result.files) == ("", ["huge.png", "text.png", "tiny.png"])


@pytest.mark.parametrize("arguments", [["serv"], ["models", "inspect"], ["--vrsion"]], ids=str)
def test_incomplete_or_unknown_command_is_a_mistake(command: Command, arguments: list[str]) -> None:
    result = command(*arguments)
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.startswith("skylapse: error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["models"]], ids=str)
def test_no_command_is_answered_with_the_help(command: Command, arguments: list[str]) -> None:
    result = command(*arguments)
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: skylapse") and "COMMAND" in result.stderr


def test_wrong_environment_is_a_mistake(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYLAPSE_THREADS", "two")
    result = command("generate", "a red circle")
    assert result.status == 2
    assert result.stderr == "skylapse: error: SKYLAPSE_THREADS must be a whole number from 1 to 1024, got 'two'\n"


@pytest.mark.parametrize(
    ("failure", "status", "line"),
    [
        (ValueError("image is\nbroken"), 2, "skylapse: error: image is broken"),
        (
            RuntimeError("out of memory"),
            1,
            "skylapse: failed: RuntimeError: out of memory (SKYLAPSE_DEBUG=1 shows where)",
        ),
        (KeyboardInterrupt(), 130, "skylapse: interrupted"),
    ],
    ids=["mistake", "our failure", "ctrl-c"],
)
def test_failure_between_two_steps_leaves_no_file(
    command: Command, failure: BaseException, status: int, line: str
) -> None:
    command.engine.failure = failure
    result = command("generate", "a red circle", "--sheet", "sheet.png")
    assert (result.status, result.stdout, result.files) == (status, "", [])
    assert result.stderr.splitlines()[-1] == line
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYLAPSE_DEBUG", "1")
    command.engine.failure = RuntimeError("out of memory")
    result = command("generate", "a red circle")
    assert result.status == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("skylapse: failed: RuntimeError: out of memory\n")


def test_version_is_printed(command: Command) -> None:
    assert command("--version").stdout == f"skylapse {skylapse.__version__}\n"


# ----------------------------------------------------------------------------------------------------------- models


@dataclass
class ModelEntry:
    name: str
    description: str
    source: str
    num_bytes: int | None


@dataclass
class ComponentReport:
    name: str
    kind: str
    num_parameters: int
    num_bytes: int
    dtypes: list[str]


@dataclass
class ModelReport:
    name: str
    folder: Path
    components: list[ComponentReport]
    tasks: list[str]
    native_sizes: list[tuple[int, int]]
    defaults: ModelDefaults
    limits: ModelLimits
    loaded_bytes: dict[str, int]
    ignored: dict[str, str]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    component = ComponentReport("transformer", "WanTransformer3DModel", 4_200_000, 16_800_000, ["float32"])
    loaded = {"bf16": 8 * 2**20, "bf16+int8": 4 * 2**20, "fp32": 16 * 2**20, "fp32+int8": 6 * 2**20}
    can_do = ["text-to-video"], [(64, 64)], FakeEngine.defaults, FakeEngine.limits
    report = ModelReport("demo", Path("/demo"), [component], *can_do, loaded, {})
    entries = [ModelEntry("demo", "coloured shapes", "inside the package", 24 * 2**20), ModelEntry("x", "y", "z", None)]
    module = ModuleType("skylapse.runtime.checkpoints.registry")
    module.__dict__.update(list_models=lambda cache_dir: entries, inspect_model=lambda name, cache_dir: report)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_models_are_calibrated_with_what_is_asked(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[VideoRequest, Any]] = []
    module = ModuleType("skylapse.runtime.commands.calibrate")

    def calibrate(engine: FakeEngine, request: VideoRequest, prompts: Any, report: Any) -> Path:
        asked.append((request, prompts))
        report("measuring")
        return Path("cache.json")

    module.__dict__.update(calibrate=calibrate, PROMPTS=("a star",))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    result = command("models", "calibrate", "demo", "--steps", "20", "--solver", "euler")
    assert (result.status, result.stdout, result.stderr) == (0, "cache.json\n", "skylapse: measuring\n")
    assert asked == [(VideoRequest(prompt="calibration", num_inference_steps=20, solver="euler"), ("a star",))]
    assert json.loads(command("models", "calibrate", "demo", "--prompt", "a box", "--json").stdout) == {
        "output": "cache.json"
    }
    assert asked[1][1] == ["a box"]


@pytest.mark.usefixtures("registry")
def test_models_are_listed_with_their_sizes(command: Command) -> None:
    result = command("models", "list")
    assert result.status == 0
    assert "demo   coloured shapes  inside the package  24.0 MiB" in result.stdout
    entries = json.loads(command("models", "list", "--json").stdout)
    assert [entry["num_bytes"] for entry in entries] == [24 * 2**20, None]


@pytest.mark.usefixtures("registry")
def test_inspection_shows_components_tasks_and_limits(command: Command) -> None:
    lines = command("models", "inspect", "demo").stdout.splitlines()
    assert lines[0] == "demo  (/demo)"
    assert lines[3].split() == ["transformer", "WanTransformer3DModel", "4,200,000", "16.0", "MiB", "float32"]
    assert lines[5:] == [
        "can do    text-to-video",
        "sizes     64x64; multiples of 16 up to 65,536 pixels",
        "frames    9 at 8 fps; up to 81",
        "weights   8.0 MiB in bf16 (4.0 MiB with --quantize), 16.0 MiB in fp32 (6.0 MiB with --quantize)",
        "sampling  3 steps, guidance 4",
    ]
    report = json.loads(command("models", "inspect", "demo", "--json").stdout)
    assert (report["folder"], report["limits"]["size_multiple"]) == ("/demo", 16)
