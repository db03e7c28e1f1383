"""The options of `skylapse bench serve`, and what of them is written down."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from ..sheet import suite_parser
from .slo import Slo
from .target import checked_url
from .traces import PROCESSES
from .workloads import WORKLOADS, Workload

REQUESTS = 60  # where nothing else says how many
SCENARIOS = ("open", "closed", "singlestream", "offline")
ANY_MODEL = "the server's own"


def settings_of(options: argparse.Namespace, workload: Workload, slos: list[Slo]) -> dict[str, object]:
    return {
        "workload": workload.name,
        "notes": dict(workload.notes),
        "classes": {kind.name: dict(kind.fields) for kind in workload.kinds},
        "weights": {kind.name: kind.weight for kind in workload.kinds},
        "trace": re.sub(r"replay:.*/", "replay:", options.trace),
        "scenario": options.scenario,
        "concurrency": options.concurrency if options.scenario == "closed" else None,
        "endpoint": options.endpoint,
        "slo": ",".join(slo.name for slo in slos),
        "timeout_s": options.timeout,
        "fetch": options.fetch,
        "kind": options.kind,
        "replicas": options.replicas,
        "price_per_hour": options.price_per_hour,
    }


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = suite_parser("serve", "load on a server of the OpenAI Videos API", model=ANY_MODEL)
    option = parser.add_argument
    option("--url", required=True, help="for example http://127.0.0.1:8000")
    option("--api-key", metavar="KEY", help="default: SKYLAPSE_API_KEY")
    option("--scenario", choices=SCENARIOS, default="open", help="default: open, which waits for no answer")
    option("--trace", default="poisson", metavar="NAME", help="poisson (default), burst, diurnal or replay:FILE")
    option("--rate", type=float, default=1.0, metavar="R", help="requests a second on average; default: 1")
    option("--loads", type=_loads, metavar="A,B,...", help="several rates, one after the other")
    option("--speed", type=float, default=1.0, metavar="X", help="at which a recorded trace is played; default: 1")
    option("--requests", type=int, metavar="N", help=f"default: {REQUESTS}; mlperf-t2v: as many as there are prompts")
    option("--duration", type=float, metavar="S", help="of the arrivals, instead of or beside --requests")
    option("--concurrency", type=int, default=4, metavar="N", help="of --scenario closed; default: 4")
    option("--workload", choices=tuple(WORKLOADS), default="mixed", help="default: mixed, for the demo model")
    option("--prompts", type=Path, metavar="FILE", help="one a line, or JSON lines with prompt")
    option("--steps", type=int, metavar="N", help="denoising steps; default: the workload's, or the model's own")
    option(
        "--slo", action="append", default=[], metavar="SLO", help="p95=30s, mean=2s, large:p99=60s; may be given again"
    )
    option("--price-per-hour", type=float, metavar="P", help="of one replica: gives the cost of a second of video")
    option("--plan-for", metavar="R", help="how many replicas hold this load, for example 2.5/s")
    option(
        "--plan-with",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="another kind's result, to plan with",
    )
    option("--headroom", type=float, default=0.2, metavar="SHARE", help="of a plan; default: 0.2")
    option("--kind", metavar="NAME", help="what a plan calls these replicas; default: what the server calls itself")
    option("--replicas", type=int, default=1, metavar="N", help="behind the URL; default: 1")
    option("--engine", metavar="NAME", help="in figures' names; default: what the server calls itself")
    option("--endpoint", choices=("videos", "generations"), default="videos", help="generations: answered when done")
    option("--fields", choices=("auto", "openai", "all"), default="auto", help="default: those the server documents")
    option("--previews", type=int, metavar="N", help="of a clip, where the server tells of them; default: 1; 0: polls")
    option("--fetch", action="store_true", help="download each clip; its latency is until the last byte")
    option("--timeout", type=float, default=600.0, metavar="S", help="of a request from when it is due; default: 600")
    option("--http-timeout", type=float, default=30.0, metavar="S", help="of one HTTP exchange; default: 30")
    option("--poll-rate", type=float, default=100.0, metavar="R", help="polls a second in all, at most; default: 100")
    options = parser.parse_args(arguments)
    options.url = checked_url(options.url)
    if options.quick:
        options.requests = options.requests or 12
    for name in ("rate", "speed", "timeout", "http_timeout", "poll_rate", "duration", "price_per_hour"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name.replace('_', '-')} must be above 0, got {value:g}")
    for name in ("requests", "concurrency", "replicas", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not options.headroom >= 0:
        raise ValueError(f"headroom must be from 0, got {options.headroom:g}")
    if options.trace not in PROCESSES and not options.trace.startswith("replay:"):
        raise ValueError(f"trace must be {', '.join(PROCESSES)} or replay:FILE, got {options.trace!r}")
    if options.loads and (options.scenario != "open" or options.trace not in PROCESSES):
        raise ValueError("loads are rates of an arrival process: --scenario open and no replay")
    return options


def _loads(text: str) -> list[float]:
    try:
        found = sorted(float(part) for part in text.split(","))
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not all(math.isfinite(rate) and rate > 0 for rate in found):
        raise argparse.ArgumentTypeError(f"must be different rates above 0 with commas between them, got {text!r}")
    return found
