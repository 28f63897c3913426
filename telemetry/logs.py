"""How log records are written: one line an event, as ``key=value`` or as JSON.

Our records are events: a name, and fields that stay what they are (numbers, text, None) until
a line is made of them. What libraries log has no fields and becomes ``message``.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

from config import LogFormat

_FIELDS = "event_fields"  # the attribute of a record that holds those of an event
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_.@:+-]+")


def configure(log_format: LogFormat) -> None:
    """Send all log records to standard error in this form, from INFO on."""
    # what no line shows need not be found out for each (docs.python.org/3/howto/logging.html,
    # "Optimization", which names all of these)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FORMATTERS[log_format]())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def event(
    log: logging.Logger,
    name: str,
    /,
    *,
    level: int = logging.INFO,
    exc_info: BaseException | None = None,
    **fields: object,
) -> None:
    """Log that something happened: one line, with ``fields`` such as job, attempt and agent.

    ``exc_info`` adds the traceback of an exception that nobody expected.
    """
    if log.isEnabledFor(level):
        log.log(level, name, exc_info=exc_info, extra={_FIELDS: {"event": name, **fields}})


def make_event(record: logging.LogRecord, name: str, /, **fields: object) -> None:
    """Turn what a library logs into an event of ours."""
    record.__dict__[_FIELDS] = {"event": name, **fields}


class TextFormatter(logging.Formatter):
    """``time=... level=... logger=... event=... key=value``, an exception quoted at the end."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = record.__dict__.get(_FIELDS)
        if fields is None:
            message = _one_line(record.getMessage())
        else:
            message = " ".join(f"{key}={_text(value)}" for key, value in fields.items())
        line = f"time={_time(record)} level={record.levelname} logger={record.name} {message}"
        exception = _exception(record)
        return line if exception is None else f"{line} exception={exception!r}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger`` and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            **(record.__dict__.get(_FIELDS) or {"message": record.getMessage()}),
        }
        exception = _exception(record)
        if exception is not None:
            line["exception"] = exception
        return json.dumps(line, default=str)


_FORMATTERS: Mapping[LogFormat, type[logging.Formatter]] = {
    LogFormat.TEXT: TextFormatter,
    LogFormat.JSON: JsonFormatter,
}


def _time(record: logging.LogRecord) -> str:
    """Return when it happened, RFC 3339 in UTC."""
    second, milliseconds = divmod(int(record.created * 1000), 1000)
    return f"{_second(second)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=1)
def _second(second: int) -> str:
    """Return a second since 1970 as text; most lines are of the same one as those before."""
    return datetime.datetime.fromtimestamp(second, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _exception(record: logging.LogRecord) -> str | None:
    if not record.exc_info or record.exc_info[0] is None:
        return None
    return logging.Formatter().formatException(record.exc_info)


def _text(value: object) -> str:
    """Return a value as it stands in a line: quoted, with escapes, unless it is one plain word."""
    if type(value) is int:
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN_WORD.fullmatch(text) else repr(text)


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    # C1 controls steer terminals, and U+2028 ends lines too
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
