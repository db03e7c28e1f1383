"""Keeps the last of Ray's listeners on the loopback: each replica's gRPC server, which Serve binds to all addresses.

Everything else of Ray listens where its node's address says, which `skylapse serve` sets to 127.0.0.1.
"""

from __future__ import annotations

import logging
from typing import Any

import ray

logger = logging.getLogger(__name__)
EVERYWHERE, HERE = "[::]:", "127.0.0.1:"


def stay_on_loopback() -> None:
    """Bind the replica's gRPC server to the loopback, unless on a cluster. Call it in the replica's constructor."""
    if not ray.util.get_node_ip_address().startswith("127."):  # type: ignore[no-untyped-call]
        return
    from ray.serve._private import replica

    add_port = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None:
        logger.warning("this release of Ray binds its replicas' servers elsewhere: see `ss -ltn`")
        return

    def add_port_here(server: Any, address: str) -> Any:
        return add_port(server, address.replace(EVERYWHERE, HERE, 1))

    replica.__dict__["add_port_to_grpc_server"] = add_port_here
