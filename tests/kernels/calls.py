"""Which operations of torch run, and with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Remembers each as (name, arguments by their names, those left at their defaults too)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = func._schema.arguments
        given = {one.name: one.default_value for one in known if one.has_default_value()}
        given |= {one.name: value for one, value in zip(known, args, strict=False)}
        self.made.append((str(func), given | dict(kwargs)))
        return func(*args, **kwargs)
