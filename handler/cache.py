"""CacheManager: which answers may be given again, a batch at a time, and how often that happened.

look_up ─► misses ─► claim ─┬─ ours ──────► compute ─► put, or release what has no answer to keep
                            └─ others' ───► wait, after that ─► compute what did not come
"""

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b

from handler.redis_link import RedisLink
from handler.redis_store import Kept, RedisStore
from handler.settings import CacheSettings
from handler.stores import MemoryStore, Store

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.016  # between two looks for what others compute


@dataclass(frozen=True)
class Counts:
    """What became of the requests and of the entries since the worker began.

    A request is a hit, a miss or bypassed. Of the hits, `shared_hits` were not in the worker and in Redis; of the
    misses and bypassed, the deduplicated were computed once for several. `errors`: how often Redis failed or refused.
    """

    hits: int
    shared_hits: int
    misses: int
    bypassed: int
    deduplicated: int
    expired: int
    evicted: int
    errors: int


class CacheManager:
    """Encoded answers by what they depend on: the scope, which is one model's, and the body of the request.

    `scope` is the archive's digest and all else that stands in every answer. New weights, code or contract have
    a new digest and never see old entries. Errors never come here.
    """

    def __init__(
        self,
        store: Store,
        scope: Iterable[str],
        shared: RedisStore | None = None,
        wait_s: float = CacheSettings.wait_s,
    ) -> None:
        self.store, self.shared, self.wait_s = store, shared, wait_s
        self.hits = self.shared_hits = self.misses = self.bypassed = self.deduplicated = 0
        parts = [*scope]

        @functools.lru_cache(64)  # of kinds that clients may invent, with options
        def before(kind: str) -> blake2b:
            return blake2b(b"".join(_framed(part.encode()) for part in (*parts, kind)), digest_size=16)

        self._before = before

    @classmethod
    def from_settings(cls, settings: CacheSettings, scope: Iterable[str]) -> "CacheManager":
        """The cache that the settings ask for; a disabled one keeps nothing, yet equal requests meet in a batch."""
        entries = settings.entries if settings.enabled else 0
        store = MemoryStore(entries=entries, size_bytes=settings.size_bytes, ttl_s=settings.ttl_s)
        shared = None
        if settings.enabled and settings.redis_url:
            link = RedisLink(settings.redis_url, timeout_s=settings.redis_timeout_s)
            shared = RedisStore(link, ttl_s=settings.ttl_s, lease_s=settings.lease_s)
        return cls(store, scope, shared, settings.wait_s)

    def key(self, kind: str, payload: bytes) -> bytes:
        """16 bytes of BLAKE2b over scope and kind, each behind its length, and body: no two sequences look the same."""
        state = self._before(kind).copy()
        state.update(payload)
        return state.digest()

    def look_up(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The stored answer of each key of a batch, None where there is none; Redis is asked for what is not here.

        Nothing is stored under an empty key, and nobody has missed it.
        """
        found = self.store.get_many(keys)
        if self.shared and None in found:
            lacking = [key for key, answer in zip(keys, found, strict=True) if key and answer is None]
            there = self._keep(self.shared.fetch(list(dict.fromkeys(lacking))))
            self.shared_hits += sum(key in there for key in lacking)
            found = [there.get(key) if answer is None else answer for key, answer in zip(keys, found, strict=True)]
        without = found.count(None)
        self.misses += without - keys.count(b"")
        self.hits += len(found) - without
        return found

    def claim(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of the missing keys that this worker is to compute now; another is at work on the rest.

        Each of them needs `put` or `release`, else the other workers wait for it in vain, a lease long.
        """
        missing = list(keys)
        if not self.shared:
            return set(missing)
        return {key for key, ours in zip(missing, self.shared.claim(missing), strict=True) if ours}

    def wait(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The answers to keys that others have claimed, as far as they come; the rest is then the caller's to compute.

        Returns as soon as no more can come, and after about `wait_s` in any case. To be called after `put`, so that
        no two workers wait for each other.
        """
        came: dict[bytes, bytes] = {}
        claimed, pause_s, end = list(keys), FIRST_PAUSE_S, time.monotonic() + self.wait_s
        while self.shared and claimed:
            there, claimed = self.shared.poll(claimed)
            came |= self._keep(there)
            if time.monotonic() >= end:
                break
            if claimed:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self.deduplicated += len(came)
        return came

    def put(self, answers: Mapping[bytes, bytes]) -> None:
        """Store the new answers of a batch; that ends the claims on them."""
        self.store.put_many(answers)
        if self.shared:
            self.shared.put_many(answers)

    def release(self, keys: Iterable[bytes]) -> None:
        """Give up claims whose keys get no answer that may be kept; keys that are not claimed do no harm."""
        if self.shared:
            self.shared.release(list(keys))

    def _keep(self, found: Mapping[bytes, Kept]) -> dict[bytes, bytes]:
        """Answers of Redis, from now on here too, until their time in Redis is over."""
        for key, kept in found.items():
            self.store.put_many({key: kept.value}, kept.left_s)
        return {key: kept.value for key, kept in found.items()}

    @property
    def counts(self) -> Counts:
        """The counts as they stand."""
        own = self.hits, self.shared_hits, self.misses, self.bypassed, self.deduplicated
        errors = self.shared.link.errors if self.shared else 0
        return Counts(*own, self.store.expired, self.store.evicted, errors)

    def totals(self) -> dict[tuple[str, str], float]:
        """The counts under the names of their metrics."""
        found = {f"distillery_cache_{name}_total": float(value) for name, value in asdict(self.counts).items()}
        found["distillery_redis_errors_total"] = found.pop("distillery_cache_errors_total")
        return {(name, ""): value for name, value in found.items()}


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8) + part
