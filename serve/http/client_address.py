"""Detects requests that come from this machine itself."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

from fastapi import Request

FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")  # by a proxy, for somebody else


def is_from_loopback(request: Request) -> bool:
    """Return whether a request came over the loopback, to its name (which no other site's page can), by no proxy."""
    client = request.client.host if request.client else ""
    if any(name in request.headers for name in FORWARDED):
        return False
    return _is_loopback(client) and (request.url.hostname == "localhost" or _is_loopback(request.url.hostname or ""))


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
