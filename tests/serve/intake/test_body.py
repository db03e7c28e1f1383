"""Bodies as SDKs send them, and bodies without end: what becomes of them, and that no file is left behind."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from skylapse.serve.intake import body as uploads
from skylapse.serve.intake.body import Body, Unread, read_body
from skylapse.serve.intake.strict_json import MAX_BYTES
from skylapse.serve.wire.errors import ApiError

from ..bad_media import media
from ..bodies import FORM, JSON, MAX, field, file, files_in, form, request
from ..raw_http import Client

# ------------------------------------------------------------------------------------------------ what SDKs send

# Recorded from openai 3.54.0 (Python; its JavaScript sends the same but for the boundary).
CREATE = (
    b'--6274d67be758e8915600fb33059ad642\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na star\r\n'
    b'--6274d67be758e8915600fb33059ad642\r\nContent-Disposition: form-data; name="seconds"\r\n\r\n4\r\n'
    b'--6274d67be758e8915600fb33059ad642\r\nContent-Disposition: form-data; name="size"\r\n\r\n64x64\r\n'
    b'--6274d67be758e8915600fb33059ad642\r\nContent-Disposition: form-data; name="seed"\r\n\r\n7\r\n'
    b'--6274d67be758e8915600fb33059ad642\r\nContent-Disposition: form-data; name="resize"\r\n\r\ntrue\r\n'
    b"--6274d67be758e8915600fb33059ad642--\r\n"
)
WITH_A_FILE = (
    b'--860961314450b56a3b716c948758725b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na star\r\n'
    b'--860961314450b56a3b716c948758725b\r\nContent-Disposition: form-data; name="input_reference"; filename="upload"'
    b"\r\nContent-Type: application/octet-stream\r\n\r\n\x89PNG\r\n--860961314450b56a3b716c948758725b--\r\n"
)
EDIT = (
    b'--30cf2c218e883539d90c7f6900c94cfb\r\nContent-Disposition: form-data; name="prompt"\r\n\r\np\r\n'
    b'--30cf2c218e883539d90c7f6900c94cfb\r\nContent-Disposition: form-data; name="video[id]"\r\n\r\nvideo_1\r\n'
    b"--30cf2c218e883539d90c7f6900c94cfb--\r\n"
)
IMAGE_URL = (
    b'--636f99aceacbdaa2bb08c792c48a1197\r\nContent-Disposition: form-data; name="prompt"\r\n\r\np\r\n'
    b'--636f99aceacbdaa2bb08c792c48a1197\r\nContent-Disposition: form-data; name="input_reference[image_url]"\r\n\r\n'
    b"data:image/png;base64,iVBORw==\r\n--636f99aceacbdaa2bb08c792c48a1197--\r\n"
)
ASKED = {"prompt": "a star", "seconds": "4", "size": "64x64", "seed": "7", "resize": "true"}


def recorded(body: bytes) -> str:
    return f"multipart/form-data; boundary={body[2:34].decode()}"


@pytest.mark.parametrize("step", [1, 7, 2**16])
def test_forms_of_the_sdks_are_read_however_they_are_cut(step: int, read: Callable[..., Body]) -> None:
    def pieces(body: bytes) -> Iterator[bytes]:
        return (body[start : start + step] for start in range(0, len(body), step))

    assert read(recorded(CREATE), pieces(CREATE)).fields == ASKED
    assert read(recorded(EDIT), pieces(EDIT)).fields == {"prompt": "p", "video": {"id": "video_1"}}
    for body in (WITH_A_FILE, IMAGE_URL):
        with read(recorded(body), pieces(body)) as got:
            (upload,) = got.files.values()
            assert [*got.files] == ["input_reference"] and [*got.fields] == ["prompt"]
            assert upload.path.read_bytes() == b"\x89PNG"
            assert (upload.num_bytes, upload.sha256) == (4, hashlib.sha256(b"\x89PNG").hexdigest())


def test_json_says_what_a_form_says(read: Callable[..., Body]) -> None:
    asked = {"prompt": "ein Stern ★", "seconds": 4, "seed": 7, "guidance_scale": 3.5, "input_reference": None}
    asked["video"] = {"id": "video_1"}
    got = read(JSON + "; charset=utf-8", json.dumps(asked).encode())
    assert got.fields == {name: value for name, value in asked.items() if name != "input_reference"}
    image = {"image_url": "data:image/png;base64," + base64.b64encode(media("png")).decode()}
    with read(JSON, json.dumps({"input_reference": image}).encode()) as body:
        assert body.fields == {} and body.files["input_reference"].path.read_bytes() == media("png")


def test_a_form_of_text_may_be_urlencoded(read: Callable[..., Body]) -> None:
    got = read("application/x-www-form-urlencoded", b"prompt=a+star&video[id]=video_1&negative_prompt=")
    assert got.fields == {"prompt": "a star", "video": {"id": "video_1"}, "negative_prompt": ""}


@pytest.mark.parametrize("content_type", [None, JSON, FORM.replace("=b", "=c") + "x", "text/plain"])
def test_no_body_is_no_fields(
    content_type: str | None, read: Callable[..., Body], refuse: Callable[..., ApiError]
) -> None:
    if content_type is not None and content_type.startswith("multipart"):
        assert refuse(content_type, b"").code == "incomplete_body"  # which a form is not
    else:
        assert read(content_type, b"").fields == read(content_type, b"", length=0).fields == {}


def test_a_file_that_nobody_chose_is_none(read: Callable[..., Body]) -> None:
    with read(FORM, form(field("prompt"), file("input_reference", b"", ""))) as body:
        assert (body.fields, body.files) == ({"prompt": "x"}, {})


def test_files_are_gone_when_the_block_is_left(read: Callable[..., Body], tmp_path: Path) -> None:
    with read(FORM, form(file("input_reference", b"a"), file("video", b"b" * 100_000))) as body:
        assert len(files_in(tmp_path)) == 3
        assert [upload.num_bytes for upload in body.files.values()] == [1, 100_000]
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "../../../../tmp/evil",
        "/etc/passwd",
        "..\\\\..\\\\evil",
        "a\0b",
        "x" * 3000,
        "C:\\\\evil",
        "\udcff",
        "%2e%2e%2fevil",
    ],
)
def test_names_that_clients_give_files_are_never_used(name: str, read: Callable[..., Body], tmp_path: Path) -> None:
    content = file("input_reference", b"x", "NAME").replace(b"NAME", name.encode(errors="surrogateescape"))
    with read(FORM, form(content)) as body:
        path = body.files["input_reference"].path
        assert (
            path.name == "0" and path.parent.parent == tmp_path / "scratch" and path.parent.name.startswith("upload-")
        )
        assert len(files_in(tmp_path)) == 2


# ---------------------------------------------------------------------------------------------------- sizes and ends


def test_a_promise_of_too_much_is_refused_before_anything_is_read(refuse: Callable[..., ApiError]) -> None:
    unread = (pytest.fail("it was read") for _ in "x")
    error = refuse(JSON, unread, length=MAX + 1)
    assert (error.status, error.code, error.headers) == (413, "request_too_large", {"connection": "close"})
    assert refuse(JSON, unread, length=-1).status == 400


ENDLESS = {
    "json": (JSON, b'{"prompt": "', b"a" * 65536),
    "json_numbers": (JSON, b'{"a": [', b"0," * 32768),
    "file": (FORM, file("video")[:-3], b"\0" * 65536),
    "boundaries_that_are_none": (FORM, file("video")[:-3], b"\r\n--" * 16384),
    "newlines": (FORM, b"", b"\r\n" * 32768),
    "after_the_end": (FORM, form(field("prompt")), b"x" * 65536),
    "urlencoded": ("application/x-www-form-urlencoded", b"a=", b"x" * 65536),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_body_without_end_is_refused_while_it_arrives(name: str, refuse: Callable[..., ApiError]) -> None:
    content_type, start, piece = ENDLESS[name]
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield start
        while True:
            sent += len(piece)
            yield piece

    tracemalloc.start()
    error = refuse(content_type, pieces(), max_bytes=8 * MAX)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (error.status, error.code, error.headers) == (413, "request_too_large", {"connection": "close"})
    assert sent <= 8 * MAX + len(piece) and peak < 20 * MAX


@pytest.mark.parametrize("name", ["prompt", "input_reference[image_url]", "input_reference"])
def test_texts_have_bounds_of_their_own(name: str, refuse: Callable[..., ApiError]) -> None:
    pieces = iter([field(name)[:-3], *[b"x" * MAX] * 50])
    error = refuse(FORM, pieces, max_bytes=64 * MAX)
    assert (error.status, error.code) == (400, "string_above_max_length")
    assert isinstance(error, Unread) and next(pieces)  # the rest was left alone


def test_many_texts_have_a_bound_together(refuse: Callable[..., ApiError]) -> None:
    pieces = (field("input_reference[image_url]", b"x" * 15 * MAX) for _ in range(4))
    assert refuse(FORM, pieces, max_bytes=64 * MAX).code == "string_above_max_length"


def test_json_has_a_bound_of_its_own(refuse: Callable[..., ApiError]) -> None:
    error = refuse(JSON, iter([b'{"a": "', *[b"x" * MAX] * 30]), max_bytes=64 * MAX)
    assert (error.status, error.message.split()[-4]) == (413, str(MAX_BYTES))


def test_a_body_shorter_than_promised_is_400(refuse: Callable[..., ApiError]) -> None:
    error = refuse(JSON, b"{}", length=100)
    assert (error.status, error.code, error.headers) == (400, "incomplete_body", {"connection": "close"})


def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    messages: Iterator[dict[str, Any]] = iter(
        [{"type": "http.request", "body": file("video"), "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> dict[str, Any]:
        return next(messages)

    asked = request(FORM, iter([]), None)
    with pytest.raises(Unread) as caught:
        asyncio.run(read_body(Request(asked.scope, receive), max_bytes=MAX, folder=tmp_path))
    assert caught.value.code == "incomplete_body" and files_in(tmp_path) == []


async def read_until_it_hangs(folder: Path, hangs: asyncio.Event) -> Body:
    pieces = iter([file("video")])

    async def receive() -> dict[str, Any]:
        if (piece := next(pieces, None)) is None:
            hangs.set()
            await asyncio.Event().wait()
        return {"type": "http.request", "body": piece, "more_body": True}

    return await read_body(Request(request(FORM, iter([]), None).scope, receive), max_bytes=MAX, folder=folder)


def test_a_body_that_takes_too_long_is_408(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "TIMEOUT_S", 0.01)
    with pytest.raises(Unread) as caught:
        asyncio.run(read_until_it_hangs(tmp_path, asyncio.Event()))
    assert (caught.value.status, files_in(tmp_path)) == (408, [])


def test_a_request_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    async def cancel() -> None:
        hangs = asyncio.Event()
        task = asyncio.create_task(read_until_it_hangs(tmp_path, hangs))
        await hangs.wait()
        assert files_in(tmp_path) != []
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(cancel())
    assert files_in(tmp_path) == []


def test_a_full_disk_is_503(read: Callable[..., Body], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").write_bytes(b"a file where the folder should be")
    with pytest.raises(Unread) as caught:
        read(FORM, form(file("video")))
    assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
    assert caught.value.headers == {"retry-after": "5", "connection": "close"}


# ----------------------------------------------------------------------------------------------- over real connections


class Server(uvicorn.Server):
    """A server that sets an event when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.has_started.set()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("scratch")

    async def create(request: Request) -> JSONResponse:
        try:
            with await read_body(request, max_bytes=8 * MAX, folder=folder) as body:
                return JSONResponse({"fields": body.fields, "files": {k: v.sha256 for k, v in body.files.items()}})
        except ApiError as error:
            return JSONResponse(error.body, error.status, error.headers)

    app = Starlette(routes=[Route("/v1/videos", create, methods=["POST"])])
    server = Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert server.has_started.wait(30)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Client(f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join(30)
    assert files_in(folder) == []


def test_a_file_arrives_over_a_real_connection(client: Client) -> None:
    content = bytes(range(256)) * 20_000
    answer = client.send("POST", "/v1/videos", [("Content-Type", FORM)], form(field("prompt"), file("video", content)))
    assert answer.status == 200
    assert json.loads(answer.body) == {
        "fields": {"prompt": "x"},
        "files": {"video": hashlib.sha256(content).hexdigest()},
    }


def test_an_endless_body_ends_with_its_connection(client: Client) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield file("video")[:-3]
        while sent < 1000 * MAX:
            sent += 2**16
            yield b"\0" * 2**16

    answer = client.send("POST", "/v1/videos", [("Content-Type", FORM)], pieces())
    assert answer.status in (413, None)  # its kernel may say that the connection is gone before we have read why
    assert answer.status is None or answer.headers["connection"] == "close"
    assert sent < 100 * MAX  # what was on its way when the server closed


def test_what_was_promised_and_never_came_does_no_harm(client: Client) -> None:
    for body in (b'{"prompt": ', form(file("video"))[:-9]):
        kind = JSON if body.startswith(b"{") else FORM
        assert client.send("POST", "/v1/videos", [("Content-Type", kind)], body, num_bytes=10_000).status in (400, None)
    answer = client.send("POST", "/v1/videos", [("Content-Type", JSON)], b"{}", num_bytes=2**40)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert client.send("POST", "/v1/videos", [("Content-Type", JSON)], b'{"prompt": "a"}').status == 200
