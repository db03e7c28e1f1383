"""Debian's Prometheus scrapes a service, and has answers to the dashboard's queries and the alerts."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml")
from prometheus import prometheus

from skylapse.runtime.engine.engine import Engine
from skylapse.serve.core.metric_definitions import HISTOGRAM, METRICS

from .test_monitoring import PANELS, RULES, VARIABLES

ON_A_GPU = "engine_gpu_utilization_ratio engine_gpu_power_watts"
NOT_YET = "lost_engine_seconds_total sick_engines_total trace_spans_dropped_total webhook_deliveries_total"
NOT_HERE = {f"skylapse_{name}" for name in f"{ON_A_GPU} {NOT_YET} engine_ready_seconds rejections_total".split()}


def test_a_real_prometheus_scrapes_every_metric_and_answers_every_query(demo_engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ..service import SMALL, serving

    with serving(tmp_path / "data", demo_engine) as service, prometheus(tmp_path, service.url) as there:
        key = service.key()
        service.make(key)
        with service.client(key) as client, service.paused():
            assert client.post("/v1/videos", json={**SMALL, "seconds": "nonsense"}).status_code == 400
            waits = client.post("/v1/videos", json=SMALL).json()["id"]
            there.wait('skylapse_queue_depth{model="demo"} > 0')
            client.delete(f"/v1/videos/{waits}")
        (target,) = there.targets()
        assert target["health"] == "up", target["lastError"]
        there.wait('skylapse_jobs_ended_total{outcome="cancelled"}')
        for name in METRICS.keys() - NOT_HERE:
            there.wait(f"{name}_bucket" if METRICS[name].kind == HISTOGRAM else name)
        for panel in PANELS:
            for asked in panel["targets"]:
                query = asked["expr"]
                for variable, value in VARIABLES.items():
                    query = query.replace(variable, value)
                there.query(query)
        (group,) = there.get("rules", type="alert")["groups"]
        assert {rule["name"] for rule in group["rules"]} == {rule["alert"] for rule in RULES}
        assert all(rule["health"] in ("ok", "unknown") for rule in group["rules"])
        there.wait("ALERTS or vector(0)")
        assert not [rule["name"] for rule in group["rules"] if rule["state"] == "firing"]
