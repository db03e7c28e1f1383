"""The list of packages equals the tree, and the wheel that comes of it works in an environment of its own."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import skylapse

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "kernels", "compile", "serve", "benchmarks")
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "out", "runs", "*.egg-info", "tests", "docs", "node_modules"
)


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def setuptools_packages() -> list[str]:
    tool = project()["tool"]
    assert isinstance(tool, dict)
    return list(tool["setuptools"]["packages"])


def test_packages_are_the_folders_that_hold_python_files() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    folders = {path.parent.relative_to(ROOT).parts for path in files}
    assert sorted(setuptools_packages()) == sorted({"skylapse", *(".".join(("skylapse", *parts)) for parts in folders)})


def test_version_is_said_the_same_twice() -> None:
    metadata = project()["project"]
    assert isinstance(metadata, dict)
    assert metadata["version"] == skylapse.__version__


def test_constraints_bind_every_dependency_that_make_installs() -> None:
    metadata = project()["project"]
    assert isinstance(metadata, dict)
    wanted = [*metadata["dependencies"], *metadata["optional-dependencies"]["dev"]]
    names = {text.split(";")[0].split(">")[0].split("=")[0].split("[")[0].strip() for text in wanted}
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    bound = {line.split("==")[0] for line in lines if line}
    assert names - bound == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes into the tree, and would ship what an older build left in `build/`."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCE)
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            "dist",
            "./checkout",
        ],
        cwd=folder,
    )
    (path,) = (folder / "dist").glob("*.whl")
    return path


def run(command: list[str], cwd: Path, timeout_s: float = 300) -> str:
    """The command's output; its errors are in the failure's message."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, (
        f"{command} exited with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def test_wheel_holds_the_packages_the_licence_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    code = sorted(name for name in names if name.endswith(".py"))
    folders = [package.split(".")[1:] for package in setuptools_packages()]
    assert code == sorted(
        f"skylapse/{path.relative_to(ROOT).as_posix()}"
        for parts in folders
        for path in ROOT.joinpath(*parts).glob("*.py")
    )
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "skylapse/py.typed" in names
    shown = [*(ROOT / "serve" / "page").iterdir(), *(ROOT / "kernels").rglob("*.json")]
    shown.append(ROOT / "runtime" / "checkpoints" / "published.json")
    shown += [path for path in (ROOT / "kernels" / "cpu").iterdir() if path.suffix in (".cpp", ".h")]
    data = {f"skylapse/{path.relative_to(ROOT).as_posix()}" for path in shown}
    others = {name for name in names if not name.endswith(".py") and ".dist-info/" not in name}
    others = {name for name in others if not name.startswith("skylapse/runtime/models/demo/")}
    assert others == {"skylapse/py.typed"} | data


def test_wheel_holds_the_demo_model(wheel: Path, demo_folder: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if "/models/demo/" in name}
    tree = {path.relative_to(ROOT).as_posix() for path in demo_folder.rglob("*") if path.is_file()}
    assert held == {f"skylapse/{name}" for name in tree}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; its dependencies are borrowed from this one, as plain folders on the path."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    run([*pip, "install", "--no-deps", "--no-index", str(wheel)], cwd=folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for each in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for entry in each.iterdir():
            link = borrowed / entry.name
            if "skylapse" not in entry.name and not link.is_symlink():
                link.symlink_to(entry)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")  # .pth files in there stay unread
    return folder / "bin"


def test_installed_package_is_the_wheels_and_imports(installed: Path, tmp_path: Path) -> None:
    modules = [package for package in setuptools_packages() if package.count(".") == 1]
    code = f"import skylapse, {', '.join(modules)}; print(skylapse.__file__)"
    assert Path(run([str(installed / "python"), "-c", code], cwd=tmp_path).strip()).is_relative_to(installed.parent)


def test_hugging_face_kernels_is_not_shadowed(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert "skylapse" not in run([str(installed / "python"), "-c", code], cwd=tmp_path)


def test_installed_command_makes_a_video(installed: Path, tmp_path: Path, demo_folder: Path) -> None:
    prompt = "a red circle moving right at sunset"
    run(
        [str(installed / "skylapse"), "generate", prompt, "-o", "clip.mp4", "--sheet", "sheet.png", "--steps", "2"],
        tmp_path,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "sheet.png"]
    assert (tmp_path / "clip.mp4").stat().st_size > 1000


def test_list_of_what_is_installed_is_cyclonedx_and_whole(installed: Path, tmp_path: Path) -> None:
    """deploy/sbom.py of the wheel's environment; it validates what it writes."""
    pytest.importorskip("cyclonedx")
    sbom = [sys.executable, str(ROOT / "deploy" / "sbom.py")]
    command = [*sbom, "--python", str(installed / "python"), "-o", "sbom.json"]
    run(command, cwd=tmp_path)
    text = (tmp_path / "sbom.json").read_text()
    found = json.loads(text)
    root = found["metadata"]["component"]
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert (root["name"], root["version"]) == ("skylapse", skylapse.__version__)
    parts = {part["name"].lower().replace("_", "-"): part for part in found["components"]}
    metadata = project()["project"]
    assert isinstance(metadata, dict)
    needed = {re.split(r"[\[;>=<]", text)[0].strip() for text in metadata["dependencies"]}
    assert {name for name in needed if name.replace("_", "-") not in parts} == set()
    torch = parts["torch"]
    assert torch["purl"].startswith(f"pkg:pypi/torch@{torch['version'].replace('+', '%2B')}") and torch["licenses"]
    assert parts["cpython"]["purl"] == f"pkg:generic/cpython@{platform.python_version()}"
    depends = {one["ref"]: one.get("dependsOn", []) for one in found["dependencies"]}
    assert torch["bom-ref"] in depends[root["bom-ref"]]
    assert str(ROOT) not in text and str(installed.parent) not in text
    run([*command[:-1], "again.json"], cwd=tmp_path)
    assert (tmp_path / "again.json").read_text() == text


def test_list_is_refused_for_an_environment_without_skylapse(tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx")
    venv.create(tmp_path / "empty", symlinks=True)
    command = [sys.executable, str(ROOT / "deploy" / "sbom.py"), "--python", str(tmp_path / "empty" / "bin" / "python")]
    done = subprocess.run([*command, "-o", str(tmp_path / "sbom.json")], capture_output=True, text=True)
    assert done.returncode == 1 and "--python must be of an environment that has skylapse, got" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "sbom.json").exists()


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="no Debian")
def test_list_of_an_image_has_debians_packages(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx")
    command = [sys.executable, str(ROOT / "deploy" / "sbom.py"), "--python", str(installed / "python"), "--debian"]
    run([*command, "-o", "sbom.json"], cwd=tmp_path)
    found = json.loads((tmp_path / "sbom.json").read_text())["components"]
    debian = [part for part in found if part["purl"].startswith("pkg:deb/debian/")]
    assert {"bash", "libc6"} <= {part["name"] for part in debian}
    assert all("distro=" in part["purl"] and part["version"] for part in debian)
