"""The core, which knows no server: a batch of requests in, a batch of answers out, each with a fate of its own.

kind, key ─► look up ─┬─ hits ────────────────────────────────────────────────────────┬─► head + tail ─► answer
                      └─ misses ─► one of each ─► decode ─► forward ─► encode ─► store ┤
                                       └─ of those, another worker is at some: wait ───┘
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from handler import codecs
from handler.cache import CacheManager
from handler.codecs import answer
from handler.errors import Internal
from handler.heads import Scores, head_each
from handler.keys import Keyed, Keys
from handler.messages import Answer, Outcome, Request
from handler.metrics import Metrics
from handler.settings import LimitSettings
from handler.work import Work, done, each

if TYPE_CHECKING:  # these load torch
    from handler.inside import Inside
    from handler.model import ModelInterface

log = logging.getLogger(__name__)


class Service:
    """Answers for one model; `identity` (name, version, digest) stands in each of them, `description` is JSON."""

    def __init__(
        self,
        model: "ModelInterface",
        cache: CacheManager,
        limits: LimitSettings,
        identity: Mapping[str, str],
        metrics: Metrics,
        inside: "Inside",
        description: bytes = b"{}",
    ) -> None:
        self.model, self.cache, self.limits, self.metrics = model, cache, limits, metrics
        self.inside, self.description = inside, description
        self.contract, self.seconds = model.contract, metrics.seconds
        self.keys = Keys(model.contract, cache.key)
        self.later: list[Callable[[], object]] = []
        fresh, kept = answer.tail("model", identity), answer.tail("cache", identity)
        self.tails: dict[Outcome, bytes] = {"HIT": kept, "MISS": fresh, "BYPASS": fresh}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order. Never raises: what fails unexpectedly is logged and answered with 500."""
        answers = self.respond(requests)
        self.settle()
        return answers

    def respond(self, requests: Sequence[Request]) -> list[Answer]:
        """As `answer`, but what no answer waits for is left to `settle`."""
        self.settle()
        began = perf_counter()
        keyed, asked = self.keys.of(requests)
        heads = self._look_up(asked)
        rest = self._rest(requests, keyed, heads) if None in heads else iter(())
        tail = self.tails["HIT"]
        answers = [next(rest) if head is None else Answer(200, head + tail, "HIT") for head in heads]
        self.seconds["batch"].append(perf_counter() - began)
        self.later.append(lambda: self.metrics.batch(len(requests)))
        return answers

    def settle(self) -> None:
        """Store and count, when the answers are sent and the next requests are on their way. Never raises."""
        later, self.later = self.later, []
        for step in later:
            try:
                step()
            except Exception:
                log.exception("an answer is not stored, or not counted")

    def _look_up(self, keys: list[bytes]) -> Sequence[bytes | None]:
        """The heads that the cache has; a fault of its costs nobody an answer."""
        began = perf_counter()
        try:
            return self.cache.look_up(keys)
        except Exception:
            log.exception("the cache cannot be asked")
            return [None] * len(keys)
        finally:
            self.seconds["lookup"].append(perf_counter() - began)

    def _rest(
        self, requests: Iterable[Request], keyed: Iterable[Keyed], heads: Iterable[bytes | None]
    ) -> Iterator[Answer]:
        """Answers to those that the cache has no head for, in order."""
        lacking = zip(requests, keyed, heads, strict=True)
        batch = [Work(request, what) for request, what, head in lacking if head is None]
        try:
            if missed := [work for work in batch if work.key]:
                self._compute(missed)
        except Exception:
            log.exception("a batch failed; requests %s", ", ".join(work.request.request_id for work in batch))
        return map(self._close, batch)

    def _compute(self, missed: list[Work]) -> None:
        """Heads for what the cache lacks, each computed once however many ask the same."""
        leads: dict[bytes, Work] = {}
        for work in missed:
            lead = leads.setdefault(work.key, work)
            work.twin = None if lead is work else lead
            lead.fresh |= not work.request.look_up
            lead.storable |= work.request.store
            self.cache.bypassed += not work.request.look_up
        self.cache.deduplicated += len(missed) - len(leads)
        if self.cache.shared:
            self._share(leads, missed)
        else:
            self._run(leads.values())

    def _share(self, leads: dict[bytes, Work], missed: list[Work]) -> None:
        """Heads, computed here or by the worker that was first to be asked the same.

        A claim on what got no answer to keep is given up.
        """
        ours = self.cache.claim([key for key, lead in leads.items() if not lead.fresh])
        others = [key for key, lead in leads.items() if not lead.fresh and key not in ours]
        try:
            self._run([lead for key, lead in leads.items() if lead.fresh or key in ours])
        finally:
            self.later.append(lambda: self.cache.release(ours - done(leads.values()).keys()))
        if others:
            self.settle()  # somebody may wait for ours
            came = self.cache.wait(others)
            for work in missed:
                if work.key in came:
                    work.head, work.outcome = came[work.key], "HIT"
            self._run([leads[key] for key in others if key not in came])

    def _run(self, leads: Collection[Work]) -> None:
        """Decode, forward, encode, store."""
        began = perf_counter()
        each(self._decode, leads)
        self.seconds["decode"].append(perf_counter() - began)
        try:
            self._forward([work for work in leads if work.item is not codecs.NOTHING])
        finally:
            self.later.append(lambda: self.cache.put(done(leads)))

    def _decode(self, work: Work) -> None:
        request = work.request
        work.item = codecs.decode(work.kind, request.payload, self.contract, self.limits, request.options)

    def _forward(self, batch: list[Work]) -> None:
        """Heads for all, from one call of the model."""
        if not batch:
            return
        began = perf_counter()
        logits = self.model.predict(codecs.stacked([work.item for work in batch], self.contract))
        computed = perf_counter()
        scores = Scores(logits)
        head_each(batch, scores, self.contract, self.inside)
        self.seconds["inference"].append(computed - began)
        self.seconds["encode"].append(perf_counter() - computed)
        self.later.append(lambda: self.metrics.predicted(scores.told(self.contract.labels)))

    def _close(self, work: Work) -> Answer:
        lead = work.twin or work
        if lead.head is not None:
            return Answer(200, lead.head + self.tails[work.outcome], work.outcome)
        if work.request.describe:
            return Answer(200, self.description, "BYPASS")
        fault = lead.error or Internal()
        self.metrics.add("distillery_refusals_total", label=fault.code)
        return Answer(fault.status, answer.error(fault, work.request.request_id), "ERROR")
