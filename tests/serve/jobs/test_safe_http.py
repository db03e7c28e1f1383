"""The way out: no spelling, name, redirect or proxy leads a request to where a client must not send us."""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from receiver import OK, receiver, status

from skylapse.serve.jobs import safe_http as outbound
from skylapse.serve.jobs.safe_http import Answer, Unreachable, check_url, is_allowed, post
from skylapse.serve.wire.errors import ApiError


class FakeResolver(AbstractResolver):
    """Each lookup gets the next of `answers`, the last of them for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), [""][:0]

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


async def send(url: str, *, allow_private: bool = True, timeout_s: float = 10.0, **options: Any) -> Answer:
    return await post(url, {"x-a": "b"}, b"{}", allow_private=allow_private, timeout_s=timeout_s, **options)


async def refusal(url: str, **options: Any) -> str:
    with pytest.raises(Unreachable) as caught:
        await send(url, **options)
    return str(caught.value)


PUBLIC = ["93.184.215.14", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
PRIVATE = ["127.0.0.1", "127.8.9.1", "10.0.0.1", "172.31.0.1", "192.168.1.1", "100.64.0.1", "::1", "fd12::1"]
PRIVATE += ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1"]
NOWHERE = ["0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.1.1", "100.100.100.200", "168.63.129.16", "192.0.0.192"]
NOWHERE += ["224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "192.88.99.1"]
NOWHERE += ["::", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "fd00:ec2::254", "fd20:ce::254", "2001:db8::1"]
NOWHERE += ["2001::1", "2002:7f00:1::", "2002:a00:1::1", "3fff::1", "::127.0.0.1", "::ffff:169.254.169.254"]
NOWHERE += ["64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "4000::1"]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(address, False) and is_allowed(address, True)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_allowed_where_the_operator_says_so(address: str) -> None:
    assert not is_allowed(address, False) and is_allowed(address, True)


@pytest.mark.parametrize("address", NOWHERE)
def test_metadata_and_special_addresses_are_never_allowed(address: str) -> None:
    assert not is_allowed(address, False) and not is_allowed(address, True)


GOOD = ["https://hooks.example.com/a?b=c#d", "https://example.com:8443/", "HTTPS://EXAMPLE.COM", "https://1.1.1.1/"]
GOOD += ["https://[2606:4700::1111]/", "https://xn--bcher-kva.example/", "https://a_b.example.com./", "https://e.com:/"]
BAD = {
    "no URL": ["", "https://", "https:///x", "https:/a.com/", "//a.com/", "a.com", "https://[::1", "https://[v1.x]/"],
    "another scheme": ["http://a.com/", "ftp://a.com/", "file:///etc/passwd", "gopher://a.com/", "javascript:alert(1)"],
    "a user": ["https://user@a.com/", "https://user:word@a.com/", "https://@a.com/", "https://1.1.1.1@127.0.0.1/"],
    "odd characters": ["https://a.com/ b", "https://a.com/\r\nx: y", "https://a.com\\@b.com/", "https://a.com/\0"],
    "not ASCII": ["https://１２７.0.0.1/", "https://bücher.example/", "https://a。com/", "https://a.com/é"],
    "a long one": ["https://a.com/" + "x" * 2048, "https://" + "a" * 64 + ".com/"],
    "a port": [
        "https://a.com:22/",
        "https://a.com:0/",
        "https://a.com:25/",
        "https://a.com:65536/",
        "https://a.com:x/",
    ],
    "an IPv4 address in another spelling": [
        *("https://2130706433/", "https://0x7f000001/", "https://0x7f.0.0.1/", "https://0177.0.0.1/"),
        *(
            "https://127.1/",
            "https://127.0.0.1./",
            "https://0/",
            "https://1.1.1.0x1/",
            "https://0x/",
            "https://a.0x7f/",
        ),
    ],
    "a private address": [f"https://{f'[{a}]' if ':' in a else a}/" for a in (*PRIVATE, *NOWHERE) if "%" not in a],
    "a scope": ["https://[fe80::1%25eth0]/"],
    "a name of the inside": ["https://localhost/", "https://postgres/", "https://a.localhost/", "https://x.local./"],
    "no name": [
        "https://a..com/",
        "https://-a.com/",
        "https://a%2ecom/",
        "https://a;b.com/",
        "https://127.0.0.1%00.com/",
    ],
}


@pytest.mark.parametrize("url", GOOD)
def test_urls_of_the_public_internet_are_taken(url: str) -> None:
    check_url(url, allow_private=False)


@pytest.mark.parametrize("url", [url for urls in BAD.values() for url in urls])
def test_other_urls_are_a_400_that_names_the_field_and_repeats_nothing(url: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_url(url, allow_private=False)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_webhook_url", "webhook_url")
    assert len(url) < 12 or url not in error.message


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080/", "http://receiver/hook", "https://localhost:9000/"])
def test_the_operators_own_network_is_taken_where_he_says_so(url: str) -> None:
    check_url(url, allow_private=True)
    with pytest.raises(ApiError):
        check_url(url, allow_private=False)


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "http://2130706433/", "http://a@b/", "ftp://a/"])
def test_even_there_some_urls_are_refused(url: str) -> None:
    with pytest.raises(ApiError):
        check_url(url, allow_private=True)


def test_a_request_arrives_with_its_headers_its_body_and_the_names_host() -> None:
    async def run() -> None:
        async with receiver(status(201, "retry-after: 7")) as heard:
            url = f"http://hooks.example.com:{heard.port}/a?b=%20c"
            assert await send(url, resolver=FakeResolver(["127.0.0.1"])) == Answer(201, 7.0)
        ((line, headers, body),) = heard.requests
        assert (line, body) == ("POST /a?b=%20c HTTP/1.1", b"{}")
        assert (headers["x-a"], headers["host"]) == ("b", f"hooks.example.com:{heard.port}")

    asyncio.run(run())


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "0.0.0.0"])
def test_a_name_that_leads_inside_is_not_connected_to(address: str) -> None:
    async def run() -> None:
        async with receiver() as heard:
            url = f"https://hooks.example.com:{heard.port}/"
            reason = await refusal(url, allow_private=False, resolver=FakeResolver([address]))
        assert reason == "the name does not lead to a public address" and heard.requests == []

    asyncio.run(run())


def test_a_name_is_looked_up_once_and_its_second_answer_is_checked_like_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """127.0.0.2 plays a public address here, and 127.0.0.1 the inside, which the name leads to a moment later."""
    monkeypatch.setattr(outbound, "PRIVATE", outbound._networks("127.0.0.2"))

    async def run() -> None:
        async with receiver(host="127.0.0.2") as outside, receiver(host="127.0.0.1", port=outside.port) as inside:
            url, resolver = f"http://a.example.com:{outside.port}/", FakeResolver(["127.0.0.2"], ["127.0.0.1"])
            assert (await send(url, resolver=resolver)).status == 204
            assert resolver.asked == ["a.example.com"] and len(outside.requests) == 1
            assert await refusal(url, resolver=resolver) == "the name does not lead to a public address"
            assert (await send(url, resolver=FakeResolver(["127.0.0.1", "127.0.0.2"]))).status == 204  # of two, one
        assert len(outside.requests) == 2 and inside.requests == []

    asyncio.run(run())


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_is_not_followed(code: int) -> None:
    async def run() -> None:
        async with receiver() as inside, receiver(status(code, f"location: http://127.0.0.1:{inside.port}/")) as heard:
            assert (await send(f"http://127.0.0.1:{heard.port}/")).status == code
        assert len(heard.requests) == 1 and inside.requests == []

    asyncio.run(run())


def test_proxies_and_passwords_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def run() -> None:
        async with receiver() as proxy, receiver() as heard:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
            await send(f"http://127.0.0.1:{heard.port}/")
        assert proxy.requests == [] and "authorization" not in heard.requests[0][1]

    asyncio.run(run())


def test_a_huge_body_is_left_where_it_is() -> None:
    async def run() -> None:
        head = [b"HTTP/1.1 200 OK\r\n\r\n"]
        endless: Iterator[bytes] = itertools.chain(head, itertools.repeat(b"x" * 65536))
        async with receiver(endless) as heard:
            assert (await send(f"http://127.0.0.1:{heard.port}/")).status == 200
        assert heard.sent_bytes < 16 << 20  # what fits into the sockets' buffers

    asyncio.run(run())


def test_a_body_that_never_comes_is_not_waited_for() -> None:
    async def run() -> None:
        async with receiver(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n") as heard:
            assert (await send(f"http://127.0.0.1:{heard.port}/")).status == 200

    asyncio.run(run())


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nx-a: 1\r\n"])
def test_a_status_that_never_comes_times_out(answer: bytes) -> None:
    async def run() -> None:
        async with receiver(answer) as heard:
            assert await refusal(f"http://127.0.0.1:{heard.port}/", timeout_s=0.1) == "timed out"

    asyncio.run(run())


def test_a_name_server_that_never_answers_times_out_too() -> None:
    class Silent(FakeResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
            await asyncio.Event().wait()
            raise AssertionError

    assert asyncio.run(refusal("https://a.example.com/", timeout_s=0.05, resolver=Silent())) == "timed out"


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * 65536 + b"\r\n\r\n", status(999999)],
)
def test_what_is_not_http_is_no_answer(answer: bytes) -> None:
    async def run() -> None:
        async with receiver(answer) as heard:
            assert await refusal(f"http://127.0.0.1:{heard.port}/") == "no HTTP answer"

    asyncio.run(run())


def test_reasons_name_no_address() -> None:
    class Nowhere(FakeResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def run() -> None:
        async with receiver() as heard:
            pass  # its port is closed again
        assert await refusal(f"http://127.0.0.1:{heard.port}/") == "no connection"
        assert await refusal("https://a.example.com/", resolver=Nowhere()) == "the name was not found"

    asyncio.run(run())


def test_the_systems_resolver_reads_the_systems_names() -> None:
    async def run() -> None:
        async with receiver() as heard:
            assert (await send(f"http://localhost:{heard.port}/")).status == 204
            assert await refusal("http://a." + "b" * 63 + ("." + "c" * 63) * 3 + "/") in (
                "the name was not found",
                "no HTTP answer",
            )

    asyncio.run(run())


def test_tls_asks_for_the_urls_name_and_a_certificate_of_nobody_is_refused(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=hooks.example.com"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)

    async def run() -> None:
        async with receiver(OK, tls=context) as heard:
            url = f"https://hooks.example.com:{heard.port}/"
            assert await refusal(url, resolver=FakeResolver(["127.0.0.1"])) == "TLS failed"
        assert names == ["hooks.example.com"] and heard.requests == []

    asyncio.run(run())
