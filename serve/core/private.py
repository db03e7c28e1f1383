"""Makes files and folders private to their owner: they hold prompts, clips and digests of keys of all tenants."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)
FOLDER, FILE = 0o700, 0o600


def make_folder(path: Path, is_ours: bool = False) -> None:
    """Make a folder, private where it is new.

    is_ours: nobody else has anything in it, so a folder that is there already becomes private as well, with all that
    is in it. That is done once: the folder's own mode is changed last.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with suppress(FileExistsError):  # another replica starts, too
            folder.mkdir(mode=FOLDER)
    if not path.is_dir():
        raise NotADirectoryError(f"{path} must be a folder")
    if is_ours and path not in missing and _others(path):
        for place, folders, files in os.walk(path):
            for name in files:
                restrict(Path(place, name), FILE)
            for name in folders:
                restrict(Path(place, name), FOLDER)
        restrict(path, FOLDER)


def restrict(path: Path, mode: int = FILE) -> None:
    """Remove the rights of all but the owner from a file or folder, if it is there and ours."""
    try:
        if _others(path) and not path.is_symlink():
            path.chmod(mode)
    except FileNotFoundError:
        return
    except PermissionError:
        logger.warning("%s can be read by others, and belongs to somebody else", path.name)


def _others(path: Path) -> int:
    """Return the rights of group and others."""
    return stat.S_IMODE(path.stat().st_mode) & 0o077
