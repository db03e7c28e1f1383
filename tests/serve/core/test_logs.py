"""Logs are lines of JSON that name jobs, and hold no key, prompt or path."""

from __future__ import annotations

import json
import logging

from skylapse.serve.core.logs import JsonLines

ID = "video_" + "0a" * 16


def line(message: str, *arguments: object, error: BaseException | None = None) -> dict[str, object]:
    info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("skylapse.serve.engine.worker", logging.WARNING, __file__, 1, message, arguments, info)
    return dict(json.loads(JsonLines().format(record)))


def test_a_line_names_its_job() -> None:
    found = line("job %s failed: %s", ID, "timeout")
    assert (found["job"], found["level"], found["message"]) == (ID, "warning", f"job {ID} failed: timeout")
    assert str(found["time"]).endswith("Z")


def test_an_error_is_told_by_its_type_and_place_and_not_by_its_words() -> None:
    try:
        raise ValueError("a secret prompt at /home/somebody")
    except ValueError as error:
        found = line("job %s failed", ID, error=error)
    assert found["error"] == "ValueError" and ":" in str(found["at"])
    assert "secret" not in json.dumps(found) and "/home" not in json.dumps(found)
