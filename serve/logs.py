"""Logs as lines of JSON, without keys, prompts and paths: who writes one gives ids and codes alone."""

from __future__ import annotations

import json
import logging
import re
import sys
import time

JOB = re.compile(r"video_[0-9a-f]{32}")


class JsonLines(logging.Formatter):
    """Time, level, logger, message, the job that the message names, and an exception's type and place."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if job := JOB.search(message):
            line["job"] = job[0]
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


def log_as_json(level: int = logging.INFO) -> None:
    """For this process's `skylapse` loggers; others' are left as they are."""
    logger = logging.getLogger("skylapse")
    if not any(isinstance(handler.formatter, JsonLines) for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
