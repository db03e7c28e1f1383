"""The jobs that one deployment's engines take: a model's, and of these all, its canary's share, or the rest."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import and_, or_
from sqlalchemy.sql.elements import ColumnElement

from .tables import CANARY, jobs


@dataclass(frozen=True)
class ModelQueue:
    """A model's jobs. is_default: also those without a model, of a release that served one. canary: None takes both."""

    model: str
    is_default: bool = False
    canary: bool | None = None

    @property
    def where(self) -> ColumnElement[bool]:
        """The condition that selects the queue's jobs in the store; it agrees with `takes`."""
        mine: ColumnElement[bool] = jobs.c.model == self.model
        if self.is_default:
            mine = or_(mine, jobs.c.model.is_(None))
        if self.canary is None:
            return mine
        is_canary = jobs.c.variant == CANARY
        return and_(mine, is_canary if self.canary else or_(jobs.c.variant.is_(None), ~is_canary))

    def takes(self, model: str | None, variant: str | None) -> bool:
        is_mine = model == self.model or (model is None and self.is_default)
        return is_mine and self.canary in (None, variant == CANARY)
