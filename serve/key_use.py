"""When keys were last used, written once a minute at most and never by the request that uses one."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy.exc import SQLAlchemyError

from .store.keys import USED_EVERY_S, KeyStore

logger = logging.getLogger(__name__)


class KeyUse:
    """One an ingress. Notes that are lost with a process are at most a minute's."""

    def __init__(self, keys: KeyStore) -> None:
        self.keys = keys
        self._noted_s: dict[str, float] = {}  # key -> when this process last wrote of it
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="skylapse-key-use")

    def note(self, key_id: str) -> None:
        """A request uses this key. Returns at once."""
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._noted_s.get(key_id, float("-inf")) < USED_EVERY_S:
                return
            self._noted_s[key_id] = now_s
        self._writer.submit(self._write, key_id)

    def close(self) -> None:
        """Wait for what is being written."""
        self._writer.shutdown()

    def _write(self, key_id: str) -> None:
        try:
            self.keys.used(key_id)
        except SQLAlchemyError as error:  # the next minute tries again
            logger.warning("a key's use could not be noted: %s", type(error).__name__)
