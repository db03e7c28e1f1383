"""Prompts' cross-attention keys and values, shared by requests with the same prompt, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from ..pack import TextContext

Key = tuple[str, str]  # (expert, prompt)


class TextCache:
    """Least recently used contexts leave first; a context that left is computed again when it is asked for."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self._contexts: OrderedDict[Key, TextContext] = OrderedDict()

    def get(self, key: Key, compute: Callable[[], TextContext]) -> TextContext:
        """The context under `key`, computed if it is not held; it is held from now on if the budget allows."""
        if key in self._contexts:
            self._contexts.move_to_end(key)
            return self._contexts[key]
        context = compute()
        if context.num_bytes <= self.budget_bytes:
            self._contexts[key] = context
            self.num_bytes += context.num_bytes
            while self.num_bytes > self.budget_bytes:
                self.num_bytes -= self._contexts.popitem(last=False)[1].num_bytes
        return context

    def __len__(self) -> int:
        return len(self._contexts)
