"""README from the top, as a stranger who copies every line: a fresh clone, an account without a home, a long TMPDIR.

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
    r"pip install .*tensorrt": "gigabytes for a GPU that is not there",
    r"skylapse serve --model Wan-AI/": "a GPU, and weights from the hub",
}
STAYS = {r"skylapse serve$": r"skylapse serves at (\S+)"}  # what it says when it is ready
MADE = ("out/demo.mp4", "out/demo.png", "star.mp4", "star.png", "first.png", "next.mp4", "out.mp4", "circle.mp4")


@pytest.fixture(scope="module")
def account() -> Iterator[Account]:
    with stranger() as account:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(account.folder / "skylapse")], check=True)
        account.owns(account.folder / "skylapse")
        yield account


def test_readme_works_from_the_top(account: Account) -> None:
    until_s = time.monotonic() + TIME_S
    checkout = account.folder / "skylapse"
    port = free_port()
    print(f"\n{account.name}, without HOME, TMPDIR of {len(account.environment['TMPDIR'])} bytes", flush=True)
    with ExitStack() as stack:

        def terminal() -> Terminal:
            return stack.enter_context(Terminal(account, checkout, until_s))

        here, service = terminal(), None
        for block in blocks(checkout / "README.md"):
            for command in typed(block):
                if reason := next((why for begins, why in NOT_HERE.items() if re.match(begins, command)), None):
                    print(f"  not run:   $ {command} ({reason})", flush=True)
                elif ready := next((said for whole, said in STAYS.items() if re.match(whole, command)), None):
                    service = terminal()
                    service.run("source .venv/bin/activate")
                    assert service.start(f"{command} --port {port}", ready).endswith(f":{port}")
                    here = terminal()  # the second one, which README asks for
                else:
                    here.run(command.replace(f":{PORT}/", f":{port}/"))
        assert [name for name in MADE if not (checkout / name).is_file()] == []
        assert service is not None and service.interrupt() == 0, service and service.said
        print(f"  {time.monotonic() + TIME_S - until_s:6.1f} s  all of it", flush=True)
    ended_s = time.monotonic() + 30.0
    while left := account.processes():
        assert time.monotonic() < ended_s, f"the service has left processes behind: {left}"
        time.sleep(0.2)


def typed(block: Block) -> list[str]:
    if block.is_shell:
        return block.commands
    return [f"python - <<'EOF'\n{block.text}\nEOF"] if block.language == "python" else []


def free_port() -> int:
    """README's own where nobody has it."""
    for port in (PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("no port is free")


def test_every_line_that_is_left_out_is_one_of_the_readme() -> None:
    lines = [command for block in blocks(Path(ROOT / "README.md")) for command in typed(block)]
    for begins in (*NOT_HERE, *STAYS):
        assert any(re.match(begins, line) for line in lines), begins
