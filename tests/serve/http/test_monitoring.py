"""Alerts, dashboard and Kubernetes' monitors agree with the table of metrics, with each other and with their page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skylapse.serve.core.metric_definitions import HISTOGRAM, METRICS, Metric

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
RULES = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana" / "skylapse.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(r"\bskylapse_\w+")
SELECTOR = re.compile(r"\b(skylapse_\w+)(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\b(by|on)\s*\(([^)]*)\)")
WITHOUT = re.compile(r"\bwithout\s*\(([^)]*)\)")
TARGET = {"job", "instance", "pod", "container", "endpoint"}  # which Prometheus and its operator add
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$price_per_hour": "2", "$job": ".*", "$model": ".*"}


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def queries() -> Iterator[tuple[str, str]]:
    """(where, query) of all alerts and panels."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def metric_of(name: str) -> Metric:
    """Return a query's metric; a histogram's parts belong to it. Raises KeyError if the table does not have it."""
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    if base in METRICS and METRICS[base].kind == HISTOGRAM:
        assert name != base, f"{name} has no series of its own"
        return METRICS[base]
    return METRICS[name]


def wrong(query: str) -> list[str]:
    """Metrics of a query that do not exist, and labels that its metrics do not have."""
    found, labels = [], set(TARGET)
    for name, matchers in SELECTOR.findall(query):
        try:
            metric = metric_of(name)
        except KeyError:
            found.append(name)
            continue
        own = {*metric.labels, *TARGET, *(["le"] if metric.kind == HISTOGRAM else [])}
        labels |= own
        used = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', matchers)
        found += [f"{name}{{{label}}}" for label in used if label not in own]
    for _, grouped in GROUPING.findall(query):
        found += [f"by ({label})" for label in map(str.strip, grouped.split(",")) if label not in labels | {""}]
    return found


@pytest.mark.parametrize(("where", "query"), [pytest.param(*each, id=each[0]) for each in queries()])
def test_a_query_names_metrics_and_labels_that_exist(where: str, query: str) -> None:
    assert NAME.search(query) and wrong(query) == []


def test_what_does_not_exist_is_found() -> None:
    assert wrong("max(skylapse_queue_length)") == ["skylapse_queue_length"]
    assert wrong('skylapse_queue_depth{tenant="a"}') == ["skylapse_queue_depth{tenant}"]
    assert wrong("sum by (class) (skylapse_queue_depth)") == ["by (class)"]
    with pytest.raises(AssertionError):
        wrong("rate(skylapse_job_duration_seconds[5m])")


@pytest.mark.parametrize(("where", "query"), [pytest.param(*each, id=each[0]) for each in queries()])
def test_several_ingresses_count_nothing_twice(where: str, query: str) -> None:
    """Whatever is added is one ingress's: `sum` stands over `max without` the labels that tell them apart."""
    for inner in re.findall(r"\bsum\s*(?:by\s*\([^)]*\)\s*)?\(\s*([^\s(]+ ?[^\s(]*)", query):
        assert inner.startswith("max without"), f"{where}: sum of {inner}"
    for dropped in WITHOUT.findall(query):
        assert {label.strip() for label in dropped.split(",")} == TARGET - {"job"}


def test_promtool_takes_the_alerts_and_their_cases() -> None:
    promtool("check", "rules", "deploy/alerts.yaml")
    promtool("test", "rules", "deploy/alerts_test.yaml")


def test_promtool_takes_the_scrape_configuration() -> None:
    promtool("check", "config", "deploy/prometheus.yml")


def test_promtool_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = []
    for number, panel in enumerate(PANELS):
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            assert "$" not in query, f"{panel['title']}: a variable that nobody sets"
            rules.append({"record": f"panel:{number}_{target['refId']}", "expr": query})
    file = tmp_path / "dashboard.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))


def test_every_alert_has_a_severity_a_runbook_that_is_there_and_cases_for_and_against_it() -> None:
    tests = yaml.safe_load((DEPLOY / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", PAGE, re.M)}
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/monitoring.md" and anchor == rule["alert"].lower() and anchor in headings
        fires = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]]
        assert True in fires and False in fires, rule["alert"]
    assert {heading for heading in headings if heading.startswith("skylapse")} == {r["alert"].lower() for r in RULES}


def test_the_dashboard_shows_every_metric_and_no_panel_covers_another() -> None:
    shown = {metric_of(name).name for panel in PANELS for t in panel["targets"] for name in NAME.findall(t["expr"])}
    assert set(METRICS) - shown == set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells and at["x"] + at["w"] <= 24, panel["title"]
        cells |= mine


def test_the_dashboard_asks_whichever_prometheus_is_chosen() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and set(variables) == {
        "datasource", "job", "model", "price_per_hour"
    }  # fmt: skip
    for panel in PANELS:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
        assert all("$job" in target["expr"] for target in panel["targets"]), panel["title"]


# --------------------------------------------------------------------------------------------------------- Kubernetes


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "monitoring.yaml").read_text())}


def front() -> dict[str, Any]:
    """The pods that answer clients, of deploy/kuberay.yaml."""
    service = next(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()))
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    template: dict[str, Any] = next(group["template"] for group in groups if group["groupName"] == "front")
    return template


def test_kubernetes_gets_the_same_alerts(documents: dict[str, dict[str, Any]]) -> None:
    groups = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    assert documents["PrometheusRule"]["spec"]["groups"] == groups


def test_the_monitor_selects_the_pods_that_answer_and_may_reach_their_port(
    documents: dict[str, dict[str, Any]],
) -> None:
    labels, container = front()["metadata"]["labels"], front()["spec"]["containers"][0]
    monitor, policy = documents["PodMonitor"]["spec"], documents["NetworkPolicy"]["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == endpoint["port"]]
    assert endpoint["path"] == "/metrics"
    for wanted in (monitor["selector"]["matchLabels"], policy["podSelector"]["matchLabels"]):
        assert wanted.items() <= labels.items()
    assert [each["port"] for rule in policy["ingress"] for each in rule["ports"]] == [port]
    secret = endpoint["authorization"]["credentials"]
    heading = (DEPLOY / "monitoring.yaml").read_text().partition("apiVersion")[0]
    assert f"secret generic {secret['name']} " in heading and f"--from-literal={secret['key']}=" in heading
    assert f"secret generic {secret['name']} " in PAGE
