"""Models of a hub: JSON alone or all files, once a machine, by commit; broken downloads go on; refusals are a line."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, standing_in, use

from skylapse.cli import main
from skylapse.runtime.checkpoints.hub import (
    Download,
    HubUnreachable,
    UnknownModel,
    cached_folder,
    pin,
    resolve_configs,
    resolve_folder,
)
from skylapse.runtime.core.fingerprint import fingerprint

FIRST, SECOND = "a" * 40, "b" * 40
NAME = "org/wan"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def write_model(folder: Path, seed: int) -> Path:
    """A folder that looks like a model as far as a download looks."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"seed": seed}))
    (folder / "transformer" / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [200_000], "data_offsets": [0, 200_000]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes([seed]) * 200_000)
    (folder / "tokenizer" / "spiece.model").write_bytes(b"pieces")
    (folder / "unsafe.bin").write_bytes(b"never asked for")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folders = {FIRST: write_model(tmp_path / "first", 1), SECOND: write_model(tmp_path / "second", 2)}
    with standing_in({NAME: folders}) as hub:
        use(hub.url, monkeypatch)
        yield hub


def test_configs_are_json_alone_and_asked_for_once(hub: Hub, tmp_path: Path) -> None:
    folder = resolve_configs(NAME, tmp_path / "cache")
    assert folder.name == SECOND and json.loads((folder / "model_index.json").read_text()) == {"seed": 2}
    assert hub.weights_asked() == 0 and hub.gets("transformer/config.json") == 1
    assert cached_folder(NAME, tmp_path / "cache", SECOND) is None, "it has no weights yet"
    assert resolve_configs(NAME, tmp_path / "cache", SECOND) == folder
    assert hub.gets("transformer/config.json") == 1


def test_a_revision_is_pinned_by_its_commit(hub: Hub, tmp_path: Path) -> None:
    assert (pin(NAME, tmp_path), pin(NAME, tmp_path, FIRST)) == (SECOND, FIRST)
    folder = resolve_folder(NAME, tmp_path / "cache", FIRST)
    assert (folder.name, (folder / WEIGHTS).read_bytes()[-1:]) == (FIRST, b"\1")
    assert not (folder / "unsafe.bin").exists() and (folder / "tokenizer" / "spiece.model").exists()
    asked = hub.asked.total()
    assert resolve_folder(NAME, tmp_path / "cache", FIRST) == folder and hub.asked.total() == asked


def test_a_download_tells_how_far_it_is(hub: Hub, tmp_path: Path) -> None:
    hub.pause_s = 0.1
    told: list[Download] = []
    resolve_folder(NAME, tmp_path / "cache", report=told.append)
    assert [one.num_bytes for one in told] == sorted({one.num_bytes for one in told})
    assert 0 < told[0].share < 1 and told[-1].share == 1 and str(told[-1]) == "0.2 of 0.2 MB, 100 %"


def test_a_connection_that_breaks_goes_on_where_it_was(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**14)  # what is lost at a break, 10 MiB else
    hub.breaks[WEIGHTS] = 3
    folder = resolve_folder(NAME, tmp_path / "cache")
    assert (folder / WEIGHTS).read_bytes().endswith(b"\2" * 200_000)
    assert hub.gets(WEIGHTS) == 4 and hub.sent_bytes < 250_000, "next to nothing was sent twice"


def test_a_hub_that_is_ill_for_a_while_is_asked_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        hub.status = None

    commit = pin(NAME, tmp_path)
    monkeypatch.setattr("skylapse.runtime.checkpoints.hub.pin", lambda *_: commit)
    monkeypatch.setattr("skylapse.runtime.checkpoints.hub.time.sleep", sleep)
    hub.status = 500
    assert resolve_folder(NAME, tmp_path / "cache").name == SECOND and 1.0 in pauses


def _resolve(url: str, cache: str, start: threading.Barrier) -> None:
    patch = pytest.MonkeyPatch()
    use(url, patch)
    start.wait()
    resolve_folder(NAME, Path(cache))


def test_two_processes_of_a_machine_download_once(hub: Hub, tmp_path: Path) -> None:
    hub.pause_s = 0.01
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    both = [context.Process(target=_resolve, args=(hub.url, str(tmp_path / "cache"), start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert hub.gets(WEIGHTS) == 1


def test_a_download_that_was_killed_leaves_its_turn_to_the_next(hub: Hub, tmp_path: Path) -> None:
    hub.pause_s = 0.2
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_resolve, args=(hub.url, str(tmp_path / "cache"), context.Barrier(1)))
    process.start()
    until_s = time.monotonic() + 20
    while not (hub.gets(WEIGHTS) and any((tmp_path / "cache").rglob("snapshots/*/model_index.json"))):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    process.kill()
    process.join()
    hub.pause_s = 0.0
    folder = resolve_folder(NAME, tmp_path / "cache")
    assert (folder / WEIGHTS).read_bytes().endswith(b"\2" * 200_000)
    assert hub.gets(WEIGHTS) == 2 and hub.gets("model_index.json") == 1, "what was complete is kept"


def test_what_a_killed_download_left_is_removed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "cache" / "models--org--wan" / "blobs" / "abc.123.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    monkeypatch.setattr("skylapse.runtime.checkpoints.hub.STALE_S", -1.0)
    resolve_folder(NAME, tmp_path / "cache")
    assert not part.exists()


def test_without_the_hub_the_last_known_commit_is_taken(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_folder(NAME, tmp_path / "cache")
    use("http://127.0.0.1:9", monkeypatch)
    assert resolve_folder(NAME, tmp_path / "cache") == folder
    with pytest.raises(HubUnreachable, match="cannot be reached"):
        resolve_folder(NAME, tmp_path / "cache", FIRST)


@pytest.mark.parametrize(
    ("name", "revision", "kind", "reason"),
    [
        ("org/nothing", None, UnknownModel, "is no local folder, and .* has none of this name"),
        (NAME, "v2", UnknownModel, "has no revision 'v2'"),
        ("org/gated", None, UnknownModel, "is gated: its terms have to be accepted"),
    ],
)
def test_refusals_are_one_line_at_once(
    name: str, revision: str | None, kind: type[ValueError], reason: str, hub: Hub, tmp_path: Path
) -> None:
    hub.gated.add("org/gated")
    for resolve in (resolve_folder, resolve_configs):
        began_s = time.monotonic()
        with pytest.raises(kind, match=reason) as caught:
            resolve(name, tmp_path / "cache", revision)
        assert "\n" not in str(caught.value) and time.monotonic() - began_s < 3


def test_an_ill_hub_an_absent_one_and_a_forbidden_one_are_told_apart(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status = 503
    with pytest.raises(HubUnreachable, match="answers 503"):
        resolve_folder(NAME, tmp_path)
    hub.status = 403
    with pytest.raises(UnknownModel, match="answers 403 to this HF_TOKEN, or to none"):
        resolve_folder(NAME, tmp_path)
    use("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(HubUnreachable, match=r"http://127\.0\.0\.1:9 cannot be reached: ConnectError"):
        resolve_folder(NAME, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE forbids"):
        resolve_folder(NAME, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be downloaded to .*file"):
        resolve_folder(NAME, tmp_path / "file" / "cache")


def test_a_file_and_a_revision_of_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wan.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model must be a folder, got the file"):
        resolve_folder(str(tmp_path / "wan.safetensors"))
    with pytest.raises(ValueError, match="revision is a hub id's"):
        resolve_folder("demo", revision="main")


def test_the_command_downloads_and_says_where(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYLAPSE_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["models", "download", NAME, "--revision", FIRST, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["revision"] == FIRST and told["bytes"] > 200_000 and Path(told["folder"]).is_dir()
    assert told["fingerprint"] == fingerprint(Path(told["folder"]))
    assert main(["models", "download", NAME]) == 0
    assert capsys.readouterr().out.strip().endswith(SECOND)
    assert main(["models", "download", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revision"] is None
    assert main(["models", "download", "org/nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
