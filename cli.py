"""The command line: skylapse generate | models."""

from __future__ import annotations

import argparse
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
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from . import __version__
from .runtime.config import Settings, load_settings
from .runtime.request import SOLVERS, VideoRequest, frames_for

if TYPE_CHECKING:  # whatever is heavy is imported by the command that needs it: --help takes a tenth of a second
    from rich.progress import Progress as RichProgress

    from .runtime.engine import Engine
    from .runtime.request import ModelDefaults, ModelLimits, Video


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 for our failures, 2 for the user's mistakes, 130 after Ctrl-C."""
    debug = False
    try:
        settings = load_settings()
        debug = settings.debug
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="skylapse: %(message)s")
        options = _parser().parse_args(arguments)
        status: int = options.run(options, settings)
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


def _generate(options: argparse.Namespace, settings: Settings) -> int:
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
        **_sampling(options),
    )
    from .runtime.video_file import SHEET_SUFFIXES, check_image, check_writable, count_frames, save_sheet

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
            options.model, device=options.device, dtype=options.dtype, cache_dir=settings.cache_dir
        )
        if options.seconds is not None:
            num_frames = _frames_of(options.seconds, options.fps, engine.defaults, engine.limits)
            request = replace(request, num_frames=num_frames)
        request = request.resolved(engine.defaults, engine.limits)
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
    from .runtime.events import Failed, Finished, Progress

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
    """The smallest number of frames that the model can make and that lasts at least `seconds`."""
    fps = fps or defaults.fps
    longest_s = limits.max_num_frames / fps
    if not (isfinite(seconds) and 0 < seconds <= longest_s):
        allowed = f"above 0 and at most {longest_s:g} at {fps} fps for this model"
        raise ValueError(f"seconds must be {allowed}, got {seconds:g}")
    return frames_for(ceil(round(seconds * fps, 6)), limits)  # 1.1 s at 10 fps is 11.000000000000002 frames


def _summary(
    model: str, engine: Engine, request: VideoRequest, video: Video, timings_s: dict[str, float]
) -> dict[str, Any]:
    """What --json prints: enough to make the same video again, and what it cost."""
    asked = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "guidance_scale_2")
    return {
        "model": model,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
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
    }


def _peak_memory_bytes() -> int:
    """The most memory that this process has held."""
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


# ----------------------------------------------------------------------------------------------------------- models


def _list_models(options: argparse.Namespace, settings: Settings) -> int:
    from .runtime.models.registry import list_models

    entries = list_models()
    if options.json:
        print(json.dumps([asdict(entry) for entry in entries], default=str))
        return 0
    rows = [(entry.name, entry.description, entry.source, _mebibytes(entry.num_bytes)) for entry in entries]
    _print_table(("model", "what it is", "source", "size"), rows)
    return 0


def _inspect_model(options: argparse.Namespace, settings: Settings) -> int:
    from .runtime.models.registry import inspect_model

    report = inspect_model(options.model, cache_dir=settings.cache_dir)
    if options.json:
        print(json.dumps(asdict(report), default=str))
        return 0
    print(f"{report.name}  ({report.folder})\n")
    _print_table(
        ("component", "kind", "parameters", "size", "dtype"),
        [
            (part.name, part.kind, f"{part.num_parameters:,}", _mebibytes(part.num_bytes), ", ".join(part.dtypes))
            for part in report.components
        ],
    )
    defaults, limits = report.defaults, report.limits
    sizes = ", ".join(f"{width}x{height}" for width, height in report.native_sizes)
    print(f"\ncan do    {', '.join(report.tasks)}")
    print(f"sizes     {sizes}; multiples of {limits.size_multiple} up to {limits.max_pixels:,} pixels")
    print(f"frames    {defaults.num_frames} at {defaults.fps} fps; up to {limits.max_num_frames}")
    print(f"sampling  {defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}")
    return 0


def _calibrate(options: argparse.Namespace, settings: Settings) -> int:
    from . import Engine
    from .runtime.cache.calibrate import PROMPTS, calibrate

    engine = Engine.from_pretrained(
        options.model, device=options.device, dtype=options.dtype, cache_dir=settings.cache_dir
    )
    request = VideoRequest(prompt="calibration", image=options.image, **_sampling(options))
    path = calibrate(
        engine, request, options.prompt or PROMPTS, lambda line: print(f"skylapse: {line}", file=sys.stderr)
    )
    print(json.dumps({"output": str(path)}) if options.json else path)
    return 0


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(title, overflow="fold") for title in titles), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 1000  # one line a row for whoever reads it through a pipe
    Console(width=width, markup=False, highlight=False).print(table)


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"


# ---------------------------------------------------------------------------------------------------------- options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # one line and exit code 2, as for every other mistake


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="skylapse", description="Text to video with Wan diffusion transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"skylapse {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    models = commands.add_parser("models", help="which models there are and what they can do", allow_abbrev=False)
    questions = models.add_subparsers(metavar="COMMAND", required=True)
    listing = questions.add_parser("list", help="models that are known by name", allow_abbrev=False)
    listing.set_defaults(run=_list_models)
    inspection = questions.add_parser("inspect", help="components, sizes and defaults of a model", allow_abbrev=False)
    inspection.add_argument("model", metavar="MODEL", help="demo, a diffusers folder, or a Hugging Face id")
    inspection.set_defaults(run=_inspect_model)
    calibration = questions.add_parser(
        "calibrate", help="measure what step caches need to know, beside the model", allow_abbrev=False
    )
    calibration.add_argument("model", metavar="MODEL", help="demo, a diffusers folder, or a Hugging Face id")
    calibration.add_argument("--prompt", action="append", metavar="TEXT", help="measure with this one (repeatable)")
    calibration.add_argument("--image", metavar="FILE", help="the first frame, where the model needs one")
    _add_device(calibration)
    _add_sampling(calibration)
    calibration.set_defaults(run=_calibrate)
    for command in (listing, inspection, calibration):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
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
    _add_device(command)
    option("--image", metavar="FILE", help="the first frame, a PNG, JPEG or WebP file")
    option("--last-image", metavar="FILE", help="the last frame")
    option("--video", metavar="FILE", help="4k+1 frames that the clip begins with: an mp4, mov, mkv or webm file")
    option("--strength", type=float, metavar="S", help="make the clip of --video instead; 1 keeps nothing of it")
    option("--fps", type=int, metavar="N", help="frames per second")
    option("--negative", default="", metavar="TEXT", help="what not to show")
    option("--cache", default="none", help="high, balanced or fast, or a policy such as easy:0.1 (default: none)")
    option("--seed", type=int, default=0, metavar="N", help="default: 0")
    length = _add_sampling(command)
    length.add_argument("--seconds", type=float, metavar="S", help="the fewest frames that last at least so long")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="default: what the device is fastest with")


def _add_sampling(command: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Size, length, steps and guidance; returns the group that says how long, for other ways of saying it."""
    option = command.add_argument
    option("--size", type=_size, metavar="WxH", help="pixels, for example 64x64")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--frames", type=int, metavar="N", help="4k+1: 1, 5, 9, 13, 17, ...")
    option("--steps", type=int, metavar="N", help="denoising steps")
    option("--guidance", type=float, metavar="G", help="how strictly to follow the prompt")
    option("--guidance-2", type=float, metavar="G", help="the same for the second expert of a model that has two")
    option("--solver", choices=SOLVERS)
    option("--shift", type=float, metavar="S", help="of the noise schedule")
    return length


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that `_add_sampling`'s options give."""
    width, height = options.size or (None, None)
    return dict(
        width=width,
        height=height,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        guidance_scale_2=options.guidance_2,
        solver=options.solver,
        shift=options.shift,
    )


def _size(text: str) -> tuple[int, int]:
    width, times, height = text.lower().partition("x")
    if not (times and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, for example 64x64, got {text!r}")
    return int(width), int(height)
