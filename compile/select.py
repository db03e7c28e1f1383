"""Which backend runs a clip: the fastest that is there, has been built, and was found right on this machine.

An artifact is trusted after it has coded one tiny clip as eager does, and while it does not fail. The order is
measured, once a machine, thread count and size. Who starts a clip with one backend ends it with that one: only a chunk
that fails is done again by eager, from the same states, and its backend is demoted.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .backend import Backend, Unavailable, in_chunks, machine_name
from .cache import BuildFailed, EngineCache, Key
from .choice import Candidate, Choice, Standing
from .eager import Eager
from .footprint import Footprint, watch
from .judge import TINY, compare, measure, weigh
from .ledger import Ledger, Size
from .stream import Coder, Plan, Run, States, copied

logger = logging.getLogger(__name__)
# Greatest difference of a value in [-1, 1]. Half a level of 255 in fp32: rounding then moves a pixel by one at most.
# Eager's own bf16 is 3 to 5 levels off at the worst pixel (tests/runtime/vae/test_codec.py).
MAX_ERROR = {"fp32": 0.5 / 127.5, "fp16": 4 / 127.5, "bf16": 8 / 127.5}
MEASURED_AREA = 16 * 16  # latents; larger sizes are measured when they are built for, not in front of a waiting clip


class Selector:
    """Of one coder. `choose` may be called from any thread."""

    def __init__(
        self,
        coder: Coder,
        backends: Sequence[Backend],
        cache: EngineCache,
        *,
        device: torch.device,
        dtype: str = "fp32",
        wanted: str = "auto",
        max_error: float | None = None,
        eager: nn.Module | None = None,
    ) -> None:
        """coder: in fp32: what is built is made from it and judged by it, wherever its weights are.

        dtype: of what is built, and of `eager`, the module that serves until then; by default the coder's own.
        max_error: the greatest difference from the coder that is allowed; by default a decoder's, of `dtype`.
        """
        self.coder, self.cache, self.dtype, self.wanted = coder, cache, dtype, wanted
        self.device, self.backends = device, tuple(backends)
        self.max_error = MAX_ERROR[dtype] if max_error is None else max_error
        self.eager = self._run_eagerly(coder.module if eager is None else eager)
        self._choices: dict[Size, Choice] = {}
        self._held_bytes: dict[str, int] = {}  # by the backends' artifacts when they were loaded last
        self._unjudged: dict[str, str] = {}  # backend -> why there was no room to load it, or to compare it with eager
        self._lock = threading.RLock()

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.cache.root, machine_name(self.device), torch.get_num_threads(), self.coder.digest)

    def backend(self, name: str) -> Backend:
        found = next((backend for backend in self.backends if backend.name == name), None)
        if found is None:
            raise Unavailable(f"backend must be {' or '.join(b.name for b in self.backends)}, got {name!r}")
        return found

    def key(self, backend: Backend, plan: Plan) -> Key:
        """Of what this backend builds here by a plan."""
        return self._key(backend, backend.plans(plan)[0])

    def _key(self, backend: Backend, exported: Plan) -> Key:
        return Key(
            {
                "coder": self.coder.digest,
                "exporter": _exporter_digest(),
                "kind": self.coder.kind,
                "backend": backend.name,
                "plan": asdict(exported),
                "options": dict(backend.options(exported)),
                "versions": dict(backend.versions()),
                "device": f"{backend.device.type} {backend.bound_to()}",
                "system": f"{platform.system()} {platform.machine()}",
            }
        )

    # --- choosing -------------------------------------------------------------------------------------------------

    def choose(self, height: int, width: int) -> Choice:
        """For a clip whose latents are height x width; the same until something is built or demoted."""
        with self._lock:
            if (height, width) not in self._choices:
                choice = self._choose((height, width))
                logger.info(
                    "%ss of %d x %d latents: %s (%s)", self.coder.kind, height, width, choice.backend, choice.why
                )
                self._choices[height, width] = choice
            return self._choices[height, width]

    def chosen(self, height: int, width: int) -> Choice | None:
        """What `choose` has last said of a size, or else of any, if it stands."""
        return self._choices.get((height, width)) or next(reversed([*self._choices.values()]), None)

    def plan_for(self, size: Size, backend: Backend | None = None) -> Plan:
        """What to build for a size where nothing else is said: for any size, but for frames that need their own."""
        area, side = self.coder.max_any_area, backend.max_any_pixels if backend else None
        is_large = area is not None and size[0] * size[1] > area
        is_large = is_large or (side is not None and max(size) * self.coder.in_scale * self.coder.out_scale > side)
        return Plan(self.dtype, size if is_large else None)

    def refresh(self) -> None:
        """Choose anew for clips that begin from now on."""
        with self._lock:
            self._choices.clear()

    def _choose(self, size: Size) -> Choice:
        if self.wanted == "eager":
            return Choice("eager", "as configured", self.eager)
        runs: dict[str, tuple[Candidate, Run]] = {}
        for candidate in self._candidates(size):
            run = self._trusted(candidate)
            if run is not None:
                runs[candidate.backend.name] = candidate, run
        if not runs:
            return Choice("eager", self._why_none(size), self.eager)
        names = ["eager", *runs] if self.wanted == "auto" else [*runs]
        try:
            times, at = self._times(size, {name: run for name, (_, run) in runs.items()}, [c for c, _ in runs.values()])
            fastest = min(names, key=lambda name: times[name])
            told = ", ".join(f"{name} {times[name]:.3g} s" for name in sorted(times, key=lambda n: times[n]))
            why = f"measured at {at[0]} x {at[1]} latents: {told}"
        except torch.OutOfMemoryError as error:
            fastest, why = names[0], f"not measured: {error}"
        if fastest == "eager":
            return Choice("eager", why, self.eager)
        candidate, run = runs[fastest]
        footprint = self.ledger.footprint(size, fastest)
        whole = in_chunks(self._guarded(candidate, run), self.coder, candidate.plan.chunk)
        return Choice(fastest, why, whole, candidate.key.id, footprint)

    def find(self, backend: Backend, plan: Plan) -> Candidate | None:
        """Its artifact by a plan, in whichever of the backend's ways it was built, if it has not been demoted."""
        demoted = self.ledger.demoted()
        for exported in backend.plans(plan):
            key = self._key(backend, exported)
            if key.id not in demoted and (artifact := self.cache.find(key)) is not None:
                return Candidate(backend, exported, key, artifact)
        return None

    def _candidates(self, size: Size) -> list[Candidate]:
        """The artifact of each backend for this size, or else for any."""
        found = []
        for backend in (backend for backend in self.backends if self.wanted in ("auto", backend.name)):
            plans = (Plan(self.dtype, size), self.plan_for(size, backend))
            candidate = next((c for plan in plans if (c := self.find(backend, plan)) is not None), None)
            if candidate is None:
                continue
            if reason := backend.missing(candidate.plan):
                logger.warning("%s has an artifact but cannot run it: %s", backend.name, reason)
            else:
                found.append(candidate)
        return found

    def _why_none(self, size: Size) -> str:
        reasons = [f"{told['backend']} was demoted: {told['reason']}" for told in self.ledger.demoted().values()]
        reasons += [f"{name} is built and not used yet: {reason}" for name, reason in self._unjudged.items()]
        own = " --size WxH, as frames that large need," if self.plan_for(size).size else ""
        return "; ".join(reasons) or f"nothing is built: skylapse compile{own} builds it"

    def _trusted(self, candidate: Candidate, weighs: bool = False) -> Run | None:
        """Its loaded artifact, if it does as eager does. What that holds is noted where nobody has yet, or `weighs`."""
        backend, key = candidate.backend, candidate.key
        self._unjudged.pop(backend.name, None)
        try:
            if weighs or self.ledger.footprint(TINY, backend.name) is None:
                with watch(self.device) as grown:
                    run = backend.load(self.coder, candidate.plan, candidate.artifact.folder)
                self._held_bytes[backend.name] = grown.num_bytes
            else:
                run = backend.load(self.coder, candidate.plan, candidate.artifact.folder)
        except Unavailable as error:  # the machine's fault, not the artifact's
            logger.warning("%s is not used: %s", backend.name, error)
            self._unjudged[backend.name] = str(error)
            return None
        except Exception as error:
            logger.warning("%s does not load (%s): it has to be built again", backend.name, error)
            self.cache.discard(candidate.artifact.folder)
            return None
        if self.ledger.checked(key.id) is not None:
            return run
        try:
            difference = self.compare(run, candidate.plan)
        except torch.OutOfMemoryError as error:  # nothing is known of it: it is neither trusted nor demoted
            logger.warning("%s is not used yet: %s", backend.name, error)
            self._unjudged[backend.name] = str(error)
            return None
        except Exception as error:
            self._demote(candidate, f"{type(error).__name__}: {error}")
            return None
        if not difference <= self.max_error:  # nan is not small enough
            self._demote(candidate, f"differs from eager by {difference:.3g}, {self.max_error:.3g} is allowed")
            return None
        self.ledger.write("checks", key.id, difference)
        return run

    def _demote(self, candidate: Candidate, reason: str) -> None:
        logger.error("%s is demoted: %s", candidate.backend.name, reason)
        self.ledger.demote(candidate.key.id, candidate.backend.name, reason)
        self.refresh()

    def _guarded(self, candidate: Candidate, run: Run) -> Run:
        def guarded(x: Tensor, states: States | None) -> tuple[Tensor, States]:
            if candidate.key.id not in self._failed:
                try:
                    return run(x, states)
                except torch.OutOfMemoryError as error:  # others' doing as likely as its own
                    logger.warning("eager does a chunk in place of %s: %s", candidate.backend.name, error)
                except Exception as error:
                    self._failed.add(candidate.key.id)
                    self._demote(candidate, f"failed at work: {type(error).__name__}: {error}")
            if states is not None:
                handed_over = [state.to(x.dtype) for state in states]
                states.clear()
                return self.eager(x, handed_over)
            return self.eager(x, None)

        return guarded

    @cached_property
    def _failed(self) -> set[str]:
        """Artifacts that have failed at work in this process."""
        return set()

    # --- checking and measuring -----------------------------------------------------------------------------------

    def compare(self, run: Run, plan: Plan) -> float:
        """Greatest difference of a tiny clip from eager in fp32, which is on the device for as long as that takes."""
        judge = self._run_eagerly(copied(self.coder.module, self.device, torch.float32))
        return compare(self.coder, judge, run, plan, self.device)

    def _run_eagerly(self, module: nn.Module) -> Run:
        return Eager(self.device).load(replace(self.coder, module=module), Plan(), self.cache.root)

    def measure(self, runs: dict[str, Run], size: Size, plan: Plan, repeats: int = 3) -> dict[str, float]:
        """Seconds of a clip by each."""
        return measure(self.coder, runs, size, plan, self.device, repeats)

    def _weigh(self, runs: dict[str, Run], size: Size, chunk: int | None = None, again: bool = False) -> None:
        """Note what each takes that has not been weighed at this size; before it is warm, or it has it already."""
        for name, run in runs.items():
            if again or not self.ledger.is_weighed(size, name):
                known = self.ledger.footprint(size, name)
                held_bytes = self._held_bytes.get(name, known.held_bytes if known else 0)
                work_bytes = weigh(self.coder, run, size, Plan(self.dtype, chunk=chunk), self.device)
                footprint = Footprint(held_bytes, work_bytes, size[0] * size[1])
                self.ledger.weighed(size, name, footprint)

    def _times(
        self, size: Size, runs: dict[str, Run], candidates: Sequence[Candidate]
    ) -> tuple[dict[str, float], Size]:
        """Seconds of eager and these, at this size or the nearest that was measured; measured now if none was."""
        names = {"eager", *runs}
        is_fixed = any(candidate.plan.size for candidate in candidates)
        at = size if is_fixed or size[0] * size[1] <= MEASURED_AREA else _shrunk(size)
        chunk = _chunk_of(candidates)
        self._weigh(runs, at, chunk)
        known = self.ledger.times(size)
        if names <= known.keys():
            return {name: known[name] for name in names}, size
        if not is_fixed and (found := self.ledger.nearest(size, names)) is not None:
            return {name: found[1][name] for name in names}, found[0]
        times = self.measure({"eager": self.eager, **runs}, at, Plan(self.dtype, chunk=chunk))
        self.ledger.timed(at, times)
        return times, at

    # --- building -------------------------------------------------------------------------------------------------

    def build(self, backend: Backend, size: Size | None, *, measure_at: Size, again: bool = False) -> Choice:
        """Build for a size or for any, check and measure it; returns what is chosen at `measure_at` from now on.

        Unavailable says what to install, BuildFailed why it could not be built, or be compared with eager.
        """
        plan = Plan(self.dtype, size)
        if reason := backend.missing(plan):
            raise Unavailable(reason)
        key, exported = self.key(backend, plan), backend.plans(plan)[0]
        self.cache.build(key, lambda folder: backend.build(self.coder, exported, folder), again=again)
        self._failed.discard(key.id)
        self.ledger.pardon(key.id)
        self.refresh()
        candidates = self._candidates(measure_at)
        found = ((c, self._trusted(c, weighs=True)) for c in candidates)
        runs = {candidate.backend.name: run for candidate, run in found if run is not None}
        if backend.name in self._unjudged:
            raise BuildFailed(f"{backend.name} is built, but not used yet: {self._unjudged[backend.name]}")
        if runs:
            judged_by = Plan(self.dtype, size, _chunk_of(candidates))
            try:
                self._weigh(runs, measure_at, judged_by.chunk, again=True)
                times = self.measure({"eager": self.eager, **runs}, measure_at, judged_by)
            except torch.OutOfMemoryError as error:
                raise BuildFailed(f"{backend.name} is built, but not measured: {error}") from error
            self.ledger.timed(measure_at, times)
        runs.clear()  # what is chosen is loaded anew
        return self.choose(*measure_at)

    def standings(self, size: Size) -> list[Standing]:
        """Every backend, whether it was built for this size or for any, and how it does."""
        times, found = self.ledger.times(size), []
        demoted = self.ledger.demoted()
        for backend in self.backends:
            plans = [Plan(self.dtype, size), self.plan_for(size, backend)]
            keys = [self.key(backend, plan) for plan in plans]
            missing = backend.missing(plans[0])
            failures = [failure for key in keys if (failure := self.cache.failure(key))]
            told = next((demoted[key.id] for key in keys if key.id in demoted), None)
            built = next((c for plan in plans if (c := self.find(backend, plan)) is not None), None)
            if missing:
                state, detail = "missing", missing
            elif built is not None:
                of = "for this size" if built.plan.size == size else "for any size"
                reason = self._unjudged.get(backend.name)
                state, detail = "built", f"{of}, not used yet: {reason}" if reason else of
            elif told is not None:
                state, detail = "demoted", told["reason"]
            elif failures:
                state, detail = "failed", failures[0].reason
            else:
                state, detail = "not built", f"skylapse compile MODEL --backend {backend.name}"
            error = self.ledger.checked(built.key.id) if built else None
            found.append(Standing(backend.name, state, detail, times.get(backend.name), error))
        return [Standing("eager", "built", "torch itself", times.get("eager"), 0.0), *found]

    def verify(self, size: Size, repeats: int = 5) -> list[Standing]:
        """Compare everything that was built for a size with eager again, time it, and tell how it stands."""
        runs, candidates = {}, self._candidates(size)
        for candidate in candidates:
            self.ledger.write("checks", candidate.key.id, None)
            if (run := self._trusted(candidate)) is not None:
                runs[candidate.backend.name] = run
        plan = Plan(self.dtype, chunk=_chunk_of(candidates))
        self.ledger.timed(size, self.measure({"eager": self.eager, **runs}, size, plan, repeats))
        self.refresh()
        return self.standings(size)

    @property
    def demotions(self) -> list[str]:
        """Backends that have been demoted, with the reasons."""
        return [f"{told['backend']}: {told['reason']}" for told in self.ledger.demoted().values()]


def _chunk_of(candidates: Sequence[Candidate]) -> int | None:
    """Latent frames at a time that all of them take, and so what they are compared at; None is any number."""
    return min((c.plan.chunk for c in candidates if c.plan.chunk), default=None)


@cache
def _exporter_digest() -> str:
    """Of the code that turns a coder into graphs."""
    here = Path(__file__).parent
    sources = [here / f"{name}.py" for name in ("attention", "export", "frames", "lowering", "native", "stream")]
    sources += [here.parent / "kernels" / f"{name}.py" for name in ("conv3d", "resample_conv")]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _shrunk(size: Size) -> Size:
    """A size of the same shape that is quick to measure."""
    scale = (MEASURED_AREA / (size[0] * size[1])) ** 0.5
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
