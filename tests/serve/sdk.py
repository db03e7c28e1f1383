"""The facts for programs that use OpenAI's SDKs (two services, keys, finished and waiting videos), and their runs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from skylapse.runtime.engine.engine import Engine

from .service import Service, serving

QUOTA, LISTED = 12, 5  # of unfinished videos of a tenant of the held service; of the one whose list is read
PROGRAM_S = 180.0


@contextmanager
def sdk_facts(service: Service, engine: Engine, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the facts. `service` makes videos; the held one begins no job, and its tenants may have a dozen."""
    with serving(folder / "held", engine, quota=QUOTA) as held, held.paused():
        key, reader = service.key("sdk"), service.key("sdk", scopes=("read",))
        listed_key, full_key = held.key(), held.key()
        with service.client(key) as client, held.client(listed_key) as listing, held.client(full_key) as full:
            finished, clip = service.make(key)["id"], folder / "clip.mp4"
            clip.write_bytes(client.get(f"/v1/videos/{finished}/content").content)
            failed = client.post("/v1/videos", json={"prompt": "a", "num_inference_steps": 999}).json()["id"]
            client.post(f"/v1/videos/{failed}/cancel").raise_for_status()
            listed = [listing.post("/v1/videos", json={"prompt": "a"}).json()["id"] for _ in range(LISTED)]
            for _ in range(QUOTA):
                full.post("/v1/videos", json={"prompt": "a"}).raise_for_status()
        Image.new("RGB", (96, 64), "red").save(folder / "picture.png")
        yield {
            "url": f"{service.url}/v1",
            "key": key,
            "reader_key": reader,
            "other_key": service.key(),
            "finished": finished,
            "failed": failed,
            "clip": str(clip),
            "picture": str(folder / "picture.png"),
            "extended_seconds": f"{(5 + 8) / 8:g}",
            "webhook_secret": service.webhook_secret,
            "held_url": f"{held.url}/v1",
            "held_key": held.key(),
            "listed_key": listed_key,
            "listed": listed,
            "full_key": full_key,
            "empty_key": held.key(),
            "lost_key": held.key(),
        }


def run_program(command: list[str], facts: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a program and return the JSON that it prints; it gets no key and no proxy from this environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    ended = subprocess.run(
        command, input=json.dumps(facts), capture_output=True, text=True, timeout=PROGRAM_S, env={**kept, **environment}
    )
    print(ended.stderr)  # how long each scenario took
    assert ended.returncode == 0, ended.stderr[-4000:]
    printed: dict[str, Any] = json.loads(ended.stdout)
    return printed
