"""TorchServe's log files, read for the one line that says why a worker cannot load."""

import itertools
import re
from pathlib import Path

ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:: .*)?$")  # the last line of a traceback
# TorchServe's own errors, which follow the real one: its second try after a failed import, and what it makes of any
# RuntimeError.
MISLEADING = ("No module named 'ts.torch_handler", "RuntimeError: 500 - Unknown exception")


class Tail:
    """What is written to a file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._from = path.stat().st_size if path.is_file() else 0

    def text(self) -> str:
        """All that was written since."""
        if not self.path.is_file():
            return ""
        with self.path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(self._from if size >= self._from else 0)  # smaller: it was rolled over
            return stream.read().decode(errors="replace")


def load_failure(workers: str, server: str) -> str | None:
    """Why the archive cannot be loaded, out of model_log.log and ts_log.log; None while all is well."""
    lines = [line.partition(" MODEL_LOG - ")[2] for line in workers.splitlines()]
    if "Backend worker process died." in lines:
        reason = traceback_reason(lines)
        if reason:
            return reason
    refused = re.search(r"ModelServer - Failed to load model: .*", server)
    if refused:
        return f"TorchServe refuses it: {refused.group().partition(' - ')[2]}"
    # The log of the worker follows a little later, if it comes at all: believe only a second death.
    if server.count("Load model failed: ") > 1:
        return "the worker died without a word (killed, or out of memory?)"
    return None


def traceback_reason(lines: list[str]) -> str | None:
    """The error line of the last traceback that tells the cause; None while none is complete."""
    reasons = [
        line
        for above, line in itertools.pairwise(lines)
        if above.startswith("  ") and ERROR.match(line) and not any(words in line for words in MISLEADING)
    ]
    return reasons[-1] if reasons else None
