"""Engines ask Ray for GPUs where there are some, and nobody else does; what has no room is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skylapse.serve.core.config import ServeConfig
from skylapse.serve.engine.startup import StartTimes, in_words

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's


def options(num_gpus: float, monkeypatch: pytest.MonkeyPatch, **config: Any) -> dict[str, dict[str, Any]]:
    """Return the actor options of each deployment on a cluster of `num_gpus` GPUs."""
    from skylapse.serve import app

    monkeypatch.setattr(app, "cluster_gpus", lambda: num_gpus)
    return {one.name: one.ray_actor_options for one in deployments(app.build({"data": "unused", **config}))}


def test_each_model_has_a_deployment_and_a_policy_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from skylapse.serve import app

    monkeypatch.delenv("SKYLAPSE_DATABASE_URL", raising=False)
    scaled = {"name": "large", "model": "demo", "engine_slots": 2, "autoscaling": {"max_replicas": 3, "clear_in_s": 9}}
    models = [{"model": "demo", "engines": 2, "canary": {"model": "demo", "share": 0.5}}, scaled]
    found = {one.name: one for one in deployments(app.build({"data": "unused", "models": models}))}
    assert {*found} == {"Ingress", "Dispatcher", "Engine-demo", "Engine-demo-canary", "Engine-large"}
    assert (found["Engine-demo"].num_replicas, found["Engine-demo-canary"].num_replicas) == (2, 1)
    scaling = found["Engine-large"]._deployment_config.autoscaling_config
    kwargs = scaling.policy.policy_kwargs
    assert (scaling.min_replicas, scaling.max_replicas, found["Engine-large"].max_ongoing_requests) == (0, 3, 2)
    assert (kwargs["model"], kwargs["clear_in_s"], kwargs["default"], kwargs["canary"]) == ("large", 9.0, False, None)
    assert kwargs["database_url"].startswith("sqlite:///")


@pytest.mark.parametrize(
    ("models", "num_gpus", "reason"),
    [
        (
            [{"model": "demo", "engines": 2}, {"name": "b", "model": "demo"}],
            2,
            "2 of .demo., 1 of .b., which need 3",
        ),
        ([{"model": "demo"}, {"name": "b", "model": "demo"}], 2, None),
        ([{"model": "demo", "engines": 2}, {"name": "b", "model": "demo", "device": "cpu"}], 2, None),
        ([{"model": "demo", "engines": 2}, {"name": "b", "model": "demo", "autoscaling": {}}], 2, None),
    ],
)
def test_engines_of_all_models_need_room(models: list[dict[str, Any]], num_gpus: float, reason: str | None) -> None:
    from skylapse.serve.core.placement import check_gpus

    if reason is None:
        return check_gpus(ServeConfig(models=models), num_gpus, None)
    with pytest.raises(ValueError, match=reason):
        check_gpus(ServeConfig(models=models), num_gpus, None)


def deployments(bound: Any) -> list[Any]:
    """Return all deployments of an application: those that it is bound to, and those that they are bound to."""
    if isinstance(bound, dict):
        return [deployment for part in bound.values() for deployment in deployments(part)]
    if not hasattr(bound, "_bound_deployment"):
        return []
    deployment = bound._bound_deployment
    return [deployment, *(found for part in deployment.init_args for found in deployments(part))]


@pytest.mark.parametrize(
    ("config", "num_gpus", "asked"),
    [
        ({}, 0, 0),
        ({}, 2, 1),
        ({"device": "cuda"}, 2, 1),
        ({"device": "cuda"}, 0, 1),  # a cluster whose nodes come later
        ({"device": "cpu"}, 2, 0),
        ({"engine_gpus": 0.5}, 2, 0.5),
        ({"engine_gpus": 0.5, "device": "cpu"}, 2, 0),
    ],
)
def test_engines_alone_ask_for_gpus(
    config: dict[str, Any], num_gpus: float, asked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = options(num_gpus, monkeypatch, **config)
    assert {name: one.get("num_gpus", 0) for name, one in found.items()} == {
        "Ingress": 0,
        "Dispatcher": 0,
        "Engine": asked,
    }


@pytest.mark.parametrize(
    ("config", "num_gpus", "memory_bytes", "reason"),
    [
        ({"engines": 3}, 2, None, r"engines must be at most 2 on 2 GPUs, one each, got 3 \(--device cpu takes none\)"),
        ({"engines": 2, "device": "cuda"}, 1, None, "engines must be at most 1 on 1 GPU, one each, got 2"),
        ({"engines": 5, "engine_gpus": 0.5}, 2, 2**30, "engines must be at most 4 on 2 GPUs, 0.5 each, got 5"),
        ({"engines": 3, "engine_gpus": 0.6}, 2, 2**30, "at most 2 on 2 GPUs, 0.6 each, got 3"),
        ({"device": "cuda"}, 0, None, "device cuda was asked for, but Ray finds no GPU"),
        ({"engine_gpus": 0.5}, 1, None, "engine_gpus below 1 needs SKYLAPSE_MEMORY_MB"),
    ],
)
def test_engines_without_room_are_refused(
    config: dict[str, Any], num_gpus: float, memory_bytes: int | None, reason: str
) -> None:
    from skylapse.serve.core.placement import check_gpus

    with pytest.raises(ValueError, match=reason):
        check_gpus(ServeConfig(**config), num_gpus, memory_bytes)


@pytest.mark.parametrize(
    ("config", "num_gpus"),
    [
        ({"engines": 2}, 2),
        ({"engines": 9, "device": "cpu"}, 2),
        ({"engines": 9}, 0),
        ({"engines": 10, "engine_gpus": 0.1}, 1),
    ],
)
def test_engines_with_room_are_taken(config: dict[str, Any], num_gpus: float) -> None:
    from skylapse.serve.core.placement import check_gpus

    check_gpus(ServeConfig(**config), num_gpus, 2**30)


def test_a_cluster_is_told_that_it_has_too_few(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster may grow, so nothing is refused."""
    assert options(1, monkeypatch, engines=2)["Engine"]["num_gpus"] == 1
    assert "engines must be at most 1 on 1 GPU, one each, got 2" in caplog.text


@pytest.mark.parametrize("device", ["cuda:1", "gpu"])
def test_device_of_one_card_is_refused(device: str) -> None:
    """Ray says which; an engine sees no other."""
    with pytest.raises(ValueError, match="Input should be 'cpu' or 'cuda'"):
        ServeConfig(device=device)  # type: ignore[arg-type]


@pytest.mark.slow
def test_more_engines_than_gpus_end_the_command_with_2_and_one_line(tmp_path: Path) -> None:
    """On a machine that tells Ray of two GPUs; nothing of Ray is left running."""
    environment = {**os.environ, "RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": 2})}
    command = [sys.executable, "-m", "skylapse", "serve", "--engines", "3", "--port", "18999", "--data", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    told = [line for line in done.stderr.splitlines() if line.startswith("skylapse: ")]  # Ray has lines of its own
    reason = "engines must be at most 2 on 2 GPUs, one each, got 3 (--device cpu takes none)"
    assert (done.returncode, told) == (2, [f"skylapse: error: {reason}"]) and "Traceback" not in done.stderr


ACTORS = """
import json, os, sys, time
from skylapse.runtime.core.config import export
from skylapse.serve.deployment.local_service import RAY

export(RAY)
import ray

@ray.remote
class Part:
    def devices(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES")

options = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
names = ("Engine", "Engine", "Engine", "Ingress", "Dispatcher")
parts = [Part.options(**options[name]).remote() for name in names]
calls = {part.devices.remote(): name for part, name in zip(parts, names)}
ready, waiting = ray.wait([*calls], num_returns=4, timeout=60)
more, waiting = ray.wait(waiting, timeout=1)
seen = [[calls[call], ray.get(call)] for call in ready + more]
print(json.dumps(seen + [[calls[call], "waits"] for call in waiting]))
"""


@pytest.mark.slow
def test_engines_see_a_gpu_each_and_a_third_one_waits_and_others_see_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Ray itself, by the deployments' own options, on a machine that says that it has two."""
    found = options(2, monkeypatch, engines=2)
    done = subprocess.run(
        [sys.executable, "-c", ACTORS, json.dumps(found)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = sorted(json.loads(done.stdout.splitlines()[-1]))
    engines = [["Engine", "0"], ["Engine", "1"], ["Engine", "waits"]]
    assert seen == [["Dispatcher", ""], *engines, ["Ingress", ""]]


def test_times_of_a_start_are_facts_and_a_line() -> None:
    facts = StartTimes(load_s=41.25, warm_up_s=9.0, ready_s=52.123456).facts
    assert facts == {"load_s": 41.25, "warm_up_s": 9.0, "ready_s": 52.123}
    assert in_words(facts) == "engine ready in 52.1 s: load 41.2 s, warm-up 9.0 s"


@pytest.mark.parametrize(
    "module", ["deployment.dispatcher", "intake.media_worker", "deployment.autoscaling", "commands.serve"]
)
def test_parts_that_need_no_device_do_not_load_torch(module: str) -> None:
    """So they cannot hold memory of one."""
    code = f"import sys, skylapse.serve.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cluster_builds_the_application_and_finds_the_deployments_that_its_file_names(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """Use the function with which Ray's controller reads `import_path`: it refuses a builder of two parameters."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_as_a_cluster

    from skylapse.serve import app

    asked = pytest.importorskip("yaml").safe_load((root / "deploy" / "serve.yaml").read_text())["applications"][0]
    assert asked["import_path"] == f"{app.__name__}:{app.build.__name__}"
    monkeypatch.setattr(app, "cluster_gpus", lambda: 1.0)
    bound = build_as_a_cluster(app.build, {**asked["args"], "model": "demo"})
    assert {one["name"] for one in asked["deployments"]} == {one.name for one in deployments(bound)}
