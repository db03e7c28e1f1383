"""/metrics is the same on every ingress, never falls, is kept from strangers, and a real Prometheus scrapes it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from skylapse import __version__
from skylapse.serve.accounts.keys import digest_of
from skylapse.serve.core.metric_definitions import BUCKETS, METRICS
from skylapse.serve.store.tables import api_keys

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine

    from ..service import Service

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def metered(demo_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of its own with two ingresses: a completed, a cancelled and a deleted job, and a refused request."""
    from ..service import SMALL, serving

    with serving(tmp_path_factory.mktemp("metered"), demo_engine, ingresses=2) as service:
        key = service.key("a")
        service.make(key)
        with service.client(key, ingress=1) as client:
            deleted = service.make(key, cache="fast", num_inference_steps=12)
            assert client.delete(f"/v1/videos/{deleted['id']}").status_code == 200
            with service.paused():
                waits = client.post("/v1/videos", json=SMALL).json()
                client.post(f"/v1/videos/{waits['id']}/cancel")
            assert client.post("/v1/videos", json=SMALL | {"seed": "?"}).status_code == 400
            assert client.get("/v1/nothing/here").status_code == 404
            assert client.request("TRACE", f"/v1/videos/{waits['id']}").status_code == 405
        yield service


def scrape(service: Service, ingress: int = 0) -> Samples:
    text = httpx.get(f"{service.urls[ingress]}/metrics", trust_env=False).raise_for_status().text
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def sample(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"skylapse_{name}", frozenset(labels.items())))


def wait_for(condition: Any, at_most_s: float = 10.0) -> Any:
    until_s = time.monotonic() + at_most_s
    while not (found := condition()):
        assert time.monotonic() < until_s
        time.sleep(0.05)
    return found


def operator_key(service: Service) -> str:
    text = service.key("operators")
    with service.context.database.write() as connection:
        named = update(api_keys).where(api_keys.c.digest == digest_of(text))
        connection.execute(named.values(scopes=["read", "operator"]))
    return text


def test_jobs_are_counted_by_model_kind_outcome_and_class(metered: Service) -> None:
    wait_for(lambda: (sample(scrape(metered, 1), "step_seconds_count", model="demo") or 0) >= 2)
    found = scrape(metered)
    where = {"model": "demo", "class": "default"}
    assert sample(found, "jobs_created_total", kind="generate", **where) == 3
    assert sample(found, "jobs_ended_total", outcome="completed", **where) == 2  # one of them is deleted
    assert sample(found, "jobs_ended_total", outcome="cancelled", **where) == 1
    assert sample(found, "job_duration_seconds_count", outcome="completed", **where) == 2
    assert sample(found, "queue_wait_seconds_count", **where) == 2
    for stage in ("encode", "denoise", "decode", "finish"):
        assert sample(found, "stage_seconds_count", model="demo", stage=stage) == 2
    computed, skipped = (sample(found, "steps_total", model="demo", how=how) for how in ("computed", "skipped"))
    assert computed and skipped and computed + skipped == 2 + 12
    charged = sample(found, "engine_seconds_total", **where)
    near = pytest.approx(charged, rel=0.02)
    wait_for(lambda: sample(scrape(metered), "engine_busy_seconds_total", model="demo") == near)
    assert sample(found, "rejections_total", category="invalid_value", stage="intake") == 1
    build = next(labels for name, labels in found if name == "skylapse_build_info")
    assert dict(build)["version"] == __version__ and dict(build)["revision"]
    assert [sample(found, name, model="demo") for name in ("queue_depth", "queue_age_seconds", "backlog_seconds")] == [
        0.0
    ] * 3
    assert sample(found, "engines", model="demo", state="ready") == 1


def test_requests_are_counted_by_template_and_never_by_path(metered: Service) -> None:
    found = wait_for(lambda: _if_there(metered, "http_requests_total", "TRACE"))
    routes = {dict(labels)["route"] for name, labels in found if name == "skylapse_http_requests_total"}
    assert not any("video_" in route and "{" not in route for route in routes) and "/v1/nothing/here" not in routes
    assert sample(found, "http_requests_total", route="unmatched", method="GET", status="404") == 1
    assert sample(found, "http_requests_total", route="/v1/videos", method="POST", status="400") == 1
    made = sample(found, "http_requests_total", route="/v1/videos", method="POST", status="200")
    assert made == 3
    assert sample(found, "http_requests_total", route="/v1/videos/{video_id}", method="DELETE", status="200") == 1
    assert sample(found, "http_requests_total", route="/v1/videos/{video_id}", method="other", status="405") == 1


def _if_there(service: Service, name: str, method: str) -> Samples | None:
    """Ingresses add what they have counted every few seconds, and when they are scraped."""
    scrape(service, 1)
    return scrape(service)


def test_every_ingress_shows_the_same(metered: Service) -> None:
    def counted(ingress: int) -> Samples:
        return {key: value for key, value in scrape(metered, ingress).items() if "http_requests" not in key[0]}

    wait_for(lambda: counted(0) == counted(1))


def test_nothing_falls_when_a_video_is_deleted_or_the_service_restarts(demo_engine: Engine, tmp_path: Path) -> None:
    from ..service import serving

    def counted(service: Service) -> Samples:
        names = {m.name for m in METRICS.values() if m.kind != "gauge"}
        return {k: v for k, v in scrape(service).items() if any(k[0].startswith(name) for name in names)}

    with serving(tmp_path, demo_engine) as service:
        key = service.key("a")
        video = service.make(key)
        before = counted(service)
        with service.client(key) as client:
            client.delete(f"/v1/videos/{video['id']}")
        after = counted(service)
        assert before and all(after[name] >= value for name, value in before.items())
    with serving(tmp_path, demo_engine) as service:
        again = counted(service)
        assert all(again[name] >= value for name, value in after.items())


def test_every_name_and_bucket_is_in_the_table(metered: Service) -> None:
    text = httpx.get(f"{metered.url}/metrics", trust_env=False).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    expected = {m.name.removesuffix("_total") if m.kind == "counter" else m.name: m for m in METRICS.values()}
    assert families.keys() == expected.keys()
    for name, family in families.items():
        assert family.type == expected[name].kind
        for s in family.samples:
            assert set(s.labels) - {"le"} == set(expected[name].labels)
    bounds = [s.labels["le"] for s in families["skylapse_queue_wait_seconds"].samples if "le" in s.labels]
    assert [float(bound) for bound in bounds] == [*map(float, BUCKETS), float("inf")]


def test_metrics_are_open_on_loopback_alone(metered: Service) -> None:
    def status(key: str | None = None, **headers: str) -> int:
        given = headers | ({"authorization": f"Bearer {key}"} if key else {})
        return int(httpx.get(f"{metered.url}/metrics", headers=given, trust_env=False).status_code)

    elsewhere = {"x-forwarded-for": "203.0.113.7"}
    assert status() == 200
    assert status(host="metrics.example") == 401  # a page of another site that names this machine
    assert status(**elsewhere) == 401
    assert status(metered.key(scopes=("read", "write", "admin")), **elsewhere) == 403
    assert status(operator_key(metered), **elsewhere) == 200


def test_metrics_may_be_opened_to_everybody(demo_engine: Engine, tmp_path: Path) -> None:
    from ..service import serving

    with serving(tmp_path, demo_engine, metrics_open=True) as service:
        headers = {"x-forwarded-for": "203.0.113.7"}
        assert httpx.get(f"{service.url}/metrics", headers=headers, trust_env=False).status_code == 200


# ---------------------------------------------------------------------------------------------------- a real Prometheus


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name}: Debian's package prometheus has it")
    return path


def test_promtool_finds_nothing_wrong(metered: Service) -> None:
    text = httpx.get(f"{metered.url}/metrics", trust_env=False).content
    said = subprocess.run([program("promtool"), "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert (said.returncode, said.stdout, said.stderr) == (0, b"", b"")


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    """One that scrapes these every second; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    listed = [target.removeprefix("http://") for target in targets]
    job = {"job_name": "skylapse", "scrape_interval": "1s", "scrape_timeout": "1s"}
    config = folder / "prometheus.yml"  # JSON is YAML, too
    config.write_text(json.dumps({"scrape_configs": [job | {"static_configs": [{"targets": listed}]}]}))
    options = (f"--config.file={config}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program("prometheus"), *options], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def test_a_real_prometheus_scrapes_every_ingress(metered: Service, tmp_path: Path) -> None:
    with prometheus(tmp_path, metered.urls) as url:

        def ask(query: str) -> list[dict[str, Any]]:
            try:
                answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, trust_env=False)
                return list(answer.raise_for_status().json()["data"]["result"])
            except httpx.HTTPError:
                return []

        wait_for(lambda: [r["value"][1] for r in ask('up{job="skylapse"}')] == ["1", "1"], 20.0)
        ended = wait_for(lambda: ask('skylapse_jobs_ended_total{outcome="completed"}'))
        assert {r["value"][1] for r in ended} == {"2"} and len(ended) == 2  # one a target, and both say the same
        p95 = ask('histogram_quantile(0.95, sum by (le) (skylapse_job_duration_seconds_bucket{outcome="completed"}))')
        assert 0 < float(p95[0]["value"][1]) <= 3600
        assert not ask('{__name__=~"ray_.*"}')
