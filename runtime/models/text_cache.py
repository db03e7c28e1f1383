"""Prompts' rows, keys and values, shared by requests with the same prompt, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Key = tuple[str, str]  # (what: the encoder's rows, or whose keys and values; the prompt)


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Entry = TypeVar("Entry", bound=Sized)


class TextCache:
    """Least recently used entries leave first; one that left is computed again when it is asked for."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[Key, Any] = OrderedDict()

    def get(self, key: Key, compute: Callable[[], Entry]) -> Entry:
        """The entry under `key`, computed if it is not held; it is held from now on if the budget allows."""
        if key in self._entries:
            self._entries.move_to_end(key)
            held: Entry = self._entries[key]
            return held
        entry = compute()
        if entry.nbytes <= self.budget_bytes:
            self._entries[key] = entry
            self.num_bytes += entry.nbytes
            while self.num_bytes > self.budget_bytes:
                self.num_bytes -= self._entries.popitem(last=False)[1].nbytes
        return entry

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)
