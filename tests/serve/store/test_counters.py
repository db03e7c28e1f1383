"""Counters in the store never fall, many may add to one at a time, and nobody can make them grow without bound."""

from __future__ import annotations

import json
import threading
from itertools import product

import pytest
from sqlalchemy import func, select

from skylapse.serve.core import metric_definitions as table
from skylapse.serve.core.metric_definitions import BUCKETS, COUNTED, MAX_SERIES, METRICS
from skylapse.serve.core.prices import Cost, Prices, amount_of
from skylapse.serve.store.counters import VALUE, Counters, Tally, read_counters
from skylapse.serve.store.database import Database
from skylapse.serve.store.tables import metrics

MODELS, CLASSES = ("one", "two", "three"), tuple(f"class-{n}" for n in range(8))


def add(database: Database, tally: Tally, counters: Counters | None = None) -> None:
    with database.write() as connection:
        (counters or Counters()).add(connection, tally)


def sets(database: Database, metric: table.Metric) -> dict[tuple[str, ...], dict[str, float]]:
    with database.read() as connection:
        return dict(read_counters(connection))[metric]


def test_what_is_added_is_summed(database: Database) -> None:
    for count in (1, 2):
        tally = Tally()
        tally.add(table.JOBS_CREATED, "demo", "generate", "default", by=count)
        tally.observe(table.QUEUE_WAIT, "demo", "default", seconds=0.1)
        tally.observe(table.QUEUE_WAIT, "demo", "default", seconds=4000.0)
        add(database, tally)
    assert sets(database, table.JOBS_CREATED) == {("demo", "generate", "default"): {VALUE: 3.0}}
    waits = sets(database, table.QUEUE_WAIT)[("demo", "default")]
    assert waits == {"0.1": 2.0, "+Inf": 2.0, "sum": pytest.approx(8000.2)}


def test_many_add_to_the_same_rows_without_a_deadlock(database: Database) -> None:
    """In any order of their own; on Postgres rows are locked in one."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        counters = Counters()
        try:
            for step in range(20):
                tally = Tally()
                for model in MODELS if (number + step) % 2 else MODELS[::-1]:
                    tally.add(table.STEPS, model, "computed")
                    tally.add(table.ENGINE_SECONDS, model, CLASSES[step % 8], by=0.5)
                    tally.observe(table.STEP_SECONDS, model, seconds=step / 10)
                add(database, tally, counters)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sets(database, table.STEPS) == {(model, "computed"): {VALUE: 160.0} for model in MODELS}
    assert sum(parts[VALUE] for parts in sets(database, table.ENGINE_SECONDS).values()) == 240.0
    assert sum(sets(database, table.STEP_SECONDS)[("one",)][str(b)] for b in (0.1, 0.3, 1, 3)) == 160.0


def test_the_table_keeps_within_its_series() -> None:
    assert sum(metric.max_series(len(MODELS)) for metric in METRICS.values()) <= MAX_SERIES


def test_clients_and_errors_cannot_make_series(database: Database) -> None:
    """Everything that comes from outside, in more values than there may be: what is beyond them is counted as other."""
    values = {
        "model": MODELS,
        "class": (*CLASSES, "ninth"),
        "kind": tuple(f"kind-{n}" for n in range(12)),
        "outcome": ("not_finite", "timeout", "cancelled", *(f"code-{n}" for n in range(12)), "completed"),
        "route": tuple(f"/v1/{n}" for n in range(20)),
        "method": ("GET", "POST", "DELETE"),
        "status": ("200", "400", "404", "500"),
        "category": tuple(f"category-{n}" for n in range(30)),
        "stage": ("intake", "engine", "prompt", "frames"),
    }
    closed = {"stage": ("encode", "denoise", "decode", "finish"), "how": ("computed", "skipped", "lost")}
    closed["outcome"] = ("delivered", "retried", "given_up")
    counters, expected = Counters(), 0
    for metric in COUNTED:
        given = values if metric.is_open else values | closed
        tally = Tally()
        for labels in product(*(given[name] for name in metric.labels)):
            if metric.kind == table.HISTOGRAM:
                tally.observe(metric, *labels, seconds=1.0)
            else:
                tally.add(metric, *labels)
            expected += 1
        add(database, tally, counters)
        add(database, tally)  # by a process that has not seen them yet
    with database.read() as connection:
        found = dict(read_counters(connection))
        assert connection.scalar(select(func.sum(metrics.c.value)).where(metrics.c.part != "sum")) == 2 * expected
    series = sum(metric.series_a_set * len(there) for metric, there in found.items())
    gauges = sum(metric.max_series(3) for metric in METRICS.values() if metric.kind == table.GAUGE)
    assert series + gauges <= MAX_SERIES
    seconds = found[table.JOB_SECONDS]
    for model in MODELS:  # completed jobs have room of their own, whatever fails first
        assert {labels[2] for labels in seconds if labels[:2] == (model, "completed")} == {*CLASSES}
        assert (model, "other", "other") in seconds
    assert len(found[table.HTTP_REQUESTS]) == 161 and ("other",) * 3 in found[table.HTTP_REQUESTS]


def test_labels_that_another_release_has_are_not_shown(database: Database) -> None:
    with database.write() as connection:
        labels = json.dumps(["demo", "cpu", "a label that this release does not know"])
        connection.execute(metrics.insert().values(name=table.STEPS.name, labels=labels, part=VALUE, value=1.0))
    assert sets(database, table.STEPS) == {}


def test_buckets_are_those_of_the_contract() -> None:
    assert BUCKETS == (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)


@pytest.mark.parametrize(
    ("nanos", "amount"),
    [(3_100_000, "0.0031"), (0, "0"), (1, "0.000000001"), (12_000_000_000, "12"), (-500_000_000, "-0.5")],
)
def test_amounts_are_exact_text(nanos: int, amount: str) -> None:
    assert amount_of(nanos) == amount


def test_costs_are_decimal() -> None:
    from decimal import Decimal

    prices = Prices({"demo": {"cpu": Decimal("0.1")}, "*": {"cuda": Decimal("0.3")}}, "USD")
    assert prices.cost("demo", "cpu", 0.3) == Cost(30_000_000, "USD")
    assert prices.cost("demo", "cuda", 1.0) == Cost(300_000_000, "USD")
    assert prices.cost("other", "cpu", 1.0) is None and prices.cost("demo", None, 1.0) is None
