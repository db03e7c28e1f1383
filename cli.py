"""The command line: skylapse generate | models | compile | serve | keys | jobs | store | kernels | bench."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any, Protocol

from . import __version__
from .runtime.commands.models import add_models
from .runtime.commands.options import Parser, add_device, add_sampling, sampling
from .runtime.core.config import Settings, load_settings, misspelt, settle_home
from .runtime.core.request import MAX_SIDE, MIN_SIDE, VideoRequest, check_shape, frames_for, longest_seconds

if TYPE_CHECKING:  # whatever is heavy is imported by the command that needs it: --help takes a tenth of a second
    from rich.progress import Progress as RichProgress

    from .runtime.checkpoints.registry import ModelFolder
    from .runtime.core.request import ModelDefaults, ModelLimits, Video
    from .runtime.engine.engine import Engine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 for our failures, 2 for the user's mistakes, 130 after Ctrl-C."""
    debug = False
    try:
        if (told := settle_home()) is not None:
            print(f"skylapse: {told}", file=sys.stderr)
        settings = load_settings()
        for line in misspelt():
            print(f"skylapse: {line}", file=sys.stderr)
        debug = settings.debug
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="skylapse: %(message)s")
        arguments = sys.argv[1:] if arguments is None else arguments
        if arguments and arguments[0] in ELSEWHERE:
            status = _hand_over(arguments[0], arguments[1:], settings)
        else:
            options = _parser().parse_args(arguments)
            status = options.run(options, settings)
        sys.stdout.flush()  # here, where a reader that has gone is told from an error
        return status
    except KeyboardInterrupt:
        print("skylapse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `skylapse models list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        return 1
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return _report(error, "error", 2, debug)
    except Exception as error:
        hint = "" if debug else " (SKYLAPSE_DEBUG=1 shows where)"
        return _report(error, f"failed: {type(error).__name__}", 1, debug, hint)


def _report(error: Exception, what: str, status: int, debug: bool, hint: str = "") -> int:
    if debug:
        traceback.print_exception(error)
    print(f"skylapse: {what}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    return status


# --------------------------------------------------------------------------------------------------------- generate


def _request(options: argparse.Namespace, folder: ModelFolder | None) -> VideoRequest:
    """Return the request, complete if the model's configs are on this machine; then refuses what it cannot make."""
    asked = sampling(options)
    if folder is not None:  # before the rules of all models, which do not know the nearest shape that this one makes
        width, height, num_frames = (asked[n] or getattr(folder.defaults, n) for n in ("width", "height", "num_frames"))
        if min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE and num_frames > 0:
            check_shape(width, height, num_frames, folder.limits)
    request = VideoRequest(
        prompt=options.prompt,
        negative_prompt=options.negative,
        fps=options.fps,
        seed=options.seed,
        image=options.image,
        last_image=options.last_image,
        video=options.video,
        strength=options.strength,
        cache=options.cache,
        **asked,
    )
    return request if folder is None else _resolved(request, options.seconds, folder.defaults, folder.limits)


def _resolved(
    request: VideoRequest, seconds: float | None, defaults: ModelDefaults, limits: ModelLimits
) -> VideoRequest:
    if seconds is not None:
        request = replace(request, num_frames=_frames_of(seconds, request.fps, defaults, limits))
    return request.resolved(defaults, limits)


def _generate(options: argparse.Namespace, settings: Settings) -> int:
    from .runtime.checkpoints.registry import known_folder
    from .runtime.media.clips import count_frames
    from .runtime.media.pictures import check_image
    from .runtime.media.writer import SHEET_SUFFIXES, check_writable, save_sheet

    request = _request(options, known_folder(options.model, settings.cache_dir))
    output = check_writable(options.output)
    sheet = check_writable(options.sheet, SHEET_SUFFIXES, "sheet") if options.sheet is not None else None
    if sheet and sheet.resolve() == output.resolve():
        raise ValueError(f"sheet must not be the output itself, got {options.sheet!r}")
    for name in ("image", "last_image"):
        if (path := getattr(options, name)) is not None:
            check_image(path, name)
    if options.video is not None:
        count_frames(options.video)

    with _display() as display:
        display.stage(f"loading {options.model}")
        started_s = time.perf_counter()
        from . import Engine  # torch: seconds

        engine = Engine.from_pretrained(
            options.model,
            device=options.device,
            dtype=options.dtype,
            cache_dir=settings.cache_dir,
            quantize=options.quantize,
            offload=options.offload,
        )
        request = _resolved(request, options.seconds, engine.defaults, engine.limits)
        loaded_s = time.perf_counter()
        video = _run(engine, request, display)
        display.stage(f"writing {output}")
        made_s = time.perf_counter()
        video.save(output)
        if sheet:
            save_sheet(sheet, video.frames)
        written_s = time.perf_counter()

    timings_s = {"load": loaded_s - started_s, **video.metadata.timings_s, "write": written_s - made_s}
    paths = {"output": str(output), "sheet": str(sheet) if sheet else None}
    if options.json:
        print(json.dumps(paths | _summary(options.model, engine, request, video, timings_s)))
    else:
        print(*filter(None, paths.values()), sep="\n")
    return 0


def _run(engine: Engine, request: VideoRequest, display: Display) -> Video:
    from .runtime.core.events import Failed, Finished, Progress

    display.stage("reading the prompt")
    engine.submit(request)
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Progress):
                display.step(event.step, event.num_steps)
                if event.step == event.num_steps:
                    display.stage("decoding")
            elif isinstance(event, Finished):
                return event.video
            elif isinstance(event, Failed):
                raise event.error
    raise RuntimeError("the engine ran out of work without a video")


def _frames_of(seconds: float, fps: int | None, defaults: ModelDefaults, limits: ModelLimits) -> int:
    """Return the smallest number of frames that the model can make and that lasts at least `seconds`."""
    fps = fps or defaults.fps
    longest_s = limits.max_num_frames / fps
    if not (isfinite(seconds) and 0 < seconds <= longest_s):
        allowed = f"above 0 and at most {longest_seconds(limits.max_num_frames, fps)} at {fps} fps for this model"
        raise ValueError(f"seconds must be {allowed}, got {seconds:g}")
    return frames_for(ceil(round(seconds * fps, 6)), limits)  # 1.1 s at 10 fps is 11.000000000000002 frames


def _summary(
    model: str, engine: Engine, request: VideoRequest, video: Video, timings_s: dict[str, float]
) -> dict[str, Any]:
    """Return what --json prints: enough to make the same video again, and its cost."""
    asked = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "guidance_scale_2")
    return {
        "model": model,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "quantize": engine.quantize,
        **{name: getattr(request, name) for name in (*asked, "solver", "shift", "cache")},
        "caching": video.metadata.cache and asdict(video.metadata.cache),
        **{name: getattr(request, name) for name in ("image", "last_image", "video", "strength")},
        "width": video.width,
        "height": video.height,
        "num_frames": video.num_frames,
        "fps": video.fps,
        "duration_s": video.duration_s,
        "timings_s": {stage: round(seconds, 4) for stage, seconds in timings_s.items()},
        "peak_memory_bytes": _peak_memory_bytes(),
        "peak_device_bytes": video.metadata.peak_bytes,
        "cut_tokens": dict(video.metadata.cut_tokens),
        "lossy_kernels": list(video.metadata.lossy_kernels),
    }


def _peak_memory_bytes() -> int:
    """Return the most memory in bytes that this process has held."""
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):  # ru_maxrss of a child starts at what its parent held
                return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --------------------------------------------------------------------------------------------------------- progress


class Display(Protocol):
    def stage(self, name: str) -> None: ...

    def step(self, step: int, num_steps: int) -> None: ...


@contextmanager
def _display() -> Iterator[Display]:
    """A progress bar on a terminal, a few lines in a log; stdout stays free for the result."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)


class _Bar:
    def __init__(self, progress: RichProgress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def stage(self, name: str) -> None:
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=None)

    def step(self, step: int, num_steps: int) -> None:
        name = f"denoising, step {step} of {num_steps}"
        self._progress.update(self._task, description=name, completed=step, total=num_steps)


class _Lines:
    def stage(self, name: str) -> None:
        print(f"skylapse: {name}", file=sys.stderr)

    def step(self, step: int, num_steps: int) -> None:
        if step in (1, num_steps) or step * 10 // num_steps > (step - 1) * 10 // num_steps:
            print(f"skylapse: denoising, step {step} of {num_steps}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------------- elsewhere

# Commands with options of their own: name -> (the module whose function of this name runs them, the extra that they
# need, what they do).
ELSEWHERE = {
    "serve": ("serve.commands.serve", "serve", "serve the OpenAI Videos API on this machine"),
    "keys": ("serve.commands.keys", "serve", "make, list, rotate and revoke the service's API keys"),
    "jobs": ("serve.commands.jobs", "serve", "list, cancel and retry the service's jobs"),
    "usage": ("serve.commands.usage", "serve", "what tenants have used, and what it costs"),
    "store": ("serve.commands.store", "serve", "back up, restore and check the service's store"),
    "compile": ("runtime.commands.compile", "compile", "build a faster decoder for this machine"),
    "kernels": ("runtime.commands.kernels", "gpu", "which kernels run on this machine, and why"),
    "bench": ("benchmarks.command", "dev", "measure kernels beside their peers"),
}


def _hand_over(name: str, arguments: Sequence[str], settings: Settings) -> int:
    """Run a command that needs more than the core dependencies, with all that follows its name."""
    module, extra, _ = ELSEWHERE[name]
    try:
        command = importlib.import_module(f".{module}", __package__)
        status: int = getattr(command, name)(arguments, settings)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == __package__:
            raise  # a module of ours that is missing is our failure
        raise ValueError(f"{name} needs {error.name}: pip install 'skylapse[{extra}]'") from error
    return status


# ---------------------------------------------------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse", description="Text to video with Wan diffusion transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"skylapse {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    add_models(commands)
    for name, (_, _, what) in ELSEWHERE.items():
        commands.add_parser(name, help=what, add_help=False)
    return parser


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    command = commands.add_parser(
        "generate", help="make a video of a prompt", description="Make a video of a prompt.", allow_abbrev=False
    )
    command.set_defaults(run=_generate)
    option = command.add_argument
    option("prompt", metavar="PROMPT", help="what to show")
    option("-o", "--output", default="out.mp4", metavar="FILE", help=".mp4, .webp, .gif or .png (default: out.mp4)")
    option("--sheet", metavar="FILE", help="also write a contact sheet of the frames, a .png")
    option("--json", action="store_true", help="print one JSON object instead of the paths")

    option("--model", default="demo", help="demo (the default), a diffusers folder, or a Hugging Face id")
    add_device(command)
    option("--image", metavar="FILE", help="the first frame, a PNG, JPEG or WebP file")
    option("--last-image", metavar="FILE", help="the last frame")
    option("--video", metavar="FILE", help="4k+1 frames that the clip begins with: an mp4, mov, mkv or webm file")
    option("--strength", type=float, metavar="S", help="make the clip of --video instead; 1 keeps nothing of it")
    option("--fps", type=int, metavar="N", help="frames per second")
    option("--negative", default="", metavar="TEXT", help="what not to show")
    option("--cache", default="none", help="high, balanced or fast, or a policy such as easy:0.1 (default: none)")
    option("--seed", type=int, default=0, metavar="N", help="default: 0")
    length = add_sampling(command)
    length.add_argument("--seconds", type=float, metavar="S", help="the fewest frames that last at least so long")
