"""An S3 bucket on the loopback: moto's server, which plays Amazon's in memory and checks no signature."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import pytest


@contextmanager
def bucket_server() -> Iterator[str]:
    """The server's URL; skips where moto, its web server or s3fs is not installed."""
    for name in ("moto", "flask", "s3fs"):
        pytest.importorskip(name, reason=f"the stand-in for a bucket needs {name}")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


def new_bucket(endpoint: str) -> tuple[str, dict[str, Any]]:
    """A bucket of the caller's own: `artifacts_url` and `artifacts_options` as a ServeConfig has them."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    with urlopen(Request(f"{endpoint}/{name}", method="PUT")):
        pass
    options = {"endpoint_url": endpoint, "key": "an-id", "secret": "a-secret"}
    return f"s3://{name}/clips", {**options, "client_kwargs": {"region_name": "us-east-1"}}
