"""`skylapse bench serve`: load on any server of the OpenAI Videos API, ours or another engine's.

skylapse bench serve --url http://127.0.0.1:8000 --rate 0.5 --requests 60 --slo p95=30s
skylapse bench serve --url ... --loads 0.2,0.4,0.8 --duration 120 --slo p95=30s --plan-for 2.5/s
skylapse bench serve --url ... --workload mlperf-t2v --scenario singlestream --prompts prompts.txt
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...runtime.core.config import load_settings
from ..record import Curve, Label
from ..sheet import Sheet, note
from .options import ANY_MODEL, REQUESTS, options_of, settings_of
from .plan import Kind, Plan, parse_rate, plans, read_kind
from .play import quantile
from .run import Case, Run, play_case, show
from .slo import Slo, check_kinds, parse_slo
from .target import Target, detected
from .traces import Arrival, at_once, draw, replay
from .workloads import WORKLOADS, Workload, read_prompts


def serve(arguments: Sequence[str]) -> int:
    """0 where all was measured, whether the SLO was met or not; 1 where requests failed or the run is partial."""
    options = options_of(arguments)
    prompts = read_prompts(options.prompts) if options.prompts else None
    workload = WORKLOADS[options.workload](options.steps, prompts)
    slos = [slo for text in options.slo for slo in parse_slo(text)]
    kinds = [kind.name for kind in workload.kinds]
    traces = _traces(options, workload)
    check_kinds(slos, list(dict.fromkeys(arrival.kind for trace in traces.values() for arrival in trace)) or kinds)
    others = [read_kind(path) for path in options.plan_with]
    wanted_per_s = None if options.plan_for is None else parse_rate(options.plan_for)
    _check_plan(options, slos, wanted_per_s, [given for _, given in others])
    sheet = Sheet("serve", options, settings_of(options, workload, slos))
    with sheet.running():
        target = _target(sheet, options, next(iter(traces.values()))[0])
        runs = _runs(sheet, options, workload, slos, traces, target)
        _curves(sheet, _stem(options, workload), target.engine, slos, runs)
        if wanted_per_s is not None:
            mine = _kind(options, target, workload, slos, runs)
            _say_plan(sheet, plans([mine, *(kind for kind, _ in others)], wanted_per_s, slos, options.headroom))
    return sheet.status


# --- what is sent -----------------------------------------------------------------------------------------------------


def _traces(options: argparse.Namespace, workload: Workload) -> dict[float | None, list[Arrival]]:
    """By offered load; None where it is not a rate's."""
    ask, requests = workload.ask(options.seed), options.requests
    if options.scenario != "open":
        count = requests or (len(workload.prompts) if options.workload == "mlperf-t2v" else REQUESTS)
        return {None: at_once(ask, count)}
    if options.trace.startswith("replay:"):
        found = replay(Path(options.trace.removeprefix("replay:")), ask, options.speed)
        return {None: found[:requests]}
    if requests is None and options.duration is None:
        requests = REQUESTS
    loads = options.loads or [options.rate]
    return {rate: draw(options.trace, rate, ask, options.seed, requests, options.duration) for rate in loads}


def _target(sheet: Sheet, options: argparse.Namespace, first: Arrival) -> Target:
    key = options.api_key or load_settings().api_key
    target = Target(
        options.url,
        key,
        endpoint=options.endpoint,
        model=None if options.model == ANY_MODEL else options.model,
        previews=0 if options.previews is None else options.previews,
        fetch=options.fetch,
        timeout_s=options.timeout,
        http_timeout_s=options.http_timeout,
        poll_rate=options.poll_rate,
    )
    target = detected(target, options.fields)
    engine = re.sub(r"[^a-z0-9.-]+", "_", target.engine.lower()).strip("_") or "unknown"
    has_previews = target.has_events and "partial_images" in target.accepts
    previews = (1 if options.previews is None else options.previews) if has_previews else 0
    target = replace(target, engine=options.engine or engine, previews=previews)
    dropped = target.dropped(first.fields)
    sheet.settings |= {"engine": target.engine, "fields_left_out": dropped, "previews": previews}
    note(f"{target.url} is {target.engine}" + (f"; it is not told {', '.join(dropped)}" if dropped else ""))
    return target


def _stem(options: argparse.Namespace, workload: Workload) -> str:
    how = options.trace.partition(":")[0] if options.scenario == "open" else options.scenario
    return f"{workload.name}/{how}"


def _runs(
    sheet: Sheet,
    options: argparse.Namespace,
    workload: Workload,
    slos: list[Slo],
    traces: dict[float | None, list[Arrival]],
    target: Target,
) -> list[Run]:
    stem = _stem(options, workload)
    concurrency = {"open": None, "offline": None, "singlestream": 1, "closed": options.concurrency}[options.scenario]
    runs = []
    for rate, trace in traces.items():
        sheet.check_time(stem if rate is None else f"{stem} at {rate:g}/s")
        labels: dict[str, Label] = {"status": "unverified"} if "status" in workload.notes else {}
        labels |= {} if rate is None else {"rate": rate}
        case = Case(f"{stem}/{rate:g}" if options.loads else stem, target.engine, slos, labels, options.price_per_hour)
        window_s = max(trace[-1].at_s, options.duration or 0.0) if options.scenario == "open" else None
        run = play_case(sheet, case, trace, target, concurrency, window_s)
        run.offered_per_s = run.offered_per_s if rate is None else rate
        show(run)
        runs.append(run)
        if options.workload == "mlperf-t2v" and options.scenario in ("singlestream", "offline"):
            _mlperf(sheet, options.scenario, run, target.engine, labels)
    return runs


def _mlperf(sheet: Sheet, scenario: str, run: Run, engine: str, labels: dict[str, Label]) -> None:
    """The figure by which MLPerf ranks the scenario: the 90th percentile, or samples a second. Unverified."""
    values = sorted(value for latencies in run.latencies_s.values() for value in latencies)
    name = f"serve/mlperf-t2v/{scenario}/result/{engine}"
    if scenario == "singlestream" and values:
        sheet.measured(name, "s", [quantile(values, 0.9)], labels=labels)
    elif values:
        sheet.measured(name, "samples/s", [run.good.requests_per_s], "higher", labels)


# --- what is made of several loads ------------------------------------------------------------------------------------


def _curves(sheet: Sheet, stem: str, engine: str, slos: list[Slo], runs: list[Run]) -> None:
    if len(runs) < 2:
        return

    def draw_curve(what: str, y: str, points: list[tuple[float, float]], labels: dict[str, Label]) -> None:
        drawn = [(x, value) for x, value in sorted(points) if math.isfinite(value)]
        names = {"what": what, "contestant": engine, **labels}
        path = "/".join(("serve", stem, what, *(str(value) for value in labels.values()), engine))
        sheet.drawn(Curve(name=path, x="offered load, req/s", y=y, points=drawn, labels=names))

    by_load = [(run.offered_per_s, run) for run in runs]
    draw_curve("throughput", "throughput, req/s", [(x, run.good.requests_per_s) for x, run in by_load], {})
    if slos:
        draw_curve("goodput", "goodput, req/s", [(x, run.good.good_per_s) for x, run in by_load], {})
    for kind in dict.fromkeys(kind for run in runs for kind in run.latencies_s):
        values = [(x, sorted(run.latencies_s.get(kind, []))) for x, run in by_load]
        for share in (0.5, 0.95):
            points = [(x, quantile(latencies, share)) for x, latencies in values if latencies]
            draw_curve(f"p{100 * share:g}", "latency, s", points, {"class": kind})
    for slo in slos:
        points = [(x, run.attained[slo.name]) for x, run in by_load if slo.name in run.attained]
        draw_curve("attained", "share within the SLO", points, {"slo": slo.name})
    for kind, values_s in min(by_load, key=lambda found: found[0])[1].latencies_s.items():
        if values_s:
            labels: dict[str, Label] = {"what": "lightest", "class": kind}
            sheet.measured(f"serve/{stem}/lightest/{kind}/{engine}", "s", values_s, labels=labels)


def _kind(options: argparse.Namespace, target: Target, workload: Workload, slos: list[Slo], runs: list[Run]) -> Kind:
    """Of one replica: the loads that were offered, by the replicas that stood behind the URL."""
    attained = {
        slo.name: [
            (run.offered_per_s / options.replicas, run.attained[slo.name]) for run in runs if slo.name in run.attained
        ]
        for slo in slos
    }
    lightest = min(runs, key=lambda run: run.offered_per_s)
    service_s = {kind: values for kind, values in lightest.latencies_s.items() if values}
    weights = {kind.name: kind.weight for kind in workload.kinds}
    weights |= {kind: float(len(values)) for kind, values in service_s.items() if kind not in weights}
    return Kind(options.kind or target.engine, attained, service_s, weights, options.price_per_hour)


def _check_plan(
    options: argparse.Namespace, slos: list[Slo], wanted_per_s: float | None, others: list[list[Slo]]
) -> None:
    if wanted_per_s is None:
        if others:
            raise ValueError("plan-with needs plan-for: the load that is planned for")
        return
    if not options.loads or len(options.loads) < 2 or not slos:
        raise ValueError("plan-for needs at least two --loads and a --slo: the plan follows the curve between them")
    if any(slo.share is None for slo in slos):
        raise ValueError("plan-for needs percentiles in --slo, and not a mean")
    for given in others:
        if [slo.name for slo in given] != [slo.name for slo in slos]:
            raise ValueError(
                f"plan-with must have been measured against {', '.join(slo.name for slo in slos)}, "
                f"got {', '.join(slo.name for slo in given)}"
            )


def _say_plan(sheet: Sheet, made: list[Plan]) -> None:
    print(f"\n{'kind':<24}{'replicas':>10}{'req/s each':>12}{'M/G/k':>8}{'cost/h':>10}")
    for one in made:
        each = "" if one.capacity is None else f"{'>' if one.capacity.is_floor else ''}{one.capacity.per_s:.4g}"
        cost = "" if one.cost_per_hour is None else f"{one.cost_per_hour:.2f}"
        print(f"{one.kind:<24}{one.replicas or 'none':>10}{each:>12}{one.queue_replicas or '':>8}{cost:>10}")
        for line in one.words:
            print(f"  {line}")
    sheet.settings["plan"] = [
        {
            "kind": one.kind,
            "replicas": one.replicas,
            "per_replica_per_s": one.capacity and one.capacity.per_s,
            "is_floor": one.capacity and one.capacity.is_floor,
            "queue_replicas": one.queue_replicas,
            "cost_per_hour": one.cost_per_hour,
            "assumptions": list(one.words),
        }
        for one in made
    ]
