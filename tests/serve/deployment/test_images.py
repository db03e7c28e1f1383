"""Images and pods bring operators, TensorRT, packages and models with them; the page's own steps hold."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from skylapse.cli import main
from skylapse.kernels.cpu import library
from skylapse.serve.accounts.keys import KeyStore
from skylapse.serve.store.database import Database

from .test_manifests import DOCKERFILE, PAGE, ROOT, STAGES, environment, pods

yaml = pytest.importorskip("yaml")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text())
    return {document["kind"]: document for document in found}


def commands(title: str) -> list[list[str]]:
    """Return the commands of the blocks under a heading of the page, as words; a here-document is left out."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line)
    block = re.sub(r"<<'?(\w+)'?\n.*?\n\1\n", "\n", block.replace("\\\n", " "), flags=re.S)
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize(
    ("stage", "extras"),
    [("cpu-build", {"serve", "compile", "s3"}), ("cuda", {"serve", "compile", "s3", "gpu", "tensorrt"})],
)
def test_images_have_what_compiles_decoders(stage: str, extras: set[str]) -> None:
    (installed,) = re.findall(r"\*\.whl\)\[([\w,]+)\]", STAGES[stage])
    assert set(installed.split(",")) == extras <= EXTRAS.keys()
    pins = (ROOT / "constraints.txt").read_text()
    names = {re.split(r"[\[<>=]", package)[0] for extra in extras for package in EXTRAS[extra]}
    assert {name for name in names if f"\n{name}==" not in pins} == set()


def test_cpu_image_needs_no_compiler() -> None:
    """The stage that has a compiler makes all that needs one, and the image is a copy of its folder."""
    build, image = STAGES["cpu-build"], STAGES["cpu"]
    assert "g++" in build and not re.search(r"g\+\+|gcc|apt-get|pip install", image)
    assert (
        f"python -m {library.__name__}" in build and "skylapse compile demo --device cpu --backend onnxruntime" in build
    )
    made = re.findall(r"SKYLAPSE_COMPILED_DIR=(\S+)", build)
    assert made == re.findall(r"SKYLAPSE_COMPILED_SHARED_DIR=(\S+)", image) and made[0].startswith("/opt/skylapse/")
    assert "COPY --from=cpu-build /opt/skylapse /opt/skylapse\n" in image
    assert re.search(r"PATH=/opt/skylapse/bin:", STAGES["base"])


def test_images_list_their_packages() -> None:
    for stage in ("cpu", "cuda"):
        assert "sbom.py --python /opt/skylapse/bin/python --debian -o /opt/skylapse/sbom.cdx.json" in STAGES[stage]
        assert STAGES[stage].rindex("RUN ") == STAGES[stage].index("RUN --mount=from=tools"), (
            "nothing is installed later"
        )
    assert "/opt/skylapse/sbom.cdx.json" in PAGE


def test_models_lie_on_a_volume_that_a_job_fills(documents: dict[str, dict[str, Any]]) -> None:
    claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert documents["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    cluster = documents["RayService"]["spec"]["rayClusterConfig"]
    job = documents["Job"]["spec"]["template"]["spec"]
    for name, pod in {**pods(cluster), "job": job}.items():
        folder = environment(pod)["SKYLAPSE_CACHE_DIR"]["value"]
        assert f" {folder} " in DOCKERFILE.replace("\n", " ") + " ", (
            "belongs to the image's user where nothing is mounted"
        )
        if name != "head":  # it holds no replica
            (volume,) = pod["volumes"]
            assert volume["persistentVolumeClaim"]["claimName"] == claim
            assert pod["containers"][0]["volumeMounts"] == [{"name": volume["name"], "mountPath": folder}]
    profiles = environment(pods(cluster)["engines"])["SKYLAPSE_PROFILE_DIR"]["value"]
    assert Path(profiles).parent == Path(folder), "what was compiled is there for the next pod"


def test_the_job_downloads_the_model_that_is_served(documents: dict[str, dict[str, Any]]) -> None:
    served = yaml.safe_load(documents["RayService"]["spec"]["serveConfigV2"])["applications"][0]["args"]["model"]
    job = documents["Job"]["spec"]["template"]["spec"]
    (container,) = job["containers"]
    assert container["command"] == ["skylapse", "models", "download", served, "--json"]
    assert job["restartPolicy"] == "OnFailure" and job["securityContext"]["runAsNonRoot"]
    front = pods(documents["RayService"]["spec"]["rayClusterConfig"])["front"]["containers"][0]
    assert container["image"] == front["image"] and container["securityContext"] == front["securityContext"]


def test_key_of_the_page_is_one_that_is_taken(tmp_path: Path) -> None:
    keys = {word.partition("=")[2] for words in commands("Docker") for word in words if "SKYLAPSE_API_KEY=" in word}
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    database.migrate()
    assert keys and all(KeyStore(database).create("local", secret=key) for key in keys)
    database.close()


def test_docker_lines_build_targets_that_there_are_and_run_what_was_built() -> None:
    for title in ("Docker", "Kubernetes"):
        built, used = set(), set()
        for words in commands(title):
            if words[:2] == ["docker", "build"]:
                assert words[words.index("--target") + 1] in STAGES and (ROOT / words[words.index("-f") + 1]).exists()
                built.add(words[words.index("-t") + 1])
            elif words[:2] in (["docker", "run"], ["docker", "push"]):
                used |= {word for word in words if re.search(r"(^|/)skylapse-\w+:", word)}
        assert used and used <= built, title


def test_steps_on_kubernetes_name_ones_own_images(tmp_path: Path) -> None:
    """The page's kustomization, by kubectl's own kustomize where it is installed."""
    text = PAGE.partition("\n## Kubernetes\n")[2]
    block = re.search(r"<<'?EOF'?\n(.*?)\n    EOF\n", text, re.S)
    assert block is not None
    overlay = "\n".join(line[4:] for line in block[1].splitlines()).replace("$REGISTRY", "registry.example.com/team")
    overlay = overlay.replace("$TAG", "v1")
    said = yaml.safe_load(overlay)
    assert [image["name"] for image in said["images"]] == ["skylapse-cpu", "skylapse-cuda"]
    assert said["resources"] == ["../deploy"]
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "kustomization.yaml").write_text(overlay)
    done = subprocess.run(["kubectl", "kustomize", "cluster"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert images == {f"registry.example.com/team/skylapse-{target}:v1" for target in ("cpu", "cuda")}
    made = {document["kind"] for document in yaml.safe_load_all(done.stdout)}
    assert made >= {document["kind"] for document in yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text())}


def test_skylapse_lines_of_the_job_are_of_our_command_line(
    documents: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    name, *words = documents["Job"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert name == "skylapse"
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0 and "download" in capsys.readouterr().out


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_an_image_tells_the_commit_that_it_was_built_from(image: str) -> None:
    stage = STAGES[image]
    assert stage.index("ARG REVISION") < stage.index("ENV SKYLAPSE_REVISION=${REVISION}")
