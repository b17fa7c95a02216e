"""What the core is asked and what it answers, whatever server stands around it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from handler.errors import ServeError
from handler.options import Options

Outcome = Literal["HIT", "MISS", "BYPASS", "ERROR"]
Headers = tuple[tuple[str, str], ...]
TYPE = "content-type", "application/json"
HEADERS: Mapping[Outcome, Headers] = {
    "HIT": (TYPE, ("X-Cache", "HIT")),
    "MISS": (TYPE, ("X-Cache", "MISS")),
    "BYPASS": (TYPE, ("X-Cache", "BYPASS")),
    "ERROR": (TYPE,),
}
"""Names and values that go with each answer, by what became of its request."""


@dataclass(slots=True)
class Request:
    """One request: its body and Content-Type (lower case, no parameters), or no body and the error that reading it met.

    `look_up` false: the model answers even if the cache could. `store` false: the cache does not keep the answer.
    `options` None is the plain answer. `describe` asks for nothing but a description of the model.
    """

    payload: bytes = b""
    content_type: str = ""
    request_id: str = ""
    look_up: bool = True
    store: bool = True
    options: Options | None = None
    error: ServeError | None = None
    describe: bool = False


@dataclass(slots=True)
class Answer:
    """What one request gets: HTTP's status, JSON, and what became of it."""

    status: int
    body: bytes
    outcome: Outcome

    @property
    def headers(self) -> Headers:
        """Names and values."""
        return HEADERS[self.outcome]
