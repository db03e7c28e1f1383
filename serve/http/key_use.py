"""Notes when keys were last used; a thread writes it at most once a minute, so no request waits for that."""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from ..accounts.keys import USED_EVERY_S, KeyStore

logger = logging.getLogger(__name__)


class KeyUse:
    """Key uses of one ingress. A thread writes what was noted, and ends; a process that dies loses a minute's."""

    def __init__(self, keys: KeyStore) -> None:
        self.keys = keys
        self._noted_s: dict[str, float] = {}  # key -> when a use of it was last noted
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def note(self, key_id: str) -> None:
        """Note that a request uses this key. Returns at once."""
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._noted_s.get(key_id, float("-inf")) < USED_EVERY_S:
                return
            self._noted_s[key_id] = now_s
            self._waiting.append(key_id)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="skylapse-key-use", daemon=True)
                self._writer.start()

    def wait(self) -> None:
        """Wait until all that was noted is written."""
        if (writer := self._writer) is not None:
            writer.join()

    def _write(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._writer = None
                    return
                key_id = self._waiting.pop()
            try:
                self.keys.used(key_id)
            except SQLAlchemyError as error:  # the next minute tries again
                logger.warning("a key's use could not be noted: %s", type(error).__name__)
