"""A threshold as people write it."""

from __future__ import annotations

import argparse
import math


def percent(text: str) -> float:
    """5% or 0.05 -> 0.05; above 0 and below 100 %."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a share such as 5% or 0.05, got {text!r}")
    return value
