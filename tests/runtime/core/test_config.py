"""Settings: what the environment says, and errors that name the variable."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from skylapse.runtime.core import config
from skylapse.runtime.core.config import Settings, load_settings, misspelt, settle_home

MIB = 2**20


def test_empty_environment_gives_the_defaults() -> None:
    assert load_settings({}) == Settings()
    assert load_settings({"SKYLAPSE_THREADS": "", "SKYLAPSE_CACHE_DIR": " "}) == Settings()
    assert Settings() == Settings(
        threads=None, debug=False, text_cache_bytes=256 * MIB, cache_dir=None, decode_chunk=None
    )


def test_every_variable_is_read(tmp_path: Path) -> None:
    environ = {
        "SKYLAPSE_THREADS": "2",
        "SKYLAPSE_DEBUG": "1",
        "SKYLAPSE_TEXT_CACHE_MB": "0",
        "SKYLAPSE_CACHE_DIR": str(tmp_path / "not-yet-there"),
        "SKYLAPSE_DECODE_CHUNK": "8",
        "SKYLAPSE_TILE": "320",
        "SKYLAPSE_DECODER_DTYPE": "bf16",
        "SKYLAPSE_SCHEDULER": "shortest",
        "SKYLAPSE_MAX_BATCH_TOKENS": "512",
        "SKYLAPSE_MAX_QUEUED": "9",
        "SKYLAPSE_MEMORY_MB": "3",
        "SKYLAPSE_TENANT_WEIGHTS": "a=2, b=0.5",
        "SKYLAPSE_PROFILE_DIR": str(tmp_path),
        "SKYLAPSE_COMPILE": "true",
        "SKYLAPSE_QUANTIZE": "int8",
        "SKYLAPSE_KERNELS": "attention=sdpa",
        "HOME": "/root",
    }
    assert load_settings(environ) == Settings(
        threads=2,
        debug=True,
        text_cache_bytes=0,
        cache_dir=tmp_path / "not-yet-there",
        decode_chunk=8,
        tile=320,
        decoder_dtype="bf16",
        scheduler="shortest",
        max_batch_tokens=512,
        max_queued=9,
        memory_bytes=3 * 2**20,
        tenant_weights={"a": 2.0, "b": 0.5},
        profile_dir=tmp_path,
        compile=True,
        quantize="int8",
        kernels={"attention": "sdpa"},
    )


def test_tiles_may_be_left_to_us_or_switched_off() -> None:
    assert load_settings({}).tile == load_settings({"SKYLAPSE_TILE": "auto"}).tile == "auto"
    assert load_settings({"SKYLAPSE_TILE": "none"}).tile == "none"
    assert load_settings({"SKYLAPSE_TILE": "64"}).tile == 64


def test_cache_dir_may_be_in_the_home_folder() -> None:
    assert load_settings({"SKYLAPSE_CACHE_DIR": "~/models"}).cache_dir == Path.home() / "models"


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("SKYLAPSE_THREADS", "0", "a whole number from 1 to 1024"),
        ("SKYLAPSE_THREADS", "two", "a whole number from 1 to 1024"),
        ("SKYLAPSE_THREADS", "-1", "a whole number from 1 to 1024"),
        ("SKYLAPSE_TEXT_CACHE_MB", "1.5", "a whole number from 0 to 1048576"),
        ("SKYLAPSE_DECODE_CHUNK", "65", "a whole number from 1 to 64"),
        ("SKYLAPSE_DECODE_CHUNK", "9" * 5000, "a whole number from 1 to 64"),
        ("SKYLAPSE_TILE", "48", "auto, none or a multiple of 16 from 64"),
        ("SKYLAPSE_TILE", "100", "auto, none or a multiple of 16 from 64"),
        ("SKYLAPSE_TILE", "whole", "auto, none or a multiple of 16 from 64"),
        ("SKYLAPSE_DECODER_DTYPE", "half", "auto or fp32 or bf16 or fp16"),
        ("SKYLAPSE_DEBUG", "yes", "0 or 1"),
        ("SKYLAPSE_SCHEDULER", "lifo", "fair or fifo or shortest"),
        ("SKYLAPSE_TENANT_WEIGHTS", "a", 'like "a=2,b=0.5"'),
        ("SKYLAPSE_TENANT_WEIGHTS", "a=-1", 'like "a=2,b=0.5"'),
        (
            "SKYLAPSE_KERNELS",
            "attention=best",
            "like attention=triton|triton-ws|triton-int8|triton-fp8|xformers|flash3|varlen|sage|cudnn|flash|sdpa; "
            "linear=scaled_mm|scaled_mm-fast|triton|torch",
        ),
        ("SKYLAPSE_MEMORY_MB", "0", "a whole number from 1 to 1073741823"),
        ("SKYLAPSE_CACHE_DIR", __file__, "a folder"),
    ],
)
def test_wrong_variable_is_named_with_what_is_allowed(name: str, text: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be {re.escape(allowed)}, got .*{re.escape(repr(text))}$"):
        load_settings({name: text})


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files; variables that are set meanwhile are unset afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return tmp_path


def test_a_home_that_can_be_written_is_left_as_it_is(temporary: Path) -> None:
    os.environ["HOME"] = str(temporary)
    assert settle_home() is None and [*temporary.iterdir()] == []


def test_a_home_that_is_no_folder_is_replaced_by_a_private_one(temporary: Path) -> None:
    os.environ["HOME"] = str(temporary / "nowhere")
    told = settle_home()
    place = Path(os.environ["HOME"])
    assert told == f"HOME is no folder: what is cached goes to {place}"
    assert place.parent == temporary and place.stat().st_mode & 0o777 == 0o700
    assert settle_home() is None, "a second process finds it there"


def test_a_home_that_can_only_be_read_keeps_its_models(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so it is told that it may not."""
    home = temporary / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "SKYLAPSE_PROFILE_DIR"):
        os.environ.pop(name, None)
    os.environ["HOME"] = str(home)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "HOME cannot be written" in (settle_home() or "")
    assert os.environ["HOME"] == str(home) and "HF_HOME" not in os.environ
    for name in ("TRITON_CACHE_DIR", "SKYLAPSE_PROFILE_DIR"):
        assert Path(os.environ[name]).is_relative_to(temporary) and not os.environ[name].startswith(str(home))


def test_somebody_elses_folder_of_the_name_is_not_used(temporary: Path) -> None:
    (temporary / f"skylapse-home-{os.getuid()}").mkdir(mode=0o777)
    (temporary / f"skylapse-home-{os.getuid()}").chmod(0o777)
    os.environ["HOME"] = str(temporary / "nowhere")
    settle_home()
    assert Path(os.environ["HOME"]).stat().st_mode & 0o777 == 0o700


def test_nobody_known_and_no_home_is_no_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user that a container's /etc/passwd does not know."""

    def unknown(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "SKYLAPSE_PROFILE_DIR"):
        os.environ.pop(name, None)
    assert config.home() is None and Settings().profile_dir.is_relative_to(temporary)
    assert "HOME is not set" in (settle_home() or "") and os.environ["USER"].startswith("user-")


def test_a_misspelt_variable_is_told_with_the_one_that_was_meant() -> None:
    environ = {
        "SKYLAPSE_DECODR": "eager",
        "SKYLAPSE_THREADS": "2",
        "SKYLAPSE_TEST_SERVICE": "x",
        "SKYLAPSE_SERVE_QUOTA": "3",
    }
    assert misspelt(environ) == ["SKYLAPSE_DECODR is no setting, and is not read; did you mean SKYLAPSE_DECODER?"]
    assert misspelt({name: "" for name in environ}) == []
