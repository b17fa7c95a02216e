"""Where the cache keeps its entries. Every store obeys one contract, whole batches at a time."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Protocol

_NOTHING: tuple[float, None] = -inf, None  # where a key has no entry
OVERHEAD_BYTES = 300  # what CPython keeps around one entry: two byte strings, a tuple, a float, a link of the order


class Store(Protocol):
    """Bytes by key. `expired` and `evicted` count the entries that time and lack of room ended, as far as it knows."""

    expired: int
    evicted: int

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None where there is none (any more)."""
        ...

    def put_many(self, entries: Mapping[bytes, bytes], life_s: float = inf) -> None:
        """Keep the entries, in place of older ones with the same key, as far as there is room.

        Each for `life_s` seconds, or for as long as the store keeps any, if that is less.
        """
        ...


class MemoryStore:
    """In the process: least recently used first out, at most `entries` and `size_bytes`, each for `ttl_s` seconds.

    Reading keeps an entry from eviction and does not lengthen its life. `clock` gives seconds and never runs
    backwards. Not for several threads.
    """

    def __init__(
        self, *, entries: int, size_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.entries, self.size_bytes, self.ttl_s, self.clock = entries, size_bytes, ttl_s, clock
        self.used_bytes = self.expired = self.evicted = 0
        self._kept: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()  # key → (deadline, value)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"MemoryStore({len(self)} of {self.entries} entries, {self.used_bytes} of {self.size_bytes} bytes)"

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, which is then the most recently used; None where there is none (any more)."""
        now, kept = self.clock(), self._kept
        found: list[bytes | None] = []
        for key in keys:
            deadline, value = kept.get(key, _NOTHING)
            if now < deadline:
                kept.move_to_end(key)
            elif value is not None:
                self._drop(key)
                self.expired += 1
                value = None
            found.append(value)
        return found

    def put_many(self, entries: Mapping[bytes, bytes], life_s: float = inf) -> None:
        """Keep the entries, and let go of the least recently used until both bounds hold."""
        now = self.clock()
        for key, value in entries.items():
            self._put(key, value, now, min(life_s, self.ttl_s))

    def _put(self, key: bytes, value: bytes, now: float, life_s: float) -> None:
        if key in self._kept:
            self._drop(key)
        size = entry_bytes(key, value)
        if size > self.size_bytes or self.entries < 1:
            return  # it alone breaks a bound: all others would be evicted for nothing
        while len(self._kept) >= self.entries or self.used_bytes + size > self.size_bytes:
            over = self._drop(next(iter(self._kept))) <= now
            self.expired += over
            self.evicted += not over
        self._kept[key] = now + life_s, value
        self.used_bytes += size

    def _drop(self, key: bytes) -> float:
        """Remove an entry; returns its deadline."""
        deadline, value = self._kept.pop(key)
        self.used_bytes -= entry_bytes(key, value)
        return deadline


def entry_bytes(key: bytes, value: bytes) -> int:
    """What an entry takes of a store's `size_bytes`."""
    return len(key) + len(value) + OVERHEAD_BYTES
