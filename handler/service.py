"""The core, which knows no server: a batch of requests in, a batch of answers out, each with a fate of its own.

kind, key ─► look up ─┬─ hits ───────────────────────────────────────────────┬─► head + tail ─► answer
                      └─ misses ─► one of each ─► decode ─► ONE forward ─► encode ─► store
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from handler import codecs
from handler.cache import CacheManager
from handler.codecs import answer
from handler.contract import probabilities
from handler.errors import Internal, ServeError
from handler.settings import LimitSettings

if TYPE_CHECKING:  # the protocol lives beside the engines, and those load torch
    from handler.model import ModelInterface

log = logging.getLogger(__name__)
Outcome = Literal["HIT", "MISS", "BYPASS", "ERROR"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request: its body and Content-Type (lower case, no parameters), or the error that reading it met.

    `look_up` false: the model answers even if the cache could. `store` false: the cache does not keep the answer.
    """

    payload: bytes = b""
    content_type: str = ""
    request_id: str = ""
    look_up: bool = True
    store: bool = True
    error: ServeError | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request gets: HTTP's status, JSON, headers; `outcome` is for the counts."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    outcome: Outcome


@dataclass(slots=True, eq=False)
class _Work:
    """A request on its way. An error or a head ends it; an equal one that came first, its `twin`, may do so for it."""

    request: Request
    error: ServeError | None
    kind: codecs.Kind = "raw"
    key: bytes = b""
    item: codecs.Item | None = None
    head: bytes | None = None
    outcome: Outcome = "MISS"
    twin: "_Work" = field(init=False)

    def __post_init__(self) -> None:
        self.twin = self


class Service:
    """Answers for one model; `identity` (name, version, digest) stands in each of them."""

    def __init__(
        self, model: "ModelInterface", cache: CacheManager, limits: LimitSettings, identity: Mapping[str, str]
    ) -> None:
        self.model, self.cache, self.limits = model, cache, limits
        self.contract = model.contract
        fresh, kept = answer.tail("model", identity), answer.tail("cache", identity)
        self.tails: dict[Outcome, bytes] = {"HIT": kept, "MISS": fresh, "BYPASS": fresh}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order. Never raises: what fails unexpectedly is logged and answered with 500."""
        batch = [_Work(request, request.error) for request in requests]
        try:
            _each(self._identify, (work for work in batch if work.error is None))
            known = [work for work in batch if work.key]
            self._look_up(known)
            self._compute([work for work in known if work.head is None])
        except Exception:
            log.exception("a batch failed; requests %s", ", ".join(request.request_id for request in requests))
        return [self._close(work) for work in batch]

    def _identify(self, work: _Work) -> None:
        request = work.request
        work.kind = codecs.kind_of(request.payload, request.content_type, self.contract)
        work.key = self.cache.key(work.kind, request.payload)

    def _look_up(self, batch: list[_Work]) -> None:
        asking = [work for work in batch if work.request.look_up]
        self.cache.bypassed += len(batch) - len(asking)
        for work in batch:
            work.outcome = "MISS" if work.request.look_up else "BYPASS"
        for work, head in zip(asking, self.cache.look_up([work.key for work in asking]), strict=True):
            if head is not None:
                work.head, work.outcome = head, "HIT"

    def _compute(self, missed: list[_Work]) -> None:
        first: dict[bytes, _Work] = {}
        for work in missed:
            work.twin = first.setdefault(work.key, work)
        self.cache.deduplicated += len(missed) - len(first)
        _each(self._decode, first.values())
        self._forward([(work, work.item) for work in first.values() if work.item is not None])
        fresh = {work.key: work.twin.head for work in missed if work.request.store}
        self.cache.put({key: head for key, head in fresh.items() if head is not None})

    def _decode(self, work: _Work) -> None:
        work.item = codecs.decode(work.kind, work.request.payload, self.contract, self.limits)

    def _forward(self, batch: list[tuple[_Work, codecs.Item]]) -> None:
        """Heads for all, from one call of the model; logits that are not finite fail their own request only."""
        if not batch:
            return
        logits = self.model.predict(np.concatenate([item.images for _, item in batch]))
        finite: NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(axis=1))
        scores = probabilities(np.where(finite[:, np.newaxis], logits, 0))
        rows, ids = scores.round(answer.DIGITS).tolist(), scores.argmax(axis=1).tolist()
        start = 0
        for work, item in batch:
            end = start + len(item.images)
            if finite[start:end].all():
                work.head = answer.head(item.form, rows[start:end], ids[start:end], self.contract.labels)
            else:
                log.error("request %s: the model's logits are not finite", work.request.request_id)
            start = end

    def _close(self, work: _Work) -> Answer:
        head, error = work.twin.head, work.twin.error
        if head is None:
            fault = error or Internal()
            body = answer.error(fault, work.request.request_id)
            return Answer(fault.status, body, {"content-type": "application/json"}, "ERROR")
        headers = {"content-type": "application/json", "X-Cache": work.outcome}
        return Answer(200, head + self.tails[work.outcome], headers, work.outcome)


def _each(step: Callable[[_Work], None], batch: Iterable[_Work]) -> None:
    """One step for each request; whatever it meets, the neighbours do not notice."""
    for work in batch:
        try:
            step(work)
        except ServeError as error:
            work.error = error
        except Exception:
            log.exception("request %s failed", work.request.request_id)
