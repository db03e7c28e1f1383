"""The deployment's files agree with Ray's schema, with our configuration, with each other and with their page."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import skylapse
from skylapse.runtime.core import config as runtime_config
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.deployment.autoscaling import BacklogPolicy

yaml = pytest.importorskip("yaml")
schema = pytest.importorskip("ray.serve.schema")

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "deploy.md").read_text()
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
OURS = re.compile(r"SKYLAPSE_[A-Z_]+")
SETTINGS = set(OURS.findall(inspect.getsource(runtime_config)))
SECRETS = {"SKYLAPSE_API_KEY", "SKYLAPSE_DATABASE_URL", "SKYLAPSE_WEBHOOK_SECRET"}
STAGES = dict(zip(*[iter(re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.M)[1:])] * 2, strict=True))


@pytest.fixture(scope="module")
def serve_yaml() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text()))


@pytest.fixture(scope="module")
def cluster(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]["spec"]["rayClusterConfig"]


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: group["template"]["spec"] for name, group in groups(cluster).items()}


def environment(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in pod["containers"][0]["env"]}


def deployments(serve_yaml: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {deployment["name"]: deployment for deployment in serve_yaml["applications"][0]["deployments"]}


def test_ray_takes_the_serve_config_and_we_its_arguments(serve_yaml: dict[str, Any]) -> None:
    schema.ServeDeploySchema.model_validate(serve_yaml)
    (application,) = serve_yaml["applications"]
    assert (application["import_path"], application["route_prefix"]) == ("skylapse.serve.app:build", "/")
    config = ServeConfig(**application["args"])
    assert config.artifacts_url.startswith("s3://") and config.downloads == "redirect"
    assert set(deployments(serve_yaml)) == {"Ingress", "Dispatcher", "Engine"}


def test_the_serve_config_holds_no_secret(serve_yaml: dict[str, Any]) -> None:
    arguments = serve_yaml["applications"][0]["args"]
    assert not {"database_url", "webhook_secret", "artifacts_options"} & set(arguments)


def test_deployments_fit_the_configuration(serve_yaml: dict[str, Any]) -> None:
    config = ServeConfig(**serve_yaml["applications"][0]["args"])
    engine, ingress = deployments(serve_yaml)["Engine"], deployments(serve_yaml)["Ingress"]
    assert engine["max_ongoing_requests"] == config.engine_slots
    assert engine["graceful_shutdown_timeout_s"] > config.drain_s
    assert engine["ray_actor_options"]["num_gpus"] == 1 and engine["autoscaling_config"]["min_replicas"] == 0
    assert ingress["num_replicas"] >= 2 and ingress["max_ongoing_requests"] >= 1000


def test_the_autoscaling_policy_is_ours_with_arguments_that_it_takes(serve_yaml: dict[str, Any]) -> None:
    policy = deployments(serve_yaml)["Engine"]["autoscaling_config"]["policy"]
    assert policy["policy_function"] == f"{BacklogPolicy.__module__}:{BacklogPolicy.__name__}"
    inspect.signature(BacklogPolicy).bind(**policy["policy_kwargs"])


def test_kubernetes_gets_the_same_serve_config(serve_yaml: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    embedded = yaml.safe_load(documents[0]["spec"]["serveConfigV2"])
    schema.ServeDeploySchema.model_validate(embedded)
    assert embedded == serve_yaml


def test_kubernetes_gets_a_service_budgets_and_a_policy_for_its_network(documents: list[dict[str, Any]]) -> None:
    kinds = [document["kind"] for document in documents]
    kept = ["PersistentVolumeClaim", "Job"]
    assert kinds == ["RayService", *kept, "PodDisruptionBudget", "PodDisruptionBudget", "NetworkPolicy"]
    labels = [
        group["template"]["metadata"]["labels"] for group in groups(documents[0]["spec"]["rayClusterConfig"]).values()
    ]
    for document in documents[1 + len(kept) :]:
        spec = document["spec"]
        wanted = (spec.get("selector") or spec.get("podSelector"))["matchLabels"].items()
        assert any(wanted <= found.items() for found in labels)


def test_ray_is_the_one_that_constraints_pin(cluster: dict[str, Any]) -> None:
    assert f"\nray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_a_pod_has_time_to_drain_before_it_is_killed(serve_yaml: dict[str, Any], cluster: dict[str, Any]) -> None:
    for name, pod in pods(cluster).items():
        drain_s = float(environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]["value"])
        assert drain_s > max(d["graceful_shutdown_timeout_s"] for d in deployments(serve_yaml).values())
        if name != "head":  # it holds no replica
            container = pod["containers"][0]
            pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
            assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + 10
            assert "/-/healthz" in str(container["readinessProbe"]) and container["livenessProbe"]


def test_a_pod_runs_as_nobody_special_on_a_pinned_image(cluster: dict[str, Any]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.M))
    for name, pod in pods(cluster).items():
        container = pod["containers"][0]
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
        target, _, version = container["image"].removeprefix("skylapse-").partition(":")
        assert target in targets and version == skylapse.__version__
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has_gpu == (name == "engines") == (target == "cuda")


def test_engine_pods_are_as_many_as_engines(serve_yaml: dict[str, Any], cluster: dict[str, Any]) -> None:
    scaling, engine = deployments(serve_yaml)["Engine"]["autoscaling_config"], groups(cluster)["engines"]
    assert (engine["minReplicas"], engine["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"])
    requests = engine["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert int(requests["cpu"]) >= deployments(serve_yaml)["Engine"]["ray_actor_options"]["num_cpus"]


def test_variables_exist_and_secrets_are_referred_to(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster).values():
        for name, variable in environment(pod).items():
            assert f"`{name}`" in PAGE and (not name.startswith("SKYLAPSE_") or name in SETTINGS)
            is_secret = name in ("SKYLAPSE_DATABASE_URL", "SKYLAPSE_WEBHOOK_SECRET", "HF_TOKEN") or "KEY" in name
            assert is_secret == ("valueFrom" in variable)
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]


def test_every_secret_that_is_referred_to_is_one_that_the_heading_makes(documents: list[dict[str, Any]]) -> None:
    heading = (ROOT / "deploy" / "kuberay.yaml").read_text().partition("apiVersion")[0]
    found = re.findall(r"'secretKeyRef': \{'name': '([\w-]+)', 'key': '([\w-]+)'", str(documents))
    assert len(set(found)) == 7
    for name, key in found:
        assert f"secret generic {name} " in heading and f"--from-literal={key}=" in heading


def test_the_page_has_a_row_for_every_field_and_names_every_variable() -> None:
    table = PAGE.partition("| field | default |")[2].partition("\n\n")[0]
    rows = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(rows) == sorted(ServeConfig.model_fields)
    named = set(OURS.findall(PAGE)) - {f"{runtime_config.SERVE_PREFIX}{field.upper()}" for field in rows}
    assert sorted(SETTINGS - named) == [] and named <= SETTINGS


def test_the_page_says_what_was_not_run() -> None:
    said = PAGE.partition("\n## What was run\n")[2].partition("|")[0]
    assert all(word in said for word in ("Kubernetes", "Docker", "bucket", "GPU"))


def test_links_of_the_page_lead_somewhere() -> None:
    assert [to for to in re.findall(r"\]\(([^)#]+)\)", PAGE) if not (ROOT / "docs" / to).exists()] == []


def test_images_and_pods_set_what_the_local_service_sets_of_ray(cluster: dict[str, Any]) -> None:
    from skylapse.serve.deployment.local_service import RAY

    image = dict(re.findall(r"\b(RAY_\w+)=(\S+)", DOCKERFILE))
    for pod in pods(cluster).values():
        given = image | {name: variable.get("value") for name, variable in environment(pod).items()}
        assert {name: given.get(name) for name, value in RAY.items() if given.get(name) != value} == {}


def test_images_are_built_from_a_tag_for_two_targets() -> None:
    (default,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.M)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M)
    made = ("wheel", "tools", "cpu-build", "cpu", "cuda")
    assert stages == [("python:${PYTHON}", "base"), *(("base", stage) for stage in made)]
    assert re.fullmatch(r"3\.\d+-slim-\w+", default)


def test_everything_that_is_copied_exists_and_nothing_of_the_package_is_left_out() -> None:
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[1] for package in packages if "." in package} <= copied
    assert {path.name for path in ROOT.glob("*.py")} <= copied
    seen = re.findall(r"^!(\S+)$", (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(), re.M)
    assert sorted(seen) == sorted(copied)


def test_images_run_as_a_user_without_secrets_and_say_how_they_are() -> None:
    for stage in ("cpu", "cuda"):
        assert re.findall(r"^USER (\S+)$", STAGES[stage], re.M) == ["1000"]
    assert all("pip install -c /wheels/constraints.txt" in STAGES[stage] for stage in ("cpu-build", "cuda"))
    assert "RAY_USAGE_STATS_ENABLED=0" in DOCKERFILE and "\nHEALTHCHECK " in DOCKERFILE
    assert not re.search(r"(?i)secret=|password|token=|_key=", DOCKERFILE)
    assert set(OURS.findall(DOCKERFILE)) <= SETTINGS - SECRETS
