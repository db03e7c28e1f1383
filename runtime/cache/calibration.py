"""What `skylapse models calibrate` measured of a checkpoint, and the file beside it that keeps this: cache.json.

An entry holds for one solver, step count, shift and quantisation of the blocks, and the file for one set of weights;
nothing is interpolated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.fingerprint import fingerprint

FILE = "cache.json"


@dataclass(frozen=True)
class Calibration:
    """One solver, step count and shift.

    magnitudes: for each step, mean over tokens of |r_i| / |r_{i-1}| of the trunk's residual; the first is 1 (MagCache).
    coefficients: polynomial, highest power first, from timestep embeddings' distances to the residual's (TeaCache).
    masks: "order,number of computed steps" -> one character a step, 1 for computed (Budget).
    """

    solver: str
    num_inference_steps: int
    shift: float
    guidance_scale: float
    magnitudes: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    quantize: str | None = None  # what the blocks' weights were kept in

    @property
    def key(self) -> tuple[str, int, float, str]:
        """What there is one entry of."""
        return self.solver, self.num_inference_steps, self.shift, self.quantize or ""

    def __post_init__(self) -> None:
        rows = {"magnitudes": len(self.magnitudes)}
        rows |= {f"masks[{key!r}]": len(mask) for key, mask in self.masks.items()}
        for name, length in rows.items():
            if length not in (0, self.num_inference_steps):
                raise ValueError(f"{name} must have {self.num_inference_steps} values, got {length}")

    def after(self, first_step: int) -> Calibration:
        """Of a trajectory that begins there: the same rows from it on. Masks, chosen for whole trajectories, are none.

        A noised source at a noise level is about what a trajectory is there, so its residuals change alike.
        """
        if first_step == 0:
            return self
        rows = self.magnitudes[first_step:]
        return replace(self, num_inference_steps=self.num_inference_steps - first_step, magnitudes=rows, masks={})

    def mask(self, num_computed: int, order: int) -> tuple[bool, ...] | None:
        found = self.masks.get(f"{order},{num_computed}")
        return None if found is None else tuple(character == "1" for character in found)


@dataclass(frozen=True)
class CalibrationFile:
    """Every entry of a checkpoint; `stale` says why they may not be used, where they may not."""

    entries: tuple[Calibration, ...] = ()
    stale: str | None = None

    def serving(self, quantize: str | None) -> CalibrationFile:
        """For weights that are kept so: what was measured with such, then what was without quantisation.

        As an entry serves bf16 and fp32 alike, one of exact weights serves quantised ones, but not the reverse.
        """
        own = [entry for entry in self.entries if entry.quantize == quantize]
        return replace(self, entries=(*own, *(e for e in self.entries if quantize and e.quantize is None)))

    def find(self, solver: str, num_inference_steps: int, shift: float) -> Calibration | None:
        for entry in self.entries:
            if (entry.solver, entry.num_inference_steps) == (solver, num_inference_steps) and entry.shift == shift:
                return None if self.stale else entry
        return None

    def missing(self, solver: str, num_inference_steps: int, shift: float, model: str) -> str:
        """What to tell someone whose request needs an entry that is not there."""
        if self.stale:
            return f"a calibration, and {FILE} of {model!r} {self.stale}: run `skylapse models calibrate` again"
        there = ", ".join(f"{e.solver} {e.num_inference_steps} steps shift {e.shift:g}" for e in self.entries) or "none"
        return (
            f"a calibration of {model!r} for {solver}, {num_inference_steps} steps, shift {shift:g} (there: {there}): "
            "run `skylapse models calibrate` with these options"
        )


def read_calibrations(folder: Path) -> CalibrationFile:
    """cache.json of a checkpoint folder; ValueError if it cannot be read."""
    path = folder / FILE
    if not path.exists():
        return CalibrationFile()
    try:
        record = json.loads(path.read_text())
        entries = tuple(_entry(item) for item in record["entries"])
        made_for = record["weights"]
    except json.JSONDecodeError as error:
        raise ValueError(f"{FILE} cannot be read: line {error.lineno}, column {error.colno} is no JSON") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{FILE} cannot be read: it is no UTF-8") from error
    except ValueError as error:  # what an entry says
        raise ValueError(f"{FILE} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{FILE} cannot be read: it is not what `skylapse models calibrate` writes") from error
    stale = None if made_for == fingerprint(folder) else "was made for other weights"
    return CalibrationFile(entries, stale)


def write_calibration(folder: Path, entry: Calibration) -> Path:
    """Add an entry (or replace the one for the same solver, steps, shift and quantisation), whole or not at all."""
    there = read_calibrations(folder)
    kept = [] if there.stale else [e for e in there.entries if e.key != entry.key]
    entries = sorted([*kept, entry], key=lambda e: e.key)
    record = {"weights": fingerprint(folder), "entries": [asdict(e) for e in entries]}
    path, part = folder / FILE, folder / f"{FILE}.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
    return path


def _entry(item: dict[str, Any]) -> Calibration:
    tuples = {name: tuple(item.get(name, ())) for name in ("magnitudes", "coefficients")}
    return Calibration(**{**item, **tuples})
