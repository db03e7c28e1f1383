"""Logs as lines of JSON, without keys, prompts and paths: callers of the loggers give ids and codes alone."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from ...runtime.core.config import load_settings

JOB = re.compile(r"video_[0-9a-f]{32}")
REQUEST: ContextVar[str | None] = ContextVar("request", default=None)  # the id of the request that is being answered
MAX_FILE_BYTES = 8 * 2**20  # of a process; then it begins anew, and whoever follows it has read it by then
SUFFIX = ".jsonl"


class JsonLines(logging.Formatter):
    """Formats time, level, process, logger, message, ids of job and request, and an exception's type and place.

    `extra={"facts": {...}}` of a call adds more.
    """

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        message = " ".join(record.getMessage().split())
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self.process or record.processName,
            "logger": record.name,
            "message": message,
        }
        if job := JOB.search(message):
            line["job"] = job[0]
        if request := REQUEST.get():
            line["request"] = request
        line |= getattr(record, "facts", {})  # numbers that whoever logs them gives apart from the message
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is not None:
                line["at"] = f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}"
        return json.dumps(line)


def as_text(line: str) -> str:
    """Return a line of `JsonLines` as people read it; any other line stays as it is."""
    try:
        found = json.loads(line)
        told = f"{found['time'][11:23]} {found['level']:7} {found['process']}: {found['message']}"
    except (ValueError, KeyError, TypeError):
        return line
    ending = [f"{name} {found[name]}" for name in ("error", "at", "request") if name in found]
    return f"{told} ({', '.join(ending)})" if ending else told


class TextLines(JsonLines):
    def format(self, record: logging.LogRecord) -> str:
        return as_text(super().format(record))


def log_as_json(process: str) -> None:
    """Log as JSON from the `skylapse` loggers of one of the service's processes; `process` names its part.

    The lines go to SKYLAPSE_LOG_TO, or stderr; others' loggers are left as they are.
    """
    logger = logging.getLogger("skylapse")
    if any(isinstance(handler.formatter, JsonLines) for handler in logger.handlers):
        return
    settings = load_settings()
    handler = _handler(settings.log_to, process)
    handler.setFormatter(JsonLines(process))
    logger.addHandler(handler)
    logger.setLevel(settings.log_level.upper())
    logger.propagate = False


def _handler(log_to: Path | None, process: str) -> logging.Handler:
    if log_to is None:
        return logging.StreamHandler(sys.stderr)
    if log_to.is_dir():
        return RotatingFileHandler(
            log_to / f"{process}-{os.getpid()}{SUFFIX}", maxBytes=MAX_FILE_BYTES, backupCount=1, delay=True
        )
    return logging.FileHandler(log_to)  # such as a container's /proc/1/fd/1
