"""The outbox: an event exists with its job's end, has one attempt at a time, and is tried until it arrives."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Row, select, update

from skylapse.serve.store.database import Database, now
from skylapse.serve.store.outbox import Delivery, Outbox, enqueue, retry_s
from skylapse.serve.store.tables import outbox as table

URL = "https://example.com/hook"


@pytest.fixture
def outbox(database: Database) -> Outbox:
    return Outbox(database, max_attempts=3)


def add(outbox: Outbox, job_id: str = "video_1") -> str:
    with outbox.database.write() as connection:
        return enqueue(connection, job_id, URL, "video.completed")


def claim_one(outbox: Outbox) -> Delivery:
    (delivery,) = outbox.claim(1, 60.0)
    return delivery


def pass_time(outbox: Outbox, seconds: float) -> None:
    """Move all times back, as if this much time had passed since everything that happened."""
    with outbox.database.write() as connection:
        columns = (table.c.next_at, table.c.delivered_at, table.c.failed_at)
        connection.execute(update(table).values({column: column - seconds for column in columns}))


def row(outbox: Outbox) -> Row:
    with outbox.database.read() as connection:
        return connection.execute(select(table, (table.c.next_at - now()).label("wait_s"))).one()


def test_an_event_is_as_openai_sends_it_and_stays_so_to_the_byte(outbox: Outbox) -> None:
    event_id = add(outbox)
    first = claim_one(outbox)
    event = json.loads(first.body)
    assert re.fullmatch(r"evt_[0-9a-f]{32}", event_id) and event["id"] == first.id == event_id
    assert set(event) == {"id", "object", "created_at", "type", "data"} and type(event["created_at"]) is int
    assert (event["object"], event["type"], event["data"]) == ("event", "video.completed", {"id": "video_1"})
    assert (first.url, first.job_id, first.attempts) == (URL, "video_1", 1)
    pass_time(outbox, 61)
    assert claim_one(outbox).body == first.body


def test_an_event_exists_only_if_its_transaction_commits(outbox: Outbox) -> None:
    with pytest.raises(RuntimeError), outbox.database.write() as connection:
        enqueue(connection, "video_1", URL, "video.failed")
        raise RuntimeError
    assert outbox.claim(9, 60.0) == []


def test_what_is_claimed_is_nobody_elses_until_the_attempt_has_had_its_time(outbox: Outbox) -> None:
    event_id = add(outbox)
    assert claim_one(outbox).attempts == 1
    assert outbox.claim(9, 60.0) == []
    pass_time(outbox, 59)
    assert outbox.claim(9, 60.0) == []
    pass_time(outbox, 2)  # the dispatcher that had it is dead
    again = claim_one(outbox)
    assert (again.id, again.attempts) == (event_id, 2)


def test_the_oldest_come_first_and_no_more_than_asked(outbox: Outbox) -> None:
    made = []
    for _ in range(5):
        pass_time(outbox, 1)
        made.append(add(outbox))
    assert [delivery.id for delivery in outbox.claim(3, 60.0)] == made[:3]
    assert [delivery.id for delivery in outbox.claim(3, 60.0)] == made[3:]


def test_events_are_claimed_once_by_many_at_once(outbox: Outbox) -> None:
    made = [add(outbox) for _ in range(12)]
    with ThreadPoolExecutor(6) as pool:
        claimed = [delivery.id for found in pool.map(lambda _: outbox.claim(4, 60.0), range(6)) for delivery in found]
    claimed += [delivery.id for delivery in outbox.claim(12, 60.0)]
    assert sorted(claimed) == sorted(made)


def test_what_was_delivered_is_not_sent_again(outbox: Outbox) -> None:
    add(outbox)
    outbox.delivered(claim_one(outbox))
    pass_time(outbox, 1e6)
    assert outbox.claim(9, 60.0) == [] and row(outbox).last_error is None


def test_what_failed_is_tried_again_later_and_given_up_at_last(outbox: Outbox) -> None:
    add(outbox)
    for attempt, given_up in ((1, False), (2, False), (3, True)):
        delivery = claim_one(outbox)
        assert delivery.attempts == attempt
        assert outbox.failed(delivery, f"answered {500 + attempt}") is given_up
        assert outbox.claim(9, 60.0) == []
        pass_time(outbox, 1e6)
    found = row(outbox)
    assert outbox.claim(9, 60.0) == [] and found.failed_at and not found.delivered_at
    assert found.last_error == "answered 503"


def test_a_receiver_may_ask_for_more_time_but_not_for_less(outbox: Outbox) -> None:
    add(outbox)
    outbox.failed(claim_one(outbox), "answered 503", retry_after_s=100.0)
    assert 99 < row(outbox).wait_s <= 100
    pass_time(outbox, 101)
    outbox.failed(claim_one(outbox), "answered 503", retry_after_s=0.0)
    assert 11 < row(outbox).wait_s < 19


def test_no_receiver_asks_for_years(outbox: Outbox) -> None:
    add(outbox)
    outbox.failed(claim_one(outbox), "answered 429", retry_after_s=1e9)
    assert row(outbox).wait_s <= 6 * 3600


def test_a_slow_attempt_decides_nothing_once_another_has_begun(outbox: Outbox) -> None:
    add(outbox)
    slow = claim_one(outbox)
    pass_time(outbox, 61)
    other = claim_one(outbox)
    assert not outbox.failed(slow, "timed out") and row(outbox).last_error is None
    outbox.delivered(other)
    outbox.max_attempts = 1
    assert not outbox.failed(slow, "timed out") and not outbox.failed(other, "timed out")
    assert row(outbox).delivered_at and not row(outbox).failed_at


def test_a_slow_attempt_that_arrived_after_all_counts(outbox: Outbox) -> None:
    add(outbox)
    slow = claim_one(outbox)
    pass_time(outbox, 61)
    claim_one(outbox)
    outbox.delivered(slow)
    pass_time(outbox, 61)
    assert outbox.claim(9, 60.0) == []


def test_long_errors_fit(outbox: Outbox) -> None:
    add(outbox)
    outbox.failed(claim_one(outbox), "x" * 1000)
    assert row(outbox).last_error == "x" * 200


def test_what_has_ended_is_forgotten_after_a_time_and_what_waits_is_not(outbox: Outbox) -> None:
    for _ in range(3):
        add(outbox)
    delivered, given_up, _ = outbox.claim(3, 60.0)
    outbox.delivered(delivered)
    outbox.max_attempts = 1
    outbox.failed(given_up, "answered 404")
    assert outbox.remove_old(100.0) == 0
    pass_time(outbox, 101)
    assert outbox.remove_old(100.0) == 2
    assert row(outbox).delivered_at is None


def test_waits_grow_are_bounded_and_twelve_attempts_span_most_of_a_day() -> None:
    waits = [[retry_s(attempts) for _ in range(50)] for attempts in range(1, 12)]
    assert all(3.75 <= wait <= 6.25 for wait in waits[0]) and all(max(wait) <= 1.25 * 6 * 3600 for wait in waits)
    assert len(set(waits[0])) > 1 and max(waits[2]) < min(waits[4])
    assert 16 * 3600 < sum(sum(wait) / len(wait) for wait in waits) < 30 * 3600
    assert retry_s(10**6) <= 1.25 * 6 * 3600
