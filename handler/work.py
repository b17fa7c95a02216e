"""A request on its way through the core, and one step for each request of a batch."""

from collections.abc import Callable, Iterable
from typing import Optional

from handler import codecs
from handler.errors import told
from handler.keys import Keyed
from handler.messages import Outcome, Request


class Work:
    """What the cache cannot answer. An error or a head ends it; an equal one before it, its `twin`, may do so too."""

    item: codecs.Item = codecs.NOTHING
    head: bytes | None = None
    twin: Optional["Work"] = None
    fresh: bool = False  # it, or an equal one, must come from the model
    storable: bool = False

    def __init__(self, request: Request, keyed: Keyed) -> None:  # a dataclass would set all the rest, too
        self.request = request
        self.kind, self.key, self.error = keyed.kind, keyed.key, keyed.error
        self.outcome: Outcome = "MISS" if request.look_up else "BYPASS"


def each(step: Callable[[Work], None], batch: Iterable[Work]) -> None:
    """One step for each request; whatever it meets, the neighbours do not notice."""
    for work in batch:
        try:
            step(work)
        except Exception as error:
            work.error = told(error, work.request.request_id)


def done(batch: Iterable[Work]) -> dict[bytes, bytes]:
    """The heads that the cache is to keep, by their keys."""
    return {work.key: work.head for work in batch if work.head is not None and work.storable}
