"""Log lines: JSON for machines, plain text for a terminal. No prompts, no keys, no user in clear: they never get here.

Secrets are of a type that prints as `***`, and a record's extra fields are chosen by the code that writes it.
"""

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from gateway.domain.call import CallRecord

# The call that is being served here, so that whatever is logged on its way carries its ids.
IN_CALL: ContextVar[CallRecord | None] = ContextVar("in_call", default=None)


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, then the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:
            # A lone surrogate, as from a path that is not UTF-8: an odd line is better than none.
            shown = {
                name: value if isinstance(value, int | float) else _writable(value) for name, value in line.items()
            }
            return msgspec.json.encode(shown).decode()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    call, own = IN_CALL.get(), getattr(record, "fields", {})
    if call is None:
        return own
    ids = {"id": call.id, "trace": call.trace_id} if call.trace_id else {"id": call.id}
    return {**ids, **own}


def _writable(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


class PlainLines(logging.Formatter):
    """Short lines for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        fields = " ".join(f"{key}={value}" for key, value in _fields(record).items() if value != "")
        text = f"{time} {record.levelname.lower():<7} {record.name}: {record.getMessage()} {fields}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up_logs(style: str, level: str, stream: TextIO = sys.stderr) -> None:
    """Send the gateway's logs to `stream`. `style` is auto, json or text; auto asks whether it is a terminal."""
    is_plain = style == "text" or (style == "auto" and stream.isatty())
    sink = logging.StreamHandler(stream)
    sink.setFormatter(PlainLines() if is_plain else JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [sink]
    # Libraries at debug would quote requests; only the gateway's own loggers follow the policy.
    root.setLevel(logging.WARNING)
    logging.getLogger("gateway").setLevel(level.upper())
