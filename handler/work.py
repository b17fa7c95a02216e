"""A request on its way through the core, and one step for each request of a batch."""

import logging
from collections.abc import Callable, Iterable
from typing import Optional

from handler import codecs
from handler.errors import ServeError
from handler.messages import Outcome, Request

log = logging.getLogger(__name__)


class Work:
    """A request on its way. An error or a head ends it; an equal one that came first, its `twin`, may do so for it."""

    kind: codecs.Kind = "raw"
    key: bytes = b""
    item: codecs.Item = codecs.NOTHING
    head: bytes | None = None
    outcome: Outcome = "MISS"
    twin: Optional["Work"] = None
    fresh: bool = False  # it, or an equal one, must come from the model
    storable: bool = False

    def __init__(self, request: Request) -> None:  # not a dataclass, which would set all the rest for every hit too
        self.request = request
        self.error: ServeError | None = request.error


def each(step: Callable[[Work], None], batch: Iterable[Work]) -> None:
    """One step for each request; whatever it meets, the neighbours do not notice."""
    for work in batch:
        try:
            step(work)
        except ServeError as error:
            work.error = error
        except Exception:
            log.exception("request %s failed", work.request.request_id)


def done(batch: Iterable[Work]) -> dict[bytes, bytes]:
    """The heads that the cache is to keep, by their keys."""
    return {work.key: work.head for work in batch if work.head is not None and work.storable}
