"""Error codes and messages for clients of failed jobs, which tell nothing about the inside of the service."""

from __future__ import annotations

from ...runtime.core.events import DeadlineExceeded, NotFinite, OutOfMemory, RequestTooLarge

KNOWN: tuple[tuple[type[Exception], str, str], ...] = (
    (DeadlineExceeded, "timeout", "The job was not finished in time."),
    (NotFinite, "not_finite", "The model produced values that are not finite for this request."),
    (OutOfMemory, "out_of_memory", "The device's memory did not suffice for this request."),
    (RequestTooLarge, "too_large", "The request does not fit into the engine's memory."),
    (ValueError, "invalid_request", "The model cannot make what was asked for."),
)


def failure(error: Exception) -> tuple[str, str]:
    """Return (code, message) of an error that ended a job."""
    for kind, code, message in KNOWN:
        if isinstance(error, kind):
            return code, message
    return "internal_error", "The job failed for a reason that is not its own."
