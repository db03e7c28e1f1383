"""Settings of this process: the only reader of environment variables."""

from __future__ import annotations

import difflib
import getpass
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...kernels import weight_formats
from ...kernels.backends import parse

MIB = 2**20
MIN_KEY_CHARACTERS = 16  # of a service's key that somebody thought of
DECODERS = ("auto", "eager", "onnxruntime", "inductor", "tensorrt")
OFFLOAD = ("auto", "none", "all")  # which parts of a model may leave the device while nothing needs them
OURS = "SKYLAPSE_"
SERVE_PREFIX = "SKYLAPSE_SERVE_"  # and a field of ServeConfig: one machine's service
LOG_LEVELS = ("debug", "info", "warning", "error")
QUANTIZE = weight_formats.words()  # what the weights of a denoiser's blocks may be kept in


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the operator of the process, as opposed to the author of a request."""

    threads: int | None = None  # SKYLAPSE_THREADS: CPU threads of one operation; None leaves it to torch
    debug: bool = False  # SKYLAPSE_DEBUG: tracebacks, and a log that tells which path was taken
    text_cache_bytes: int = 256 * MIB  # SKYLAPSE_TEXT_CACHE_MB: prompts' keys and values kept between requests
    cache_dir: Path | None = None  # SKYLAPSE_CACHE_DIR: downloaded models; None is Hugging Face's own folder
    decode_chunk: int | None = (
        None  # SKYLAPSE_DECODE_CHUNK: latent frames that the VAE codes at a time; None: by memory
    )
    tile: int | str = "auto"  # SKYLAPSE_TILE: side in pixels of what the VAE codes at a time, auto, or none
    scheduler: str = "fair"  # SKYLAPSE_SCHEDULER: fair, fifo or shortest
    max_batch_tokens: int | None = None  # SKYLAPSE_MAX_BATCH_TOKENS: of one pack; None is the device's own
    max_queued: int = 256  # SKYLAPSE_MAX_QUEUED: requests that an engine takes before it says that it is full
    memory_bytes: int | None = None  # SKYLAPSE_MEMORY_MB: what weights and requests may take; None is most of it
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # SKYLAPSE_TENANT_WEIGHTS: "a=2,b=0.5"
    profile_dir: Path = field(default_factory=lambda: profiles())  # SKYLAPSE_PROFILE_DIR: measured memory profiles
    decoder: str = "auto"  # SKYLAPSE_DECODER: auto, eager, onnxruntime, inductor or tensorrt
    encoder: str | None = None  # SKYLAPSE_ENCODER: the same, of what encodes; None is as `decoder` has it
    decoder_dtype: str = "auto"  # SKYLAPSE_DECODER_DTYPE: fp32, bf16 or fp16; auto is bf16 on CUDA, fp32 on a CPU
    preview_decoder: Path | None = None  # SKYLAPSE_PREVIEW_DECODER: a distilled decoder's file; None shows a linear map
    compiled_dir: Path | None = None  # SKYLAPSE_COMPILED_DIR: compiled decoders; None is a folder in profile_dir
    compiled_shared_dir: Path | None = None  # SKYLAPSE_COMPILED_SHARED_DIR: more of them, only read
    compiled_bytes: int = 20 * 1024 * MIB  # SKYLAPSE_COMPILED_MB: what compiled_dir may hold
    compile: bool = False  # SKYLAPSE_COMPILE: torch.compile the blocks
    quantize: str = "none"  # SKYLAPSE_QUANTIZE: fp8 or int8 weights in the denoiser's blocks
    offload: str = "auto"  # SKYLAPSE_OFFLOAD: auto moves what does not fit, none nothing, all every part
    kernels: Mapping[str, str] = field(default_factory=dict)  # SKYLAPSE_KERNELS: "attention=sdpa"
    log_to: Path | None = None  # SKYLAPSE_LOG_TO: a file, or a folder of one a process; None is stderr
    log_level: str = "info"  # SKYLAPSE_LOG_LEVEL: debug, info, warning or error, of the service's lines
    health_timeout_s: int = 30  # SKYLAPSE_HEALTH_TIMEOUT_S: a replica that is silent for three of these is replaced
    data: Path = Path("skylapse-data")  # SKYLAPSE_DATA: a service's jobs, keys and files
    revision: str | None = None  # SKYLAPSE_REVISION: the commit that an image was built from
    # secrets of the service, which belong into no file that a dashboard shows
    api_key: str | None = field(default=None, repr=False)  # SKYLAPSE_API_KEY: the local service's key
    database_url: str | None = field(default=None, repr=False)  # SKYLAPSE_DATABASE_URL: SQLAlchemy's, with a password
    webhook_secret: str | None = field(default=None, repr=False)  # SKYLAPSE_WEBHOOK_SECRET: whsec_...


def export(variables: Mapping[str, str]) -> None:
    """Set variables for the processes that this one starts, but where the operator has set them."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def our_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All of this process's variables that are ours."""
    return {name: text for name, text in environ.items() if name.startswith(OURS)}


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's variables with some changed, for a process that it starts."""
    return {**os.environ, **changes}


def home() -> Path | None:
    """The folder of who runs this process; None where there is no HOME and nobody of this number is known."""
    try:
        return Path.home()
    except (KeyError, RuntimeError):
        return None


def profiles() -> Path:
    """Return the folder of measured profiles, unless SKYLAPSE_PROFILE_DIR names another."""
    return (home() or Path(tempfile.gettempdir()) / f"skylapse-home-{os.getuid()}") / ".cache" / "skylapse"


def settle_home() -> str | None:
    """Give this process and its children a place for caches where the home folder is missing or cannot be written.

    torch, Triton, huggingface_hub and Ray look for one, and each fails in words of its own without it. A home that is
    there and can only be read keeps the models that it holds. Returns what to tell, or None where all is well.
    """
    ours = home()
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ.setdefault("USER", f"user-{os.getuid()}")  # torch names its compile cache by it
    is_there = ours is not None and ours.is_dir()
    if ours is not None and is_there and os.access(ours, os.W_OK | os.X_OK):
        return None
    place = _private_folder(Path(tempfile.gettempdir()) / f"skylapse-home-{os.getuid()}")
    caches = {"SKYLAPSE_PROFILE_DIR": "skylapse", "TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}
    caches |= {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "XDG_CACHE_HOME": ""}
    if ours is None or not is_there:
        os.environ["HOME"] = str(place)
        return f"HOME is {'not set' if ours is None else 'no folder'}: what is cached goes to {place}"
    if not (ours / ".cache" / "huggingface").is_dir():
        caches["HF_HOME"] = "huggingface"
    export({name: str(place / ".cache" / folder) for name, folder in caches.items()})
    return f"HOME cannot be written: what is cached goes to {place}"


def _private_folder(path: Path) -> Path:
    """`path`, made for nobody else; another one where it is somebody else's."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="skylapse-home-"))


def configures_allocator(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the operator has configured torch's allocator of device memory, by any of its variables."""
    return any(environ.get(f"PYTORCH_{infix}ALLOC_CONF") for infix in ("", "CUDA_", "HIP_"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSettings:
    """The variables of OpenTelemetry that we read; its SDK reads the others by itself."""

    endpoint: str  # OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, or OTEL_EXPORTER_OTLP_ENDPOINT; none: there are no traces
    max_queue: int = 2048  # OTEL_BSP_MAX_QUEUE_SIZE: spans that wait for the exporter; more are dropped and counted
    max_batch: int = 512  # OTEL_BSP_MAX_EXPORT_BATCH_SIZE


SAMPLERS = tuple(
    f"{base}{name}" for base in ("", "parentbased_") for name in ("always_on", "always_off", "traceidratio")
)
TRACE_TIMES = (
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
)


def load_tracing(environ: Mapping[str, str] = os.environ) -> TraceSettings | None:
    """Read the settings of traces from `environ`; None where they are off. ValueError names the variable that is wrong.

    OpenTelemetry's SDK would log a wrong value and go on with another.
    """
    given = {name: text.strip() for name, text in environ.items() if name.startswith("OTEL_") and text.strip()}
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = next((name for name in names if name in given), None)
    exporter = _choice(given, "OTEL_TRACES_EXPORTER", ("otlp", "none"))
    if endpoint is None or exporter == "none" or _switch(given, "OTEL_SDK_DISABLED"):
        return None
    url = urlsplit(given[endpoint])
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{endpoint} must be like http://collector:4318, got {given[endpoint]!r}")
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
        _choice(given, name, ("http/protobuf",))
    for name in TRACE_TIMES:
        _positive(given, name)
    _choice(given, "OTEL_TRACES_SAMPLER", SAMPLERS)
    if not 0 <= (_number(given, ratio := "OTEL_TRACES_SAMPLER_ARG") or 0.0) <= 1:
        raise ValueError(f"{ratio} must be a number from 0 to 1, got {given[ratio]!r}")
    max_queue = _whole(given, "OTEL_BSP_MAX_QUEUE_SIZE", 1, 10**6) or 2048
    max_batch = _whole(given, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 1, 10**6) or 512
    return TraceSettings(endpoint=given[endpoint], max_queue=max_queue, max_batch=min(max_queue, max_batch))


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read settings from `environ`; an empty variable counts as unset. ValueError names the variable that is wrong."""
    return _settings(_given(environ))


class Given(dict[str, str]):
    """Variables that note which names were looked for."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        super().__init__(variables)
        self.known: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.known.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.known.add(name)
        return super().get(name, default)


def _given(environ: Mapping[str, str]) -> Given:
    return Given({name: text.strip() for name, text in our_variables(environ).items() if text.strip()})


def misspelt(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return a line for each variable of ours that is not read and whose name resembles one that is."""
    given, words = _given(environ), []
    _settings(given)
    known = [name.removeprefix(OURS) for name in given.known]
    for name in sorted(set(given) - given.known):
        found = difflib.get_close_matches(name.removeprefix(OURS), known, 1, 0.75)
        if found and not name.startswith(SERVE_PREFIX):  # whose reader refuses it
            words.append(f"{name} is no setting, and is not read; did you mean {OURS}{found[0]}?")
    return words


def _settings(given: Mapping[str, str]) -> Settings:
    text_cache_mb = _whole(given, "SKYLAPSE_TEXT_CACHE_MB", 0, 2**20)
    memory_mb = _whole(given, "SKYLAPSE_MEMORY_MB", 1, 2**30 - 1)
    compiled_mb = _whole(given, "SKYLAPSE_COMPILED_MB", 1, 2**30 - 1)
    found: dict[str, Any] = {
        "threads": _whole(given, "SKYLAPSE_THREADS", 1, 1024),
        "debug": _switch(given, "SKYLAPSE_DEBUG"),
        "text_cache_bytes": None if text_cache_mb is None else text_cache_mb * MIB,
        "cache_dir": _folder(given, "SKYLAPSE_CACHE_DIR"),
        "scheduler": _choice(given, "SKYLAPSE_SCHEDULER", ("fair", "fifo", "shortest")),
        "max_batch_tokens": _whole(given, "SKYLAPSE_MAX_BATCH_TOKENS", 1, 2**30 - 1),
        "max_queued": _whole(given, "SKYLAPSE_MAX_QUEUED", 1, 10**6),
        "memory_bytes": None if memory_mb is None else memory_mb * MIB,
        "tenant_weights": _weights(given, "SKYLAPSE_TENANT_WEIGHTS"),
        "profile_dir": _folder(given, "SKYLAPSE_PROFILE_DIR"),
        "decoder": _choice(given, "SKYLAPSE_DECODER", DECODERS),
        "encoder": _choice(given, "SKYLAPSE_ENCODER", DECODERS),
        "decoder_dtype": _choice(given, "SKYLAPSE_DECODER_DTYPE", ("auto", "fp32", "bf16", "fp16")),
        "preview_decoder": _file(given, "SKYLAPSE_PREVIEW_DECODER"),
        "compiled_dir": _folder(given, "SKYLAPSE_COMPILED_DIR"),
        "compiled_shared_dir": _folder(given, "SKYLAPSE_COMPILED_SHARED_DIR"),
        "compiled_bytes": None if compiled_mb is None else compiled_mb * MIB,
        "compile": _switch(given, "SKYLAPSE_COMPILE"),
        "quantize": _choice(given, "SKYLAPSE_QUANTIZE", QUANTIZE),
        "offload": _choice(given, "SKYLAPSE_OFFLOAD", OFFLOAD),
        "kernels": _kernels(given, "SKYLAPSE_KERNELS"),
        "log_to": _path(given, "SKYLAPSE_LOG_TO"),
        "log_level": _choice(given, "SKYLAPSE_LOG_LEVEL", LOG_LEVELS),
        "health_timeout_s": _whole(given, "SKYLAPSE_HEALTH_TIMEOUT_S", 1, 3600),
        "data": _folder(given, "SKYLAPSE_DATA"),
        "revision": given.get("SKYLAPSE_REVISION"),
        "api_key": _key(given, "SKYLAPSE_API_KEY"),
        "database_url": given.get("SKYLAPSE_DATABASE_URL"),
        "webhook_secret": given.get("SKYLAPSE_WEBHOOK_SECRET"),
        "decode_chunk": _whole(given, "SKYLAPSE_DECODE_CHUNK", 1, 64),
        "tile": _tile(given, "SKYLAPSE_TILE"),
    }
    return Settings(**{name: value for name, value in found.items() if value is not None})


def _whole(given: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    if name not in given:
        return None
    text = given[name]
    if not (text.isdecimal() and text.isascii() and len(text) < 10 and low <= int(text) <= high):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {text!r}")
    return int(text)


def _number(given: Mapping[str, str], name: str) -> float | None:
    if name not in given:
        return None
    try:
        number = float(given[name])
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise ValueError(f"{name} must be a number, got {given[name]!r}")
    return number


def _positive(given: Mapping[str, str], name: str) -> float | None:
    number = _number(given, name)
    if number is not None and number <= 0:
        raise ValueError(f"{name} must be a number above 0, got {given[name]!r}")
    return number


def _tile(given: Mapping[str, str], name: str) -> int | str | None:
    text = given.get(name)
    if text is None or text in ("auto", "none"):
        return text
    if not (text.isdecimal() and text.isascii() and len(text) < 10 and int(text) >= 64 and int(text) % 16 == 0):
        raise ValueError(f"{name} must be auto, none or a multiple of 16 from 64, got {text!r}")
    return int(text)


def _switch(given: Mapping[str, str], name: str) -> bool | None:
    if name not in given:
        return None
    if (text := given[name].lower()) not in ("0", "1", "false", "true"):
        raise ValueError(f"{name} must be 0 or 1, got {given[name]!r}")
    return text in ("1", "true")


def _choice(given: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    if name in given and given[name] not in allowed:
        raise ValueError(f"{name} must be {' or '.join(allowed)}, got {given[name]!r}")
    return given.get(name)


def _key(given: Mapping[str, str], name: str) -> str | None:
    if name in given and len(given[name]) < MIN_KEY_CHARACTERS:  # what it is, is repeated nowhere
        raise ValueError(f"{name} must have at least {MIN_KEY_CHARACTERS} characters, got {len(given[name])}")
    return given.get(name)


def _weights(given: Mapping[str, str], name: str) -> dict[str, float] | None:
    if name not in given:
        return None
    weights = {}
    for part in given[name].split(","):
        tenant, equals, text = part.partition("=")
        try:
            weights[tenant.strip()] = float(text)
        except ValueError:
            equals = ""
        if not equals or not 0 < weights[tenant.strip()] < float("inf"):
            raise ValueError(f'{name} must be like "a=2,b=0.5", got {given[name]!r}')
    return weights


def _kernels(given: Mapping[str, str], name: str) -> dict[str, str] | None:
    try:
        return parse(given[name]) if name in given else None
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _file(given: Mapping[str, str], name: str) -> Path | None:
    if name not in given:
        return None
    path = Path(os.path.expanduser(given[name]))
    if not path.is_file():
        raise ValueError(f"{name} must be a file, got {given[name]!r}")
    return path


def _path(given: Mapping[str, str], name: str) -> Path | None:
    return Path(os.path.expanduser(given[name])) if name in given else None


def _folder(given: Mapping[str, str], name: str) -> Path | None:
    if name not in given:
        return None
    path = Path(os.path.expanduser(given[name]))
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {given[name]!r}")
    return path
