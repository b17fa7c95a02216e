"""CacheManager: which answers may be given again, a batch at a time, and how often that happened."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from handler.settings import CacheSettings
from handler.stores import MemoryStore, Store


@dataclass(frozen=True)
class Counts:
    """What became of the requests (the first four) and of the entries (the last two) since the worker began."""

    hits: int
    misses: int
    bypassed: int
    deduplicated: int
    expired: int
    evicted: int


class CacheManager:
    """Encoded answers by what they depend on: the scope, which is one model's, and the body of the request.

    `scope` is the archive's digest and all else that stands in every answer. New weights, code or contract have
    a new digest and never see old entries. Errors never come here.
    """

    def __init__(self, store: Store, scope: Iterable[str]) -> None:
        self.store = store
        self.hits = self.misses = self.bypassed = self.deduplicated = 0
        self._scope = blake2b(digest_size=16)
        for part in scope:
            self._scope.update(_framed(part.encode()))

    @classmethod
    def from_settings(cls, settings: CacheSettings, scope: Iterable[str]) -> "CacheManager":
        """The cache that the settings ask for; a disabled one keeps nothing, yet equal requests meet in a batch."""
        entries = settings.entries if settings.enabled else 0
        return cls(MemoryStore(entries=entries, size_bytes=settings.size_bytes, ttl_s=settings.ttl_s), scope)

    def key(self, kind: str, payload: bytes) -> bytes:
        """16 bytes of BLAKE2b over scope, kind and body, each behind its length: no two sequences look the same."""
        state = self._scope.copy()
        state.update(_framed(kind.encode()))
        state.update(len(payload).to_bytes(8))
        state.update(payload)
        return state.digest()

    def look_up(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The stored answer of each key of a batch, None where there is none."""
        found = self.store.get_many(keys)
        missed = found.count(None)
        self.misses += missed
        self.hits += len(found) - missed
        return found

    def put(self, answers: Mapping[bytes, bytes]) -> None:
        """Store the new answers of a batch."""
        self.store.put_many(answers)

    @property
    def counts(self) -> Counts:
        """The counts as they stand."""
        own = self.hits, self.misses, self.bypassed, self.deduplicated
        return Counts(*own, self.store.expired, self.store.evicted)


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8) + part
