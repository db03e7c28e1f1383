"""`import skylapse` and `skylapse --help` are quick, in CPU seconds: a busy machine must not fail a test."""

import resource
import subprocess
import sys

import pytest


def cpu_seconds(*arguments: str) -> float:
    """Return the CPU seconds of one Python process, interpreter included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_import_takes_less_than_300_ms() -> None:
    assert cpu_seconds("-c", "import skylapse") < 0.3


@pytest.mark.parametrize("command", [["--help"], ["generate", "--help"]])
def test_help_takes_less_than_500_ms(command: list[str]) -> None:
    assert cpu_seconds("-m", "skylapse", *command) < 0.5


def test_request_is_made_without_torch_or_numpy() -> None:
    code = (
        "import sys, skylapse; skylapse.VideoRequest(prompt='a star'); assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_listed() -> None:
    import skylapse

    assert {"Engine", "VideoRequest", "Video", "__version__"} <= {*dir(skylapse)}
    with pytest.raises(AttributeError, match="has no attribute 'Enigne'"):
        skylapse.Enigne  # noqa: B018


def test_a_models_configs_are_read_and_checked_without_torch() -> None:
    """An ingress does so, having no use for torch's memory, and so does the command line before it loads an engine."""
    code = (
        "import sys; from skylapse.runtime.checkpoints.registry import describe; assert describe('demo').tasks;"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
