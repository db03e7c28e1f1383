"""Prices of engine time by model and device; money is counted in billionths and never in floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

ANY = "*"  # a model that has no price of its own
NANOS = Decimal(10**9)  # of the currency's unit


@dataclass(frozen=True)
class Cost:
    """A cost. nanos: billionths of the currency's unit."""

    nanos: int
    currency: str

    def show(self) -> dict[str, str]:
        """Return the cost as the API shows it; the amount is text, exact, without an exponent."""
        return {"amount": amount_of(self.nanos), "currency": self.currency}


@dataclass(frozen=True)
class Prices:
    """The operator's prices. of: model, or `*` -> device -> price of a second. Without a price there is no cost."""

    of: Mapping[str, Mapping[str, Decimal]] = field(default_factory=dict)
    currency: str = ""

    def cost(self, model: str, device: str | None, engine_seconds: float) -> Cost | None:
        """Return the cost of this many seconds; None if the operator has set no price."""
        prices = (self.of.get(name, {}).get(device or "") for name in (model, ANY))
        price = next((price for price in prices if price is not None), None)
        if price is None:
            return None
        seconds = Decimal(repr(engine_seconds))
        return Cost(int((price * seconds * NANOS).to_integral_value(ROUND_HALF_EVEN)), self.currency)


def amount_of(nanos: int) -> str:
    amount = f"{Decimal(nanos) / NANOS:.9f}".rstrip("0").rstrip(".")
    return amount if amount not in ("-0", "") else "0"


def by_device(prices: Mapping[str, Any]) -> dict[str, dict[str, Decimal]]:
    """Return the configuration's table by device; in it, one price may stand for all devices."""
    return {
        model: {device: price for device in ("cpu", "cuda")} if isinstance(price, Decimal) else dict(price)
        for model, price in prices.items()
    }
