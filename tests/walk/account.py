"""A stranger: a fresh account without a home, a clone of its own, a long TMPDIR, and terminals to type in."""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED_ON = re.compile(
    r"PIP_.*|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|(?i:(https?|no)_proxy)"
)  # how the network is reached
SOCKET_PATH = 107  # bytes that Linux takes


class Account:
    """folder is the stranger's own, and all that he may write to."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.folder, self.environment = name, folder, environment
        found = pwd.getpwnam(name)
        self.uid, self.gid = found.pw_uid, found.pw_gid

    def start(self, words: Sequence[str], cwd: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words,
            cwd=cwd,
            env=self.environment,
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            umask=0o022,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def owns(self, *paths: Path) -> None:
        for path in paths:
            for each in (path, *path.rglob("*")):
                os.chown(each, self.uid, self.gid, follow_symlinks=False)

    def processes(self) -> dict[int, str]:
        """Return the processes that run as the stranger: id -> command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and entry.stat().st_uid == self.uid:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if command:  # else it has ended already
                        found[int(entry.name)] = command
        return found


@contextmanager
def stranger() -> Iterator[Account]:
    """Make an account, and remove it afterwards with everything it left."""
    name = f"walk-{secrets.token_hex(4)}"
    subprocess.run(
        ["useradd", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/bin/bash", name], check=True
    )
    folder = Path(tempfile.mkdtemp(prefix="walk-", dir="/var/tmp"))
    try:
        account = Account(name, folder, {})
        long = folder / ("a-temporary-folder-with-a-name-" + "so-" * 30 + "long")
        long.mkdir()
        assert len(bytes(long)) > SOCKET_PATH
        (folder / "pip.conf").write_text(_pip_settings())
        account.environment = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)} | {
            "PATH": PATH,
            "TMPDIR": str(long),
            "LANG": "C.UTF-8",
            "PIP_CONFIG_FILE": str(folder / "pip.conf"),
        }
        account.owns(folder)
        yield account
    finally:
        left = Account(name, folder, {}).processes()
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(50):
            if subprocess.run(["userdel", name], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)


def _pip_settings() -> str:
    """Return this account's own pip settings, which another account cannot read, as one file's text."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    lines = ["[global]"]
    for name, value in re.findall(r"^(?:global|install|user)\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE):
        lines.append(f"{name} = {value}")
    return "\n".join(lines) + "\n"


class Terminal:
    """A shell in which commands are typed one after the other. Its output is read at once, whoever looks at it."""

    def __init__(self, account: Account, cwd: Path, until_s: float) -> None:
        self.until_s, self.said = until_s, ""
        self.process = account.start(["bash", "--noprofile", "--norc"], cwd)
        self._heard = threading.Condition()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def run(self, command: str) -> str:
        """Type a command, wait for its end and return its output. AssertionError where it failed, or took too long."""
        mark = secrets.token_hex(8)
        began_s, before = time.monotonic(), len(self.said)
        self._type(f"{command}\nprintf '\\n{mark} %s\\n' $?\n")
        status = self._wait_for(rf"\n{mark} (\d+)\n", command, before)
        told = self.said[before:].partition(f"\n{mark}")[0].strip()
        print(f"  {time.monotonic() - began_s:6.1f} s  $ {command.splitlines()[0]}", flush=True)
        assert status == "0", f"$ {command}\nended with {status}:\n{told[-4000:]}"
        return told

    def start(self, command: str, ready: str) -> str:
        """Type a command that stays, wait until it says `ready`, and return the pattern's group."""
        began_s, before = time.monotonic(), len(self.said)
        self._type(f"exec {command}\n")
        found = self._wait_for(ready, command, before)
        print(f"  {time.monotonic() - began_s:6.1f} s  $ {command} ...", flush=True)
        return found

    def interrupt(self) -> int:
        """Press Ctrl-C and return the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(max(1.0, self.until_s - time.monotonic()))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the shell; commands that still run in it are killed."""
        pipes = self.process.stdin, self.process.stdout
        assert pipes[0] is not None and pipes[1] is not None
        with suppress(BrokenPipeError):
            pipes[0].close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._listener.join(5)
        pipes[1].close()

    def _type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        while read := os.read(self.process.stdout.fileno(), 65536):
            with self._heard:
                self.said += read.decode(errors="replace")
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def _wait_for(self, pattern: str, command: str, start: int) -> str:
        with self._heard:
            while (found := re.search(pattern, self.said[start:])) is None:
                left_s = self.until_s - time.monotonic()
                told = f"$ {command}\n{{}}:\n{self.said[start:][-4000:]}"
                assert left_s > 0, told.format("is not done, and the walk's time is over")
                assert self._listener.is_alive(), told.format("ended before it was ready")
                self._heard.wait(min(left_s, 1.0))
        return found[1]
