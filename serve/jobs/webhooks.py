"""Delivers webhook events, signed as OpenAI and Standard Webhooks sign: at least once, under a stable id."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..core.config import ServeConfig
from ..store.outbox import Delivery, Outbox
from ..telemetry.tracing import WEBHOOK, Span, Tracer, Value
from . import safe_http as outbound

ATTEMPT_S = 10.0  # from the lookup of the name to the answer's status
CLAIM_S = 3 * ATTEMPT_S  # after this an attempt whose dispatcher died is made by another one
BATCH = 64  # attempts at once; a receiver that answers nothing holds up the others' next batch by ATTEMPT_S at most

log = logging.getLogger(__name__)


def make_secret() -> str:
    """Return a new secret for `SKYLAPSE_WEBHOOK_SECRET`."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def open_secret(config: ServeConfig) -> str:
    """Return the configured secret, or the data folder's, made at the first start. Raises ValueError if it is none.

    Dispatchers of a cluster share no folder, and receivers could not know all their secrets: there it is configured.
    """
    if not config.webhook_secret:
        path = config.folder / "webhook_secret"
        if not path.exists():
            config.folder.mkdir(parents=True, exist_ok=True)
            _create(path, make_secret())
            log.info("made a webhook secret, which is in the data folder")
        config = config.model_copy(update={"webhook_secret": path.read_text().strip()})
    sign(config.webhook_secret, "evt_0", 0, "")
    return config.webhook_secret


def _create(path: Path, text: str) -> None:
    """Create a file whole or not at all, for this user alone; one that another process has created meanwhile stays."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".") as file:  # mode 600
        file.write(text)
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)


def sign(secret: str, event_id: str, timestamp: int, body: str) -> dict[str, str]:
    """Return the three headers of an event.

    secret: "whsec_<base64>", or several with blanks between them while one takes the place of another: the event then
    has a signature by each, and receivers with either accept it. Raises ValueError for an invalid secret.
    """
    signed = f"{event_id}.{timestamp}.{body}".encode()
    keys = [_key(text) for text in secret.split()]
    if not keys:
        raise ValueError("webhooks cannot be signed without a secret")
    signatures = (base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys)
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


async def deliver(
    delivery: Delivery, secret: str, *, allow_private: bool = False, clock: Callable[[], float] = time.time
) -> outbound.Answer:
    """Make one attempt. Raises outbound.Unreachable. `clock` must be right: receivers refuse what is 5 minutes off."""
    headers = {"content-type": "application/json", "user-agent": "skylapse"}
    headers |= sign(secret, delivery.id, int(clock()), delivery.body)
    body = delivery.body.encode()
    return await outbound.post(delivery.url, headers, body, allow_private=allow_private, timeout_s=ATTEMPT_S)


async def deliver_due(
    outbox: Outbox,
    secret: str,
    config: ServeConfig,
    clock: Callable[[], float] = time.time,
    tracer: Tracer | None = None,
) -> int:
    """Attempt the events that are due, up to `BATCH` at once; return their number, so that 0 means: look again later.

    Raises what the store raises, once all attempts have ended; what could not be written down is attempted again.
    """
    due = await asyncio.to_thread(outbox.claim, BATCH, CLAIM_S)
    attempts = (_attempt(outbox, delivery, secret, config.webhook_private, clock, tracer) for delivery in due)
    for result in await asyncio.gather(*attempts, return_exceptions=True):
        if result is not None:
            raise result
    return len(due)


async def _attempt(
    outbox: Outbox,
    delivery: Delivery,
    secret: str,
    allow_private: bool,
    clock: Callable[[], float],
    tracer: Tracer | None,
) -> None:
    began_s, retry_after_s = time.time(), None
    try:
        answer = await deliver(delivery, secret, allow_private=allow_private, clock=clock)
    except outbound.Unreachable as error:
        problem = str(error)
        _trace(tracer, delivery, began_s, None)
    else:
        _trace(tracer, delivery, began_s, answer.status)
        if 200 <= answer.status < 300:
            return await asyncio.to_thread(outbox.delivered, delivery)
        problem, retry_after_s = f"answered {answer.status}", answer.retry_after_s
    if await asyncio.to_thread(outbox.failed, delivery, problem, retry_after_s):
        log.warning("gave up webhook %s of %s: %s", delivery.id, delivery.job_id, problem)  # an URL may hold a token


def _trace(tracer: Tracer | None, delivery: Delivery, began_s: float, status: int | None) -> None:
    """Write one attempt into its job's trace, without the URL, which may hold a token; status: None for no answer."""
    if tracer is None or delivery.trace is None:
        return
    is_delivered = status is not None and 200 <= status < 300
    outcome = "delivered" if is_delivered else "failed"
    attributes: dict[str, Value] = {"outcome": outcome, "attempt": delivery.attempts, "event_id": delivery.id}
    if status is not None:
        attributes["http.response.status_code"] = status
    span = Span(
        name=WEBHOOK,
        trace=delivery.trace,
        job_id=delivery.job_id,
        start_s=began_s,
        end_s=time.time(),
        key=f"{delivery.id}/{delivery.attempts}",
        attributes=attributes,
        error="" if is_delivered else outcome,
    )
    tracer.write(span)


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True) if secret.startswith("whsec_") else b""
    except binascii.Error:
        key = b""
    if len(key) < 24:  # the least that Standard Webhooks allows
        raise ValueError("a webhook secret must be like whsec_<base64 of 24 bytes or more>")
    return key
