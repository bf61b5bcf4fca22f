"""The server's log: one JSON object per line on standard error, without texts and keys."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import IO, Any

LOGGER = logging.getLogger("bitfit.serve")
_LIBRARIES = ("uvicorn", "uvicorn.error")


class JsonLines(logging.Formatter):
    """Formats a record as ``{"time", "level", "event", ...}`` on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. An exception's traceback is the field ``trace``."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def configure(stream: IO[str] | None = None) -> None:
    """Send the log of the server, and of uvicorn below it, to ``stream`` (standard error)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name in (LOGGER.name, *_LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").handlers = []
    logging.getLogger("uvicorn.error").propagate = True


def log(event: str, *, level: int = logging.INFO, trace: bool = False, **fields: Any) -> None:
    """Write one line; ``trace`` adds the traceback of the exception being handled."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=trace)
