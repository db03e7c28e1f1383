"""The release that is running: the revision that it was built from."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ...runtime.core.config import load_settings

UNKNOWN = "unknown"


@lru_cache(maxsize=1)
def revision() -> str:
    """Return SKYLAPSE_REVISION, which the images set; in a checkout its commit; else `unknown`."""
    return load_settings().revision or _checked_out(Path(__file__).parents[2] / ".git") or UNKNOWN


def _checked_out(git: Path) -> str | None:
    """Return the commit of a checkout, read from its files: an image has no git."""
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text().strip()
        packed = (line.split() for line in (git / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    except OSError:  # no checkout, or a worktree's, which keeps its files elsewhere
        return None
