"""The contract that every store keeps, and what the in-process one promises beyond: LRU, TTL, bounds."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.redis_store import RedisStore
from handler.stores import MemoryStore, Store, entry_bytes
from tests.handler.redis_server import Clock, RedisServer


def memory(clock: Clock, *, entries: int = 100, size_bytes: int = 1 << 20, ttl_s: float = 60.0) -> MemoryStore:
    return MemoryStore(entries=entries, size_bytes=size_bytes, ttl_s=ttl_s, clock=clock)


# The contract. A new store is one more entry here.

STORES: dict[str, Callable[[pytest.FixtureRequest, Clock], Store]] = {
    "memory": lambda _, clock: memory(clock),
    "redis": lambda request, clock: redis_store(request.getfixturevalue("redis_server"), clock),
}


def redis_store(server: RedisServer, clock: Clock) -> RedisStore:
    return server.store(clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, clock: Clock) -> Store:
    return STORES[request.param](request, clock)


def test_a_batch_is_kept_and_found_in_the_order_asked(store: Store) -> None:
    store.put_many({b"a": b"1", b"b": b"", b"c": bytes(range(256))})
    assert store.get_many([b"c", b"x", b"a", b"a", b"b"]) == [bytes(range(256)), None, b"1", b"1", b""]


def test_an_empty_batch_is_fine(store: Store) -> None:
    store.put_many({})
    assert store.get_many([]) == []


def test_a_later_value_takes_the_place_of_an_earlier_one(store: Store) -> None:
    store.put_many({b"a": b"1"})
    store.put_many({b"a": b"2"})
    assert store.get_many([b"a"]) == [b"2"]


def test_an_entry_ends_with_its_time(store: Store, clock: Clock) -> None:
    store.put_many({b"a": b"1"})
    clock.now += 59.9
    assert store.get_many([b"a"]) == [b"1"]
    clock.now += 0.1
    assert store.get_many([b"a"]) == [None]


def test_a_shorter_life_may_be_given_and_no_longer_one(store: Store, clock: Clock) -> None:
    store.put_many({b"a": b"1", b"b": b"2"}, 5.0)
    store.put_many({b"b": b"3"}, 90.0)
    clock.now += 5
    assert store.get_many([b"a", b"b"]) == [None, b"3"]
    clock.now += 55
    assert store.get_many([b"b"]) == [None]


def test_counts_start_at_zero(store: Store) -> None:
    assert (store.expired, store.evicted) == (0, 0)


# The in-process store


def test_reading_does_not_lengthen_a_life_and_writing_does(clock: Clock) -> None:
    store = memory(clock, ttl_s=10)
    store.put_many({b"a": b"1", b"b": b"1"})
    clock.now += 6
    store.get_many([b"a"])
    store.put_many({b"b": b"2"})
    clock.now += 6
    assert store.get_many([b"a", b"b"]) == [None, b"2"]
    assert (store.expired, store.evicted, len(store)) == (1, 0, 1)


def test_the_least_recently_used_goes_first(clock: Clock) -> None:
    store = memory(clock, entries=2)
    store.put_many({b"a": b"1", b"b": b"2"})
    store.get_many([b"a"])
    store.put_many({b"c": b"3"})
    assert store.get_many([b"a", b"b", b"c"]) == [b"1", None, b"3"]
    assert (store.expired, store.evicted) == (0, 1)


def test_an_entry_that_is_over_when_it_makes_room_counts_as_expired(clock: Clock) -> None:
    store = memory(clock, entries=1, ttl_s=10)
    store.put_many({b"a": b"1"})
    clock.now += 10
    store.put_many({b"b": b"2"})
    assert (store.expired, store.evicted) == (1, 0)


def test_bytes_are_bounded(clock: Clock) -> None:
    one = entry_bytes(b"a", b"x" * 100)
    store = memory(clock, size_bytes=3 * one)
    store.put_many({bytes([i]): b"x" * 100 for i in range(5)})
    assert store.get_many([bytes([i]) for i in range(5)]) == [None, None, *[b"x" * 100] * 3]
    assert (store.used_bytes, store.evicted) == (3 * one, 2)


def test_a_value_that_fits_nowhere_costs_no_other_its_place(clock: Clock) -> None:
    store = memory(clock, size_bytes=1000)
    store.put_many({b"a": b"1", b"b": bytes(1000)})
    assert store.get_many([b"a", b"b"]) == [b"1", None]
    store.put_many({b"a": bytes(1000)})  # nor does the old value stay in place of the new
    assert store.get_many([b"a"]) == [None]
    assert (store.used_bytes, len(store)) == (0, 0)


def test_a_store_of_no_entries_keeps_none(clock: Clock) -> None:
    store = memory(clock, entries=0)
    store.put_many({b"a": b"1"})
    assert store.get_many([b"a"]) == [None]
    assert (store.evicted, len(store)) == (0, 0)


def test_it_says_how_full_it_is(clock: Clock) -> None:
    store = memory(clock, entries=9, size_bytes=999)
    store.put_many({b"a": b"1"})
    assert repr(store) == "MemoryStore(1 of 9 entries, 302 of 999 bytes)"


class Reference:
    """The same promises in the plainest way: a list in order of use."""

    def __init__(self, entries: int, size_bytes: int, ttl_s: float) -> None:
        self.entries, self.size_bytes, self.ttl_s = entries, size_bytes, ttl_s
        self.kept: list[tuple[bytes, bytes, float]] = []
        self.lost = 0

    def get(self, key: bytes, now: float) -> bytes | None:
        for entry in self.kept:
            if entry[0] == key:
                self.kept.remove(entry)
                if now >= entry[2]:
                    self.lost += 1
                    return None
                self.kept.append(entry)
                return entry[1]
        return None

    def put(self, key: bytes, value: bytes, now: float) -> None:
        self.kept = [entry for entry in self.kept if entry[0] != key]
        if self.entries == 0 or entry_bytes(key, value) > self.size_bytes:
            return
        self.kept.append((key, value, now + self.ttl_s))
        while len(self.kept) > self.entries or sum(entry_bytes(k, v) for k, v, _ in self.kept) > self.size_bytes:
            self.kept.pop(0)
            self.lost += 1


KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
STEPS = st.one_of(
    st.lists(KEYS, max_size=4),
    st.dictionaries(KEYS, st.integers(0, 700).map(bytes), max_size=4),
    st.floats(0, 4).map(lambda s: round(s, 1)),
)


@settings(max_examples=150)
@given(st.integers(0, 4), st.integers(0, 1500), st.sampled_from([0.0, 3.0, 5.0]), st.lists(STEPS, max_size=30))
def test_it_does_what_the_plainest_one_does(entries: int, size_bytes: int, ttl_s: float, steps: list[object]) -> None:
    clock = Clock()
    store = memory(clock, entries=entries, size_bytes=size_bytes, ttl_s=ttl_s)
    reference = Reference(entries, size_bytes, ttl_s)
    for step in steps:
        if isinstance(step, list):
            assert store.get_many(step) == [reference.get(key, clock.now) for key in step]
        elif isinstance(step, dict):
            store.put_many(step)
            for key, value in step.items():
                reference.put(key, value, clock.now)
        else:
            assert isinstance(step, float)
            clock.now += step
        assert len(store) == len(reference.kept) <= entries
        assert store.used_bytes == sum(entry_bytes(k, v) for k, v, _ in reference.kept) <= size_bytes
        assert store.expired + store.evicted == reference.lost
