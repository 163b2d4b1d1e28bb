"""Write the messages of the server as text or as lines of JSON, with the id of their request."""

import json
import logging
import time
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("demucs_infer_request_id", default="")
"""The id of the request that the current task answers; empty for everything else."""


class JsonFormatter(logging.Formatter):
    """Formats a message as one line of JSON, a traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := REQUEST_ID.get():
            line["request"] = request
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def make_formatter(name: str) -> logging.Formatter:
    """Return the formatter of `log_format`."""
    return JsonFormatter() if name == "json" else logging.Formatter("%(levelname)s: %(message)s")
