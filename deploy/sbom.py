"""The list of what an installation is made of (SBOM), in CycloneDX's JSON.

    python deploy/sbom.py --python .venv/bin/python -o dist/skylapse.cdx.json
    python deploy/sbom.py --python /opt/skylapse/bin/python --debian -o sbom.cdx.json    # of an image

cyclonedx-bom reads the environment of that Python; skylapse, which has to be installed in it, becomes the root. Added
are Python itself and, for an image, Debian's packages. The result is validated against CycloneDX's schema, and has
neither times nor random numbers in it: the same environment gives the same file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

ROOT = "skylapse"
VERSION = SchemaVersion.V1_6
DPKG = ("dpkg-query", "-W", "-f=${db:Status-Status}\t${Package}\t${Version}\t${Architecture}\t${Description}\n")

Component = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description="The list of an installation's packages, in CycloneDX's JSON.")
    parser.add_argument("--python", required=True, metavar="PYTHON", help="of the environment that has skylapse")
    parser.add_argument("--debian", action="store_true", help="this machine's Debian packages too, as for an image")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        bom = of_environment(options.python)
        bom["components"] += [python_itself(options.python), *(debian_packages() if options.debian else ())]
        text = json.dumps(bom, indent=1, sort_keys=True) + "\n"
        if (error := JsonStrictValidator(VERSION).validate_str(text)) is not None:
            raise ValueError(f"the list is not CycloneDX {VERSION.to_version()}: {error}")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        print(f"sbom: {' '.join(said.split())}", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(f"{options.output}: {len(bom['components'])} packages")
    return 0


def of_environment(python: str) -> dict[str, Any]:
    """The document of an environment, with skylapse as what it is about."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--no-validate", "--output-reproducible"]
    done = subprocess.run([*command, "-o", "-", python], capture_output=True, text=True, check=True)
    bom: dict[str, Any] = json.loads(done.stdout)
    found = [part for part in bom.setdefault("components", []) if part["name"] == ROOT]
    if len(found) != 1:
        raise ValueError(f"--python must be of an environment that has {ROOT}, got {python!r}")
    bom["components"].remove(found[0])
    for part in (*bom["components"], found[0]):  # web pages, whose check takes 15 s, and the folder of an editable one
        part.pop("externalReferences", None)
    bom["metadata"]["component"] = {**found[0], "type": "application"}
    return bom


def python_itself(python: str) -> Component:
    code = "import platform; print(platform.python_version())"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return _component("application", "cpython", version, PackageURL("generic", None, "cpython", version))


def debian_packages() -> Iterator[Component]:
    """Those that dpkg has installed, by name."""
    distribution = _release()
    listed = subprocess.run(DPKG, capture_output=True, text=True, check=True).stdout
    for line in sorted(line for line in listed.splitlines() if line.startswith("installed\t")):
        _, name, version, architecture, description = line.split("\t", 4)
        qualifiers = {"arch": architecture, "distro": distribution}
        found = _component("library", name, version, PackageURL("deb", "debian", name, version, qualifiers))
        yield {**found, "description": description}


def _release() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    facts = dict(line.replace('"', "").split("=", 1) for line in lines if "=" in line)
    return f"{facts['ID']}-{facts['VERSION_ID']}"


def _component(kind: str, name: str, version: str, purl: PackageURL) -> Component:
    text = purl.to_string()
    return {"type": kind, "name": name, "version": version, "purl": text, "bom-ref": text}


if __name__ == "__main__":
    sys.exit(main())
