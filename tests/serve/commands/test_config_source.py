"""One schema for options, environment and file: who goes before whom, what is printed, what is said of a mistake."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from command import Command, command_in

from skylapse.serve.commands.config_check import effective_lines
from skylapse.serve.commands.serve import _serve_parser
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.core.config_source import DEFAULT, Effective, load_config, option_of, read_file, variable_of

yaml = pytest.importorskip("yaml")
# A value that each field takes, and that is not its default; of those whose kind does not say one.
VALUES: dict[str, Any] = {
    "quantize": "int8",
    "dtype": "fp32",
    "device": "cpu",
    "offload": "all",
    "downloads": "redirect",
    "quotas": {"acme": 3},
    "aliases": {"two": "demo"},
    "artifacts_options": {"key": "k"},
    "fingerprint": "0a" * 32,
    "canary": {"share": 0.1, "model": "demo"},
    "models": [{"name": "demo", "model": "demo"}],
    "autoscaling": {"max_replicas": 2},
    "prices": {"*": "0.0005"},
    "currency": "USD",
    "ignored_xids": [13],
}


def effective(*arguments: str, **environ: str) -> Effective:
    return load_config(_serve_parser().parse_args(list(arguments)), environ)


def value_of(name: str) -> Any:
    """Return a value other than the default."""
    if name in VALUES:
        return VALUES[name]
    default = ServeConfig.model_fields[name].get_default(call_default_factory=True)
    if isinstance(default, bool) or ServeConfig.model_fields[name].annotation == (bool | None):
        return not default
    if isinstance(default, str) or "str" in str(ServeConfig.model_fields[name].annotation):
        return "s3://bucket" if name == "artifacts_url" else "another"
    return 1 if default == 0.5 else 0.5 if default == 1.0 and isinstance(default, float) else 4


@pytest.mark.parametrize("name", ServeConfig.model_fields)
def test_every_field_has_an_option_a_variable_and_a_place_in_the_file(name: str, tmp_path: Path) -> None:
    value = value_of(name)
    text = value if isinstance(value, str) else json.dumps(value)
    file = tmp_path / "settings.yaml"
    bucket = {"artifacts_url": "s3://bucket"} if name == "downloads" else {}
    file.write_text(yaml.safe_dump({name: value, **bucket}))
    base = {variable_of(key): url for key, url in bucket.items()}
    dumped = []
    for found, source in (
        (effective(option_of(name), text, **base), option_of(name)),
        (effective(**{variable_of(name): text}, **base), variable_of(name)),
        (effective("--config", str(file)), str(file)),
    ):
        assert found.sources[name] == source
        dumped.append(found.config.model_dump()[name])
    assert dumped[0] == dumped[1] == dumped[2] != ServeConfig().model_dump()[name]


def test_an_option_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("quota: 1\nlease_s: 7\nengines: 2\n")
    found = effective("--config", str(file), "--quota", "3", SKYLAPSE_SERVE_QUOTA="2", SKYLAPSE_SERVE_LEASE_S="8")
    assert (found.config.quota, found.config.lease_s, found.config.engines) == (3, 8.0, 2)
    sources = [found.sources[name] for name in ("quota", "lease_s", "engines", "ingresses")]
    assert sources == ["--quota", "SKYLAPSE_SERVE_LEASE_S", str(file), DEFAULT]


def test_a_secret_of_the_environment_stays_there_and_is_printed_masked() -> None:
    url, secret = "postgresql+psycopg://u:geheim@db/skylapse", "whsec_geheim"
    found = effective(SKYLAPSE_DATABASE_URL=url, SKYLAPSE_WEBHOOK_SECRET=secret)
    assert found.config.database_url == found.config.webhook_secret == ""
    options = '{"key": "geheim", "client_kwargs": {"aws_secret": "geheim", "region_name": "r"}}'
    told = "\n".join([*effective_lines(found), *effective_lines(effective("--artifacts-options", options))])
    assert "geheim" not in told and "postgresql+psycopg://u:***@db/skylapse" in told
    assert "'***'" in told and "region_name: r" in told and "# SKYLAPSE_WEBHOOK_SECRET" in told


def test_what_is_printed_is_a_file_that_says_the_same(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    found = effective("--quotas", "{a: 3}", "--models", "[{name: demo, model: demo, threads: 2}]")
    file.write_text("\n".join(effective_lines(found)))
    assert effective("--config", str(file)).config == found.config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("webhooksecret: a", "webhooksecret: no such setting (FILE); did you mean webhook_secret?"),
        ("nothing_like_it: a", "nothing_like_it: no such setting (FILE)"),
        ("quota: -1", "quota must be a whole number of at least 1, got -1 (FILE)"),
        ("quota: [1", "config must be YAML or JSON, and line 1 of 'FILE' is neither"),
        ("quota: 1\nquota: 2", "config 'FILE', line 2: quota stands there twice"),
        ("- quota", "config must be an object of settings, got 'FILE'"),
        ("7: quota", "config 'FILE', line 1: a setting's name must be text, got 7"),
        ("quotas: {acme: many}", "quotas.acme must be a whole number of at least 1, got 'many' (FILE)"),
        ("device: tpu", "device must be cpu or cuda, got 'tpu' (FILE)"),
        (
            "models: [{name: a, modle: demo}]",
            "models.0.modle: no such setting (FILE); did you mean model?",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        effective("--config", str(file))
    assert str(caught.value) == said.replace("FILE", str(file))


def test_a_misspelt_variable_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ValueError, match=r"^SKYLAPSE_SERVE_QUOTTA: no such setting; did you mean SKYLAPSE_SERVE_QUOTA"):
        effective(SKYLAPSE_SERVE_QUOTTA="3")


def test_json_with_tabs_is_read_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n\t"quota": 3\n}')
    assert read_file(tmp_path / "a.json") == {"quota": 3}


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    pytest.importorskip("ray")
    return command_in(tmp_path, capsys, monkeypatch)


def test_check_says_yes_and_writes_nothing(command: Command) -> None:
    result = command("serve", "--check", "--device", "cpu", "--data", "new", "--port", "39999")
    assert (result.status, result.stdout) == (0, "a service can be started with these settings\n"), result.stderr
    assert result.files == []


def test_check_tells_all_that_is_wrong(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = command(
        *("serve", "--check", "--device", "cpu", "--data", "file", "--model", "nope", "--port", "0"),
        *("--database-url", "postgresql+psycopg://u:geheim@127.0.0.1:1/x"),
    )
    lines = result.stderr.splitlines()
    assert result.status == 2 and len(lines) == 4 and all(line.startswith("skylapse: error: ") for line in lines)
    for word in (
        "data must be a folder",
        "port must be",
        "model",
        "the store does not answer: postgresql+psycopg://u:***@",
    ):
        assert sum(word in line for line in lines) >= 1, (word, lines)
    assert "geheim" not in result.stderr


def test_check_reads_a_store_that_is_there_and_changes_none_of_it(command: Command, tmp_path: Path) -> None:
    from skylapse.serve.jobs.services import open_context

    open_context({"data": str(tmp_path / "data")}).database.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert command("serve", "--check", "--device", "cpu", "--data", "data", "--port", "39999").status == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before
    (tmp_path / "data" / "jobs.db").write_bytes(b"no database" * 100)
    result = command("serve", "--check", "--device", "cpu", "--data", "data", "--port", "39999")
    assert result.status == 2 and "the store does not answer: sqlite:///" in result.stderr
    assert stat.S_ISDIR((tmp_path / "data").stat().st_mode)


def test_print_config_prints_every_setting_once(command: Command) -> None:
    result = command("serve", "--print-config", "--quota", "3")
    lines = result.stdout.splitlines()
    assert result.status == 0 and [line.partition(":")[0] for line in lines] == [*ServeConfig.model_fields]
    assert any(line.split() == ["quota:", "3", "#", "--quota"] for line in lines) and result.files == []
