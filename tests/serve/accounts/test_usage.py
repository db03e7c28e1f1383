"""A video's usage is told on it and summed up by day, tenant and model, on the wire and by the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, update

from skylapse.cli import main
from skylapse.serve.accounts.keys import digest_of
from skylapse.serve.accounts.usage import Asked, parse_day, parse_groups, read_usage
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.store.database import Database
from skylapse.serve.store.tables import api_keys, ledger

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine

    from ..service import Service

ROW = dict(at=0.0, job_id="x", epoch=1, job_class="default", reason="completed", jobs=1, completed=1, device="cpu",
           engine_seconds=1.5, evaluations=2, steps_computed=1, steps_skipped=0, lost_seconds=0.0, lost_steps=0,
           frames=17, video_seconds=2.125)  # fmt: skip


def write(database: Database, *rows: dict[str, Any]) -> None:
    with database.write() as connection:
        for row in rows:
            connection.execute(insert(ledger).values(**ROW | dict(tenant="a", model="one", day="2026-11-01") | row))


def buckets(database: Database, by: str = "day", **asked: Any) -> list[tuple[Any, ...]]:
    given = dict(start=date(2026, 11, 1), end=date(2026, 11, 30), by=parse_groups("by", by)) | asked
    found, _ = read_usage(database, Asked(**given))
    return [(b.day, b.tenant, b.model, b.jobs, b.engine_seconds, b.cost.show() if b.cost else None) for b in found]


def test_sums_are_by_what_is_asked_for(database: Database) -> None:
    write(database, {}, {"model": "two"}, {"tenant": "b", "day": "2026-11-02"}, {"day": "2026-12-01"}, {"jobs": 0})
    assert buckets(database) == [("2026-11-01", None, None, 2, 4.5, None), ("2026-11-02", None, None, 1, 1.5, None)]
    assert [row[:4] for row in buckets(database, "model,tenant")] == [
        (None, "a", "one", 1),
        (None, "a", "two", 1),
        (None, "b", "one", 1),
    ]
    assert [row[:4] for row in buckets(database, "model", tenant="a")] == [(None, "a", "one", 1), (None, "a", "two", 1)]
    assert buckets(database, end=date(2026, 11, 1)) == [("2026-11-01", None, None, 2, 4.5, None)]
    assert buckets(database, start=date(2027, 1, 1), end=date(2027, 1, 2)) == []


def test_costs_are_exact_and_currencies_are_not_added_up(database: Database) -> None:
    priced = {"cost_nanos": 100_000_000, "currency": "EUR"}
    write(database, *[priced] * 3, {})
    assert buckets(database) == [("2026-11-01", None, None, 4, 6.0, {"amount": "0.3", "currency": "EUR"})]
    write(database, {"cost_nanos": 2_000_000_000, "currency": "USD"})
    assert [row[3:] for row in buckets(database)] == [
        (1, 1.5, None),
        (3, 4.5, {"amount": "0.3", "currency": "EUR"}),
        (1, 1.5, {"amount": "2", "currency": "USD"}),
    ]


def test_pages_follow_each_other(database: Database) -> None:
    write(database, *({"day": f"2026-11-{day:02}", "model": model} for day in range(1, 6) for model in ("one", "two")))
    asked = Asked(start=date(2026, 11, 1), end=date(2026, 11, 30), by=("day", "model"))
    seen, after = [], None
    for _ in range(4):
        found, has_more = read_usage(database, asked, 3, after)
        seen += [(b.day, b.model) for b in found]
        after = found[-1].cursor
        assert has_more == (len(seen) < 10)
    assert seen == [(f"2026-11-{day:02}", model) for day in range(1, 6) for model in ("one", "two")]
    for wrong in ("?", "W10", "", "WzFd"):
        with pytest.raises(ValueError, match="after must be"):
            read_usage(database, asked, 3, wrong)


@pytest.mark.parametrize("text", ["2026-13-01", "20261101", "today", "", "2026-W48-1", "x" * 500])
def test_what_is_no_day_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"^start must be a day such as 2026-11-30, got "):
        parse_day("start", text)


# ------------------------------------------------------------------------------------------------------- on the wire


@pytest.fixture(scope="module")
def house(demo_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from ..service import serving

    prices = {"*": {"cpu": "0.002", "cuda": "1"}}
    with serving(tmp_path_factory.mktemp("billed"), demo_engine, prices=prices, currency="USD") as service:
        yield service


def as_operator(service: Service, tenant: str) -> str:
    text = service.key(tenant)
    with service.context.database.write() as connection:
        connection.execute(
            update(api_keys).where(api_keys.c.digest == digest_of(text)).values(scopes=["read", "operator"])
        )
    return text


def test_a_video_tells_what_it_has_used(house: Service) -> None:
    key = house.key("a")
    video = house.make(key, num_inference_steps=12, cache="fast")
    usage = video["usage"]
    assert usage["device"] == "cpu" and usage["frames"] == 5
    assert usage["steps_computed"] + usage["steps_skipped"] == 12 and usage["steps_skipped"] > 0
    assert usage["evaluations"] == 2 * usage["steps_computed"]
    assert 0 < usage["engine_seconds"] <= video["inference_time_s"]
    assert usage["cost"]["currency"] == "USD"
    amount = Decimal(usage["cost"]["amount"])
    assert abs(amount - Decimal("0.002") * Decimal(str(usage["engine_seconds"]))) < Decimal("0.00000001")


def test_a_video_that_has_not_ended_tells_no_usage(house: Service) -> None:
    from ..service import SMALL

    with house.client() as client, house.paused():
        made = client.post("/v1/videos", json=SMALL).json()
        assert made["usage"] is None and made["inference_time_s"] is None
        ended = client.post(f"/v1/videos/{made['id']}/cancel").json()
    assert ended["inference_time_s"] is None
    assert ended["usage"] == {"engine_seconds": 0.0, "device": None, "steps_computed": 0, "steps_skipped": 0,
                              "evaluations": 0, "frames": 0, "cost": None}  # fmt: skip


def test_a_tenant_sees_its_own_usage_and_the_operator_everybodys(house: Service) -> None:
    first, second = house.key("first"), house.key("second")
    videos = [house.make(first), house.make(first), house.make(second)]
    with house.client(first) as client:
        client.delete(f"/v1/videos/{videos[0]['id']}")
        own = client.get("/v1/usage").json()
        assert client.get("/v1/usage?tenant=first&group_by=day,model").json()["data"][0]["model"] == "demo"
        other = client.get("/v1/usage?tenant=second")
        assert other.status_code == 403 and other.json()["error"]["param"] == "tenant"
    (bucket,) = own["data"]
    assert own["object"] == "list" and own["has_more"] is False and own["first_id"] == own["last_id"] is not None
    assert {**bucket, "engine_seconds": 0, "cost": 0} == {
        "object": "usage.bucket",
        "day": datetime.now(UTC).date().isoformat(),
        "tenant": "first",
        "model": None,
        "jobs": 2,
        "completed": 2,
        "failed": 0,
        "engine_seconds": 0,
        "video_seconds": pytest.approx(2 * float(videos[0]["seconds"]), abs=1e-3),
        "cost": 0,
    }
    assert bucket["engine_seconds"] == pytest.approx(sum(v["usage"]["engine_seconds"] for v in videos[:2]), abs=1e-5)
    assert Decimal(bucket["cost"]["amount"]) == sum(Decimal(v["usage"]["cost"]["amount"]) for v in videos[:2])
    with house.client(as_operator(house, "operators")) as client:
        assert client.get("/v1/usage?tenant=second").json()["data"][0]["tenant"] == "second"
        everybody = client.get("/v1/usage?group_by=tenant").json()["data"]
        assert {"first", "second"} <= {bucket["tenant"] for bucket in everybody}
        assert client.get("/v1/usage?tenant=*").json()["data"][0]["tenant"] is None
        assert client.get("/v1/usage").json()["data"] == []  # its own tenant's
        page = client.get("/v1/usage?group_by=tenant&limit=1").json()
        after = client.get(f"/v1/usage?group_by=tenant&limit=1&after={page['last_id']}").json()
        assert page["has_more"] and after["data"][0]["tenant"] > page["data"][0]["tenant"]


def test_an_operator_needs_no_other_scope_and_a_writer_sees_nothing(house: Service) -> None:
    operator, writer = as_operator(house, "operators"), house.key(scopes=("write",))
    with house.context.database.write() as connection:
        connection.execute(update(api_keys).where(api_keys.c.digest == digest_of(operator)).values(scopes=["operator"]))
    with house.client(operator) as client:
        assert client.get("/v1/usage?tenant=*").status_code == 200
    with house.client(writer) as client:
        assert client.get("/v1/usage").status_code == 403


def test_a_cookie_never_carries_the_operators_scope(house: Service) -> None:
    text = as_operator(house, "operators")
    key = house.context.keys.find(text)
    assert key is not None
    cookie = house.context.sessions.open(key, 60.0)
    with house.client() as client:
        del client.headers["authorization"]
        client.headers["cookie"] = f"skylapse_session={cookie}"
        assert client.get("/v1/usage").status_code == 200
        assert client.get("/v1/usage?tenant=*").status_code == 403


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("start=yesterday", "start"),
        ("end=2026-02-30", "end"),
        ("start=2026-11-02&end=2026-11-01", "start"),
        ("group_by=hour", "group_by"),
        ("group_by=day,day", "group_by"),
        ("group_by=", "group_by"),
        ("after=nothing", "after"),
        ("limit=0", "limit"),
    ],
)
def test_what_is_wrong_is_named(house: Service, query: str, param: str) -> None:
    with house.client() as client:
        answer = client.get(f"/v1/usage?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_deleted_job_is_on_the_bill(house: Service) -> None:
    key = house.key("deletes")
    with house.client(key) as client:
        made = client.post("/v1/videos", json={"prompt": "a star", "num_inference_steps": 500, "size": "64x64"}).json()
        until_s = time.monotonic() + 30
        while client.get(f"/v1/videos/{made['id']}").json()["progress"] < 1:
            assert time.monotonic() < until_s
            time.sleep(0.02)
        assert client.delete(f"/v1/videos/{made['id']}").status_code == 200
        (bucket,) = client.get("/v1/usage").json()["data"]
    assert (bucket["jobs"], bucket["failed"]) == (1, 1) and bucket["engine_seconds"] > 0


def test_the_command_line_tells_the_same(
    house: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = house.key("commands")
    house.make(key)
    with house.client(key) as client:
        answered = client.get("/v1/usage?group_by=day,model").json()
    place = ("--data", house.context.config.data, "--tenant", "commands", "--by", "model,day")
    assert main(["usage", *place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answered
    assert main(["usage", *place]) == 0
    title, row = capsys.readouterr().out.splitlines()
    assert title.split()[:4] == ["DAY", "MODEL", "JOBS", "COMPLETED"] and row.split()[1:4] == ["demo", "1", "1"]
    assert row.endswith("USD")


def test_the_command_line_makes_no_store_and_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["usage", "--data", str(tmp_path)]) == 2
    assert "no store at" in capsys.readouterr().err and not list(tmp_path.iterdir())
    tomorrow = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
    for arguments, said in (
        (["--from", tomorrow], "--from must not be after --to"),
        (["--to", "2026"], "--to must be a day"),
        (["--by", "week"], "--by must be of day, tenant, model"),
    ):
        assert main(["usage", "--data", str(tmp_path), *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {"prices": {"demo": "-1"}},
        {"prices": {"demo": "NaN"}},
        {"prices": {"demo": {"tpu": "1"}}},
        {"prices": {"demo": "0.0000000001"}},
        {"currency": "euro"},
    ],
)
def test_prices_that_are_none_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ServeConfig(**fields)


def test_a_price_may_be_one_for_all_devices() -> None:
    prices = ServeConfig(prices={"demo": Decimal("0.25")}).price_list
    assert prices.of == {"demo": {"cpu": Decimal("0.25"), "cuda": Decimal("0.25")}} and prices.currency == "EUR"
