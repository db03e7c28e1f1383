"""`skylapse keys`, `jobs` and `store`: on the store that is there, for people and as JSON, audited."""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command, Result, command_in

from skylapse.runtime.core.config import load_settings
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.jobs.services import Context, open_context
from skylapse.serve.store.processes import ENGINE

HINT = "`skylapse serve` makes one, or --data or SKYLAPSE_DATA names another"
COMMANDS = [
    ("keys", "create"),
    ("keys", "list"),
    ("keys", "rotate", "key_1"),
    ("keys", "revoke", "key_1"),
    ("jobs", "list"),
    ("jobs", "show", "video_1"),
    ("jobs", "cancel", "video_1"),
    ("jobs", "retry", "video_1"),
    ("store", "backup", "FILE"),
    ("store", "check"),
    ("usage",),
]
ASKED = {"prompt": "a star", "kind": "generate", "model": "demo", "size": "64x64", "seconds": "1"}


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name in ("SKYLAPSE_DATA", "SKYLAPSE_DATABASE_URL", "SKYLAPSE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return command_in(tmp_path, capsys, monkeypatch)


@pytest.fixture
def context(command: Command) -> Iterator[Context]:
    """The store of a service that has run in this folder."""
    context = open_context(ServeConfig())
    yield context
    context.database.close()


def answer(result: Result) -> dict[str, Any]:
    """The one JSON object of a command that has succeeded."""
    assert (result.status, result.stderr) == (0, ""), result
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(result: Result) -> str:
    """The one line of a command that was asked something wrong."""
    assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
    return result.stderr.removeprefix("skylapse: error: ").rstrip()


# -------------------------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_makes_no_store(arguments: tuple[str, ...], command: Command) -> None:
    result = command(*arguments)
    assert refused(result) == f"no store at {command.folder / 'skylapse-data'}: {HINT}"
    assert result.files == []
    assert command(*arguments, "--data", "").status == 2
    (command.folder / "elsewhere").mkdir()
    assert refused(command(*arguments, "--data", "elsewhere")).startswith(f"no store at {command.folder / 'elsewhere'}")
    assert list((command.folder / "elsewhere").iterdir()) == []


def test_a_command_makes_no_store_in_postgres(
    command: Command, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy import create_engine, inspect

    from skylapse.serve.store.tables import metadata

    engine = create_engine(postgres_url)
    metadata.drop_all(engine)
    monkeypatch.setenv("SKYLAPSE_DATABASE_URL", postgres_url.replace("skylapse@", "skylapse:hunter2@"))
    message = refused(command("keys", "list"))
    assert message.startswith("no store at postgresql+psycopg://skylapse:***@127.0.0.1") and message.endswith(HINT)
    assert not inspect(engine).has_table("jobs")
    engine.dispose()


def test_the_variable_names_the_store_of_every_command(
    context: Context, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context.keys.create("acme")
    monkeypatch.setenv("SKYLAPSE_DATA", str(tmp_path / "skylapse-data"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert load_settings().data == tmp_path / "skylapse-data" and ServeConfig().folder == tmp_path / "skylapse-data"
    assert ServeConfig(data="other").folder == tmp_path / "cwd" / "other"
    assert [key["tenant"] for key in answer(command("keys", "list", "--json"))["data"]] == ["acme"]
    assert refused(command("keys", "list", "--data", "other")).startswith("no store at")


def test_a_replica_is_told_the_folder_that_the_driver_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYLAPSE_DATA", "/somewhere")
    told = ServeConfig().model_dump(exclude_defaults=True)
    assert ServeConfig(**told).data == "/somewhere"


def test_a_short_key_in_the_environment_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYLAPSE_API_KEY", "sk-local")
    for arguments in (("serve",), ("keys", "list")):
        result = command(*arguments)
        assert refused(result) == "SKYLAPSE_API_KEY must have at least 16 characters, got 8"
        assert result.files == []


# ---------------------------------------------------------------------------------------------------------------- keys


def test_keys_are_made_listed_rotated_and_revoked(context: Context, command: Command) -> None:
    made = answer(command("keys", "create", "--name", "ci", "--tenant", "acme", "--days", "1", "--json"))
    key = context.keys.find(made["key"])
    assert key is not None and (key.tenant, key.scopes, key.name) == ("acme", ("read", "write"), "ci")
    new = answer(command("keys", "rotate", key.id, "--overlap-s", "60", "--json"))
    assert context.keys.find(made["key"]) and context.keys.find(new["key"])
    assert answer(command("keys", "revoke", new["id"], "--json"))["deleted"] and not context.keys.find(new["key"])
    listed = answer(command("keys", "list", "--json"))["data"]
    assert {found["id"]: found["state"] for found in listed} == {key.id: "valid", new["id"]: "revoked"}
    rows, _ = context.audit.page(10)
    assert [row.action for row in rows] == ["key.revoke", "key.rotate", "key.create"]
    assert {row.actor for row in rows} == {f"cli:{getpass.getuser()}"}


def test_people_are_shown_tables_and_times(context: Context, command: Command) -> None:
    made = command("keys", "create", "--name", "ci", "--scope", "operator").stdout
    facts = dict(line.split(maxsplit=1) for line in made.splitlines())
    assert facts["name"] == "ci" and facts["scopes"] == "operator" and context.keys.find(facts["key"])
    context.keys.used(facts["id"])
    other, _ = context.keys.create("acme", valid_s=3600)
    context.keys.revoke(other.id)
    head, *rows = command("keys", "list").stdout.splitlines()
    assert head.split() == [
        "ID",
        "NAME",
        "TENANT",
        "SCOPES",
        "PRIORITY",
        "STATE",
        "CREATED",
        "LAST",
        "USED",
        "EXPIRES",
        "SET",
        "BY",
    ]
    (row,) = rows
    assert facts["key"] not in row and row.count("T") == 2 and row.count("Z") == 2  # created, and last used
    assert len(command("keys", "list", "--all").stdout.splitlines()) == 3


def test_wrong_keys_are_one_line(context: Context, command: Command) -> None:
    assert refused(command("keys", "revoke", "key_1")) == "there is no valid key 'key_1'"
    assert refused(command("keys", "rotate", "key_1")) == "there is no valid key 'key_1'"
    assert refused(command("keys", "create", "--tenant", "a b")).startswith("tenant must be letters")
    assert refused(command("keys", "create", "--max-priority", "101")).startswith(
        "max_priority must be from -100 to 100"
    )
    assert refused(command("keys", "create", "--days", "-1")) == "valid_s must be above 0, got -86400.0"
    assert context.keys.page() == ([], False)


# ---------------------------------------------------------------------------------------------------------------- jobs


def test_jobs_are_listed_shown_cancelled_and_tried_again(context: Context, command: Command) -> None:
    job, other = (context.jobs.create(tenant, ASKED) for tenant in ("a", "b"))
    assert [found["id"] for found in answer(command("jobs", "list", "--json"))["data"]] == [other.id, job.id]
    assert [found["id"] for found in answer(command("jobs", "list", "--tenant", "a", "--json"))["data"]] == [job.id]
    assert answer(command("jobs", "list", "--state", "failed", "--json"))["data"] == []
    assert len(answer(command("jobs", "list", "--model", "demo", "--json"))["data"]) == 2
    assert answer(command("jobs", "show", job.id, "--json"))["state"] == "queued"
    assert answer(command("jobs", "cancel", job.id, "--json"))["error"]["code"] == "cancelled"
    new = answer(command("jobs", "retry", job.id, "--json"))
    assert (new["retried_from"], new["state"], new["tenant"]) == (job.id, "queued", "a")
    table = command("jobs", "list", "--limit", "1").stdout.splitlines()
    assert new["id"] in table[1] and table[2] == f"there are more: --after {new['id']}"
    shown = command("jobs", "show", job.id)
    assert "cancelled: The job was cancelled." in shown.stdout and "a star" not in shown.stdout
    assert [row.action for row in context.audit.page(9)[0]] == ["job.retry", "job.cancel"]


def test_wrong_jobs_are_one_line(context: Context, command: Command) -> None:
    job = context.jobs.create("a", ASKED)
    for name in ("show", "cancel", "retry"):
        assert refused(command("jobs", name, "video_1")) == "there is no job 'video_1'"
    assert refused(command("jobs", "list", "--after", "video_1")) == "there is no job 'video_1'"
    assert refused(command("jobs", "list", "--limit", "0")) == "limit must be from 1 to 1000, got 0"
    assert refused(command("jobs", "retry", job.id)).endswith("is queued")
    context.jobs.cancel("a", job.id)
    assert refused(command("jobs", "cancel", job.id)).endswith("has ended: it is failed")


# --------------------------------------------------------------------------------------------------------------- store


def test_a_store_is_backed_up_and_restored_elsewhere(context: Context, command: Command) -> None:
    job = context.jobs.create("a", {**ASKED, "inputs": ["image.png"]})
    context.artifacts.write(f"jobs/{job.id}/inputs/image.png", b"a picture")
    made = answer(command("store", "backup", "FILE", "--with-artifacts", "--json"))
    assert (made["jobs"], made["files"], made["kind"]) == (1, 1, "sqlite")
    assert answer(command("store", "restore", "FILE", "--data", "new", "--json"))["jobs"] == 1
    report = answer(command("store", "check", "--data", "new", "--json"))
    assert report["ok"] and (report["jobs"], report["files"]) == (1, 1)
    context.artifacts.remove("jobs")
    unsound = command("store", "check")
    assert unsound.status == 1 and f"- jobs/{job.id}/inputs/image.png is missing" in unsound.stdout


def test_a_store_that_somebody_needs_is_not_replaced(context: Context, command: Command) -> None:
    command("store", "backup", "FILE")
    assert "has jobs" not in command("store", "restore", "FILE").stderr  # nobody would miss it
    context.keys.create("later")
    assert refused(command("store", "restore", "FILE")).endswith("which would be lost: --force replaces them")
    context.processes.beat("engine-1", ENGINE, {})
    assert "is in use (engine engine-1 gave a sign 0 s ago)" in refused(command("store", "restore", "FILE"))
    assert len(context.keys.page()[0]) == 1
    assert command("store", "restore", "FILE", "--force").status == 0
    assert context.keys.page() == ([], False)  # by the connections that were open


def test_wrong_files_are_one_line_and_leave_nothing(context: Context, command: Command) -> None:
    (command.folder / "text").write_text("hello")
    assert refused(command("store", "restore", "none", "--data", "new")) == "FILE must be a backup, got 'none'"
    assert "is no backup of a store" in refused(command("store", "restore", "text", "--data", "new"))
    assert refused(command("store", "backup", "text")) == "FILE must be a new one, got 'text': --force replaces it"
    assert refused(command("store", "backup", "no/FILE")).startswith("FILE must be in a folder that is there")
    result = command("store", "backup", "skylapse-data")
    assert refused(result).startswith("FILE must be a new one") and result.files == ["skylapse-data", "text"]


def test_missing_programs_of_postgres_are_one_line(
    command: Command, postgres_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SKYLAPSE_DATABASE_URL", postgres_url)
    open_context(ServeConfig()).database.close()
    monkeypatch.setattr("skylapse.serve.commands.postgres_dump.DEBIAN", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = command("store", "backup", "FILE")
    assert refused(result).startswith("pg_dump is not on this machine") and "FILE" not in result.files
