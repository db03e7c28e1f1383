"""Models on a hub: find the commit that a name means, and fetch its configs or all of its files, once a machine."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

DEMO_FOLDER = Path(__file__).parents[1] / "models" / "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BRANCH = re.compile(r"[\w][\w./-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".json")  # that somebody means by a/b.suffix
CONFIGS = ("*.json",)
DOWNLOADED = (*CONFIGS, "*.safetensors", "*.model", "*.txt")  # never a pickle, never code
ASK_S = 10.0  # for an answer of the hub's; its client by itself would wait for ever
MAX_FAILURES = 5  # of a download, one after the other, without one more file that has come
LONGEST_PAUSE_S = 30.0
REPORT_S = 1.0
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
LIBRARIES = ("huggingface_hub", "hf_xet", "httpx", "httpx2", "requests")  # whose errors are the network's or the hub's
STALE_S = 60.0  # a part of a file that nobody has written to for so long is of a process that was killed

logger = logging.getLogger(__name__)


class UnknownModel(ValueError):
    """The hub says that there is no such model or revision, or that this token may not read it."""


class HubUnreachable(ValueError):
    """The hub does not answer, and the model is not on this machine; it may be later."""


@dataclass(frozen=True)
class Download:
    """The progress of a model's download, in bytes."""

    model: str
    num_bytes: int
    total_bytes: int

    @property
    def share(self) -> float:
        return self.num_bytes / self.total_bytes if self.total_bytes else 1.0

    def __str__(self) -> str:
        """Return the bytes in words, with decimal units as hubs have them."""
        unit, name = (1e9, "GB") if self.total_bytes >= 1e9 else (1e6, "MB")
        return f"{self.num_bytes / unit:.1f} of {self.total_bytes / unit:.1f} {name}, {100 * self.share:.0f} %"


Report = Callable[[Download], None]


def local_folder(name: str) -> Path | None:
    """Return the folder of "demo" or of a local model; None for a hub's id. ValueError for what is neither."""
    if name == "demo":
        return DEMO_FOLDER
    if name and Path(name).is_dir():
        return Path(name)
    if name and Path(name).exists():
        raise ValueError(f"model must be a folder, got the file {name!r}")
    if not HUB_ID.fullmatch(name) or Path(name).suffix in FILES:
        raise ValueError(
            f'model must be "demo", a folder or a hub id like "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", got {name!r}'
            f"{', and there is no such folder' if name else ''}"
        )
    return None


def resolve_folder(
    name: str, cache_dir: Path | None = None, revision: str | None = None, report: Report | None = None
) -> Path:
    """Return the folder of "demo", a local diffusers folder, or a hub id, whose missing files are downloaded.

    revision: a branch, a tag or a commit; default the hub's own. report: called about once a second while files come.
    One process of a machine downloads, and the others wait for it. A download that breaks is tried again until some
    tries have brought nothing more. Raises ValueError, or its UnknownModel or HubUnreachable, with one line.
    """
    if (folder := _local(name, revision)) is not None:
        return folder
    if COMMIT.fullmatch(revision or "") and (folder := cached_folder(name, cache_dir, revision)) is not None:
        return folder
    commit = pin(name, cache_dir, revision)
    if (folder := cached_folder(name, cache_dir, commit)) is not None:
        return folder
    with _alone(name, cache_dir, commit, report):
        folder = _download(name, cache_dir, commit, DOWNLOADED)
    _remember(name, cache_dir, revision, commit)
    return folder


def resolve_configs(name: str, cache_dir: Path | None = None, revision: str | None = None) -> Path:
    """Do as `resolve_folder`, but fetch a hub id's JSON files alone; files that are there are not asked for again."""
    if (folder := _local(name, revision)) is not None:
        return folder
    if COMMIT.fullmatch(revision or "") and (folder := cached_folder(name, cache_dir, revision, CONFIGS)) is not None:
        return folder
    commit = pin(name, cache_dir, revision)
    folder = cached_folder(name, cache_dir, commit, CONFIGS) or _download(name, cache_dir, commit, CONFIGS)
    _remember(name, cache_dir, revision, commit)
    return folder


def pin(name: str, cache_dir: Path | None = None, revision: str | None = None) -> str:
    """Return the commit that a revision of a hub id is now.

    If the hub does not answer, it is the one that it was when the hub was asked last. Raises as `resolve_folder`.
    """
    from huggingface_hub import HfApi, constants

    try:
        found = HfApi(endpoint=constants.ENDPOINT).model_info(name, revision=revision, timeout=ASK_S).sha
        assert found is not None
        return found
    except Exception as error:
        refusal = _refusal(error, name, revision, cache_dir)
        known = _last_known(name, cache_dir, revision)
        if known is None or isinstance(refusal, UnknownModel):
            raise refusal from error
        logger.warning("%s; its commit %s, which is on this machine, is taken", refusal, known[:12])
        return known


def cached_folder(
    name: str, cache_dir: Path | None, revision: str | None, patterns: Sequence[str] = DOWNLOADED
) -> Path | None:
    """Return a hub id's folder if all files of these patterns are on this machine, else None; no hub is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=[*patterns], local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    if not (folder / "model_index.json").exists():
        return None
    # One that was downloaded by an older library has no list of its files: then a denoiser's weights stand for all.
    return folder if patterns == CONFIGS or any(folder.glob("transformer/*.safetensors")) else None


# ------------------------------------------------------------------------------------------------- what they use


def _local(name: str, revision: str | None) -> Path | None:
    folder = local_folder(name)
    if folder is not None and revision is not None:
        raise ValueError(f"revision is a hub id's, and {name!r} is a folder, got revision {revision!r}")
    return folder


def _remember(name: str, cache_dir: Path | None, revision: str | None, commit: str) -> None:
    """Note the commit of a branch or tag, for days without the hub: a download by its commit notes none."""
    branch = revision or "main"
    if COMMIT.fullmatch(branch) or not BRANCH.fullmatch(branch) or ".." in branch:
        return
    path = _repository(name, cache_dir) / "refs" / branch
    with suppress(OSError):  # a cache that is only read has what it needs
        if not path.exists() or path.read_text() != commit:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_text(commit)
            part.replace(path)


def _last_known(name: str, cache_dir: Path | None, revision: str | None) -> str | None:
    folder = cached_folder(name, cache_dir, revision, CONFIGS)
    return None if folder is None else folder.name


def _download(name: str, cache_dir: Path | None, commit: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()  # ours tells more, and tells it to logs as well
    failures, files_before = 0, -1
    while True:
        try:
            return Path(
                snapshot_download(
                    name, revision=commit, cache_dir=cache_dir, allow_patterns=[*patterns], endpoint=constants.ENDPOINT
                )
            )
        except Exception as error:
            refusal = _refusal(error, name, commit, cache_dir)
            files = _num_files(name, cache_dir)
            failures = 1 if files > files_before >= 0 else failures + 1
            files_before = files
            if not isinstance(refusal, HubUnreachable) or failures >= MAX_FAILURES:
                raise refusal from error
            pause_s = min(LONGEST_PAUSE_S, 2.0 ** (failures - 1))
            logger.warning("%s; tried again in %.0f s", refusal, pause_s)
            time.sleep(pause_s)


@contextmanager
def _alone(name: str, cache_dir: Path | None, commit: str, report: Report | None) -> Iterator[None]:
    """Keep this machine's other processes from downloading this model; `report` hears of progress, whoever makes it."""
    from filelock import FileLock, Timeout

    lock = FileLock(_cache(cache_dir) / ".locks" / f"skylapse--{name.replace('/', '--')}.lock")
    lock_path = Path(lock.lock_file)
    done = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(name, cache_dir, commit, report, done), name="skylapse-download", daemon=True
    )
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        if report is not None:
            watcher.start()
        while True:
            with suppress(Timeout):
                lock.acquire(timeout=ASK_S)
                break
        _remove_stale(name, cache_dir)
        yield
    except OSError as error:  # of the lock: `_download` has its own
        raise ValueError(f"model {name!r} cannot be downloaded to {_cache(cache_dir)}: {_first_line(error)}") from error
    finally:
        lock.release()
        done.set()
        if watcher.is_alive():
            watcher.join()


def _watch(name: str, cache_dir: Path | None, commit: str, report: Report, done: threading.Event) -> None:
    """Report how much lies in the cache, whoever brings it; a last time when all is there."""
    told = -1
    while True:
        ended = done.wait(REPORT_S)
        with suppress(OSError):
            progress = _progress(name, cache_dir, commit)
            if progress is not None and progress.num_bytes != told:
                told = progress.num_bytes
                report(progress)
        if ended:
            return


def _progress(name: str, cache_dir: Path | None, commit: str) -> Download | None:
    """Return the progress of a download; None until the list of its files is there."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(name, revision=commit, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        return None
    sizes = {file.path: file.size for file in tree}
    folder = _repository(name, cache_dir) / "snapshots" / commit
    wanted = [path for path in sizes if any(fnmatch(path, pattern) for pattern in DOWNLOADED)]
    here = sum(sizes[path] for path in wanted if (folder / path).exists())
    here += sum(path.stat().st_size for path in _parts(name, cache_dir))
    total = sum(sizes[path] for path in wanted)
    return Download(name, min(here, total), total)


def _remove_stale(name: str, cache_dir: Path | None) -> None:
    for path in _parts(name, cache_dir):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()


def _parts(name: str, cache_dir: Path | None) -> list[Path]:
    """Return the files that are not complete."""
    return [*(_repository(name, cache_dir) / "blobs").glob("*.incomplete")]


def _num_files(name: str, cache_dir: Path | None) -> int:
    return sum(path.suffix != ".incomplete" for path in (_repository(name, cache_dir) / "blobs").glob("*"))


def _repository(name: str, cache_dir: Path | None) -> Path:
    return _cache(cache_dir) / f"models--{name.replace('/', '--')}"


def _cache(cache_dir: Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()


def _refusal(error: Exception, name: str, revision: str | None, cache_dir: Path | None) -> ValueError:
    """Return an error as one line that says what to do (huggingface_hub's are paragraphs); raises an error of ours."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = [error, *_causes(error)]
    model, hub = f"model {name!r}", constants.ENDPOINT
    there = f"{model} is not on this machine"
    if Path(name).parent.is_dir():  # a path more likely than an id, though it may be one
        there = (
            f"{model} is no folder ({Path(name).parent} holds none of this name) and no model of {_cache(cache_dir)}"
        )

    def find(kind: type[Exception]) -> Any:
        return next((one for one in chain if isinstance(one, kind)), None)

    if not any(isinstance(one, OSError) or type(one).__module__.split(".")[0] in LIBRARIES for one in chain):
        raise error
    if full := next((one for one in chain if isinstance(one, OSError) and one.errno in DISK), None):
        return ValueError(f"{model} cannot be downloaded to {_cache(cache_dir)}: {full.strerror}")
    if find(GatedRepoError):
        return UnknownModel(f"{model} is gated: its terms have to be accepted at {hub}/{name}, and HF_TOKEN set")
    if find(RevisionNotFoundError):
        return UnknownModel(f"{model} has no revision {revision!r} at {hub}")
    if find(RepositoryNotFoundError):
        return UnknownModel(f"{model} is no local folder, and {hub} has none of this name (a private one: HF_TOKEN)")
    if find(OfflineModeIsEnabled):
        advice = (
            f"run `skylapse models download {name}` where that is not set, or set SKYLAPSE_CACHE_DIR to where it is"
        )
        return HubUnreachable(f"{there}, and HF_HUB_OFFLINE forbids to download it: {advice}")
    if (answer := find(HfHubHTTPError)) is not None:
        status = answer.response.status_code
        if status in (401, 403):
            return UnknownModel(f"{model} may not be read: {hub} answers {status} to this HF_TOKEN, or to none")
        return HubUnreachable(f"{there}, and {hub} answers {status}")
    reason = f"{type(chain[-1]).__name__}: {_first_line(chain[-1])}"
    return HubUnreachable(f"{there}, and {hub} cannot be reached: {reason}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__) is not None:
        yield cause
        error = cause


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
