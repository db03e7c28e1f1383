"""The bad requests themselves: enough of every class, each made and judged without a server."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from ..bad_requests import CASES, CLASSES
from ..raw_http import Answer

ENVELOPE = b'{"error": {"message": "no", "type": "invalid_request_error", "param": null, "code": null}}'


def test_there_are_more_than_seventy_and_four_at_least_of_each_class() -> None:
    counts = Counter(case.kind for case in CASES)
    assert len(CASES) >= 70 and {*counts} == {*CLASSES} and min(counts.values()) >= 4
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_body_can_be_made_and_is_small_unless_it_is_endless(kind: str) -> None:
    for case in (case for case in CASES if case.kind == kind):
        body = case.body()
        pieces = [body] if isinstance(body, bytes) else [*islice(body, 3)]
        assert sum(map(len, pieces)) < 8 * 2**20 and (isinstance(body, bytes) or all(pieces)), case.id
        assert case.by_proxy or all(400 <= status < 500 for status in case.statuses), case.id


def test_an_answer_is_judged_by_its_status_envelope_and_code() -> None:
    case = next(case for case in CASES if case.id == "prompt_too_long")
    good = ENVELOPE.replace(b'"code": null', b'"code": "invalid_value"')
    assert case.problem(Answer(400, {}, good)) is None
    for answer in (
        Answer(200, {}, good),
        Answer(500, {}, good),
        Answer(400, {}, ENVELOPE),
        Answer(400, {}, b'{"detail": []}'),
        Answer(400, {}, b"[]"),
        Answer(400, {}, good.replace(b"no", b"Traceback (most recent call last)")),
        Answer(None, {}, b""),
    ):
        assert case.problem(answer) is not None
