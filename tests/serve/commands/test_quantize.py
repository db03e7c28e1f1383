"""`skylapse serve --quantize`: from the command line and a config file to the engine that a replica loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skylapse.runtime.engine.engine import Engine
from skylapse.serve.commands.serve import _serve_parser
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.core.config_source import load_config


class Loaded(Exception):
    """Stands for an engine."""


def test_option_goes_before_the_file_and_the_file_before_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "serve.json"
    file.write_text(json.dumps({"quantize": "fp8"}))
    for arguments, quantize in (
        ([], None),
        (["--config", str(file)], "fp8"),
        (["--config", str(file), "--quantize", "int8"], "int8"),
        (["--config", str(file), "--quantize", "none"], "none"),
    ):
        assert load_config(_serve_parser().parse_args(arguments), {}).config.quantize == quantize
    file.write_text(json.dumps({"quantize": "int4"}))
    with pytest.raises(ValueError, match="quantize must be none or fp8 or int8"):
        load_config(_serve_parser().parse_args(["--config", str(file)]), {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's, when it is imported
@pytest.mark.parametrize(("quantize", "offload"), [(None, None), ("int8", "none")])
def test_replica_loads_its_engine_so(quantize: Any, offload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from skylapse.serve.deployment.replica import EngineReplica

    def from_pretrained(*arguments: Any, **options: Any) -> Engine:
        raise Loaded(arguments, options)

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    (group,) = ServeConfig(quantize=quantize, offload=offload, threads=1).groups
    with pytest.raises(Loaded) as loaded:
        EngineReplica.load(SimpleNamespace(group=group, _tell_download=None))
    asked = {"quantize": quantize, "offload": offload, "revision": None}
    assert loaded.value.args == (("demo", None, None, None), asked)
