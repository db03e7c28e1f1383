"""Outgoing requests to URLs that clients chose, allowed to reach the public internet only.

A name says nothing about where it leads, and may lead elsewhere a moment later. So the check that counts is made where
a socket is: on the very address that it is about to connect to, however it was spelled or resolved. `check_url` only
tells a client early what cannot work.

- https alone, and no private addresses. Where the operator allows private ones (his own cluster, tests), http too.
  Link-local and metadata addresses are refused even then: nobody receives webhooks there.
- One lookup a call, no redirects, no proxies of the environment, no cookies, no connection that another call used.
- The answer's status is read and its body is not, so there is none to be too large or too slow.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ..wire.errors import ApiError

MAX_URL_CHARS = 2048
PRINTABLE = re.compile(r"[!-\[\]-~]+")  # ASCII without blanks, and without the backslash that browsers read as a slash
NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label like this makes a host an IPv4 address (the URL standard)
INSIDE = {"localhost", "local", "internal"}  # last labels that no public name has

# A name server that never answers holds a thread for 10 s (glibc's 2 x 5). In asyncio's own pool, 6 threads on 2 cores,
# that would be the threads that the store's calls need.
LOOKUPS = ThreadPoolExecutor(16, thread_name_prefix="lookup")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


PRIVATE = _networks("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1", "fc00::/7")
METADATA = _networks(  # of clouds, as far as they are not link-local: they hand out credentials
    "100.100.100.200",  # Alibaba
    "168.63.129.16",  # Azure, among the public addresses
    "fd00:ec2::/32",  # AWS
    "fd20:ce::/32",  # Google
)
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # all that is assigned; is_global holds for more
SPECIAL = _networks(  # global by ipaddress, at least by that of Python 3.11
    "192.0.0.0/24",  # protocol assignments; Oracle's metadata
    "192.88.99.0/24",  # 6to4 relays
    "2001::/23",  # Teredo and others, which carry IPv4 addresses
    "2002::/16",  # 6to4 does, too
    "3fff::/20",  # documentation
)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # in a cluster without IPv4, all of IPv4 is reached through it


class Unreachable(Exception):
    """No answer came; the text gives the reason and reveals nothing about this side's network."""


class _Refused(OSError):
    """An address that nobody may connect to."""


@dataclass(frozen=True)
class Answer:
    """The answer of an URL; retry_after_s: seconds from its Retry-After header."""

    status: int
    retry_after_s: float | None


def check_url(url: str, allow_private: bool) -> None:
    """Raise ApiError 400 `invalid_webhook_url` for an URL that is never posted to; names are not looked up here."""
    if problem := _problem(url, allow_private):
        raise ApiError(400, f"Invalid 'webhook_url': {problem}.", code="invalid_webhook_url", param="webhook_url")


async def post(
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    allow_private: bool,
    timeout_s: float,
    resolver: AbstractResolver | None = None,
) -> Answer:
    """Post once and return the status, a redirect's too. Raises Unreachable. timeout_s: from the lookup to the status.

    resolver: the system's unless given. TLS is verified for the URL's name, which is also the Host.
    """
    if problem := _problem(url, allow_private):
        raise Unreachable(problem)
    connector = aiohttp.TCPConnector(
        resolver=resolver or _Lookup(),
        use_dns_cache=False,
        force_close=True,
        socket_factory=_guarded(allow_private),
    )
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    cookies = aiohttp.DummyCookieJar()
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=cookies, trust_env=False) as session,
            session.post(url, headers=headers, data=body, allow_redirects=False) as response,
        ):
            return Answer(response.status, _seconds(response.headers.get("retry-after", "")))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise Unreachable(_reason(error)) from error


def _guarded(allow_private: bool) -> Callable[[aiohttp.AddrInfoType], socket.socket]:
    """Return a maker of sockets for allowed addresses only; the connector connects each to that same address."""

    def make_socket(address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, where = address
        if not is_allowed(str(where[0]), allow_private):
            raise _Refused("refused")
        return socket.socket(family, kind, protocol)

    return make_socket


class _Lookup(AbstractResolver):
    """The system's resolver, in threads of its own."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        look_up = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(LOOKUPS, look_up)
        return [
            ResolveResult(hostname=host, host=str(where[0]), port=port, family=family, proto=protocol, flags=0)
            for family, _, protocol, _, where in found
        ]

    async def close(self) -> None:
        pass


def is_allowed(text: str, allow_private: bool) -> bool:
    """Return whether an address, written as getaddrinfo writes it, may be connected to."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if any(address in network for network in METADATA):
        return False
    if allow_private and any(address in network for network in PRIVATE):
        return True
    if any(address in network for network in SPECIAL) or (address.version == 6 and address not in GLOBAL_IPV6):
        return False
    return address.is_global and not address.is_multicast


def _problem(url: str, allow_private: bool) -> str | None:
    """Return a visible fault of an URL; the parser is the one that the connection is made with."""
    if len(url) > MAX_URL_CHARS:
        return f"it must have at most {MAX_URL_CHARS} characters"
    if not PRINTABLE.fullmatch(url):
        return "it must be printable ASCII without blanks and backslashes"
    try:
        parsed = URL(url)
        scheme, host, port = parsed.scheme, (parsed.raw_host or "").lower(), parsed.port
    except ValueError:
        return "it is not an URL"
    if scheme != "https" and not (scheme == "http" and allow_private):
        return "it must begin with https://"
    authority = url.partition("://")[2].partition("/")[0]
    if "@" in authority:
        return "it must not hold a user or a password"
    if "[" in authority and ":" not in host:  # the parser takes [v1.x], a version of IP that nobody has
        return "its host is neither a name nor an address"
    if port not in (80, 443) and not 1024 <= (port or 0) <= 65535:
        return "its port must be 443, 80 or one above 1023"  # the others belong to other protocols
    return _host_problem(host, allow_private)


def _host_problem(host: str, allow_private: bool) -> str | None:
    last = host.removesuffix(".").rpartition(".")[2]
    try:
        allowed = is_allowed(host, allow_private)
    except ValueError:  # a name, or an address in a spelling that only some parsers know, such as 0x7f.1
        if not NAME.fullmatch(host) or NUMERIC.fullmatch(last):
            return "its host is neither a name nor an address"
        allowed = allow_private or ("." in host.removesuffix(".") and last not in INSIDE)
    return None if allowed else "its host is not a public one"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the name was not found"
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, _Refused):
        return "the name does not lead to a public address"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed"
    if isinstance(error, aiohttp.ClientOSError):
        return "no connection"
    return "no HTTP answer"


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
