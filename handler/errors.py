"""The errors that users may see, each one line that says what was wrong and what was expected.

DistilleryError           a fault the user can mend: commands print it without a traceback and exit 1
├── SettingsError         a setting or a flag: names the key, the value, what was expected
├── BundleError           a bundle or an archive that is incomplete, touched or of another kind
└── ServeError            a request that gets no prediction; owns its HTTP status and its code
    ├── BadInput          400  malformed, wrong shape, not finite, out of range
    ├── TooLarge          413  more pixels or rows than the limits allow
    ├── Unsupported       415  not an image that we read
    ├── Internal          500  a fault of ours; its traceback is in the worker's log
    └── NotOffered        501  this archive, or what is installed beside it, cannot do that
"""

import difflib
import logging
from collections.abc import Iterable
from typing import Any, ClassVar

log = logging.getLogger(__name__)


class DistilleryError(Exception):
    """A fault that the user can mend; its text is one line."""


class SettingsError(DistilleryError):
    """A setting that does not exist or has a value that cannot be used."""


class BundleError(DistilleryError):
    """A bundle or an archive that must not be served."""


class ServeError(DistilleryError):
    """A request that gets an error instead of a prediction: `status` is HTTP's, `code` is for programs."""

    status: ClassVar[int] = 400

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BadInput(ServeError):
    """The body is not what the contract asks for."""


class TooLarge(ServeError):
    """The body asks for more work than the limits allow."""

    status = 413


class Unsupported(ServeError):
    """The body is of a kind that no codec reads."""

    status = 415


class Internal(ServeError):
    """A fault of ours: the request is not to blame, and the cause stands in the worker's log."""

    status = 500

    def __init__(self) -> None:
        super().__init__("internal", "the model could not answer; the worker's log says why, under this request_id")


class NotOffered(ServeError):
    """What the request asks for is not to be had of this archive, or not where it runs."""

    status = 501

    def __init__(self, message: str) -> None:
        super().__init__("unsupported", message)


def told(error: Exception, request_id: str) -> ServeError:
    """What the client is told of an error that is being handled: itself if it is one for clients, else `Internal`.

    Of the latter the log has the rest, under the request's id.
    """
    if isinstance(error, ServeError):
        return error
    log.exception("request %s failed", request_id)
    return Internal()


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that does not exist: `unknown KIND 'NAME'`, with the nearest known one or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(names)}"
    return f"unknown {kind} '{name}': {hint}"


def line(error: Exception) -> str:
    """Another's error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def json_type(value: Any) -> str:
    """The name JSON has for the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
