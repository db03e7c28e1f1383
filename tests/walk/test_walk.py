"""README and the first pages, as a stranger copies every line: a fresh clone, an account without a home, a long TMPDIR.

`make test-walk` runs it, in at most ten minutes (WALK_S=1800 on a machine that others keep busy). It needs root, to
make the account, and packages for pip.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from markdown_blocks import ROOT, Block, blocks
from walk.account import Account, Terminal, stranger

pytestmark = [pytest.mark.walk, pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a fresh account")]
TIME_S = float(os.environ.get("WALK_S", "600"))
PORT = 8000
NOT_HERE = {  # what a line begins with -> why nobody can run it on a machine of CI
    r"docker ": "no Docker daemon",
    r"make test$": "CI runs it",
    r"pip install .*tensorrt": "gigabytes for a GPU that is not there",
    r"skylapse serve --model Wan-AI/": "a GPU, and weights from the hub",
}
STAYS = {r"(.venv/bin/)?skylapse serve$": r"skylapse serves at (\S+)"}  # what it says when it is ready
WALKED = ("README.md", "docs/start.md", "docs/install.md")
MADE = ("out/demo.mp4", "out/demo.png", "star.mp4", "star.png", "first.png", "next.mp4", "out.mp4", "circle.mp4")


@pytest.fixture(scope="module")
def account() -> Iterator[Account]:
    with stranger() as account:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(account.folder / "skylapse")], check=True)
        account.owns(account.folder / "skylapse")
        yield account


def test_first_pages_work_from_the_top(account: Account) -> None:
    until_s = time.monotonic() + TIME_S
    checkout = account.folder / "skylapse"
    print(f"\n{account.name}, without HOME, TMPDIR of {len(account.environment['TMPDIR'])} bytes", flush=True)
    for page in WALKED:
        print(f"  {page}", flush=True)
        walk(account, checkout, page, until_s)
    assert [name for name in MADE if not (checkout / name).is_file()] == []
    print(f"  {time.monotonic() + TIME_S - until_s:6.1f} s  all of it", flush=True)
    ended_s = time.monotonic() + 30.0
    while left := account.processes():
        assert time.monotonic() < ended_s, f"the service has left processes behind: {left}"
        time.sleep(0.2)


def walk(account: Account, checkout: Path, page: str, until_s: float) -> None:
    """Type every line of a page, in a second terminal after one that stays; stop what stays at the end."""
    port = free_port()
    with ExitStack() as stack:

        def terminal() -> Terminal:
            return stack.enter_context(Terminal(account, checkout, until_s))

        here, service = terminal(), None
        for command in (command for block in blocks(checkout / page) for command in typed(block)):
            if reason := next((why for begins, why in NOT_HERE.items() if re.match(begins, command)), None):
                print(f"  not run:   $ {command} ({reason})", flush=True)
            elif ready := next((said for whole, said in STAYS.items() if re.match(whole, command)), None):
                service = terminal()
                service.run("source .venv/bin/activate")
                assert service.start(f"{command} --port {port}", ready).endswith(f":{port}")
                here = terminal()
            else:
                here.run(command.replace(f":{PORT}/", f":{port}/"))
        assert service is None or service.interrupt() == 0, service and service.said


def typed(block: Block) -> list[str]:
    if block.is_shell:
        return block.commands
    return [f"python - <<'EOF'\n{block.text}\nEOF"] if block.language == "python" else []


def free_port() -> int:
    """Return the port that the pages name where it is free, or another."""
    for port in (PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("no port is free")


def test_every_line_that_is_left_out_is_one_of_the_pages() -> None:
    lines = [command for page in WALKED for block in blocks(ROOT / page) for command in typed(block)]
    for begins in (*NOT_HERE, *STAYS):
        assert any(re.match(begins, line) for line in lines), begins
