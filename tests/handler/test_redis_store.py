"""The shared store over a real Redis: one round trip a batch, only our entries, and no claim for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from handler.redis_store import CHECK_BYTES, PREFIX, VERSION, RedisStore
from tests.handler.redis_server import Clock, RedisServer, until

KEYS = [bytes([i]) * 16 for i in range(30)]
A, B, C = KEYS[:3]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(redis_server: RedisServer, clock: Clock) -> RedisStore:
    return redis_server.store(clock)


@pytest.fixture
def other(redis_server: RedisServer, clock: Clock) -> RedisStore:
    """Another worker's."""
    return redis_server.store(clock)


# Entries


def test_a_batch_is_one_round_trip(redis_server: RedisServer, store: RedisStore, other: RedisStore) -> None:
    store.get_many(KEYS)  # connects
    for call in (
        lambda: store.claim(KEYS),
        lambda: store.put_many(dict.fromkeys(KEYS, b"1")),
        lambda: store.get_many(KEYS),
        lambda: store.claim(KEYS),
        lambda: store.poll(KEYS),
        lambda: store.release(KEYS),
    ):
        before = redis_server.round_trips()
        call()
        assert redis_server.round_trips() - before == 1 + 1  # the second is the question itself


def test_the_first_batch_too_is_one_round_trip(redis_server: RedisServer, store: RedisStore) -> None:
    before = redis_server.round_trips()
    store.get_many(KEYS)
    assert redis_server.round_trips() - before == 1 + 1


def test_nothing_to_ask_asks_nothing(redis_server: RedisServer, store: RedisStore) -> None:
    before = redis_server.round_trips()
    assert (store.fetch([]), store.claim([]), store.poll([])) == ({}, [], ({}, []))
    store.put_many({})
    store.release([])
    assert redis_server.round_trips() - before == 1


def test_one_workers_entry_is_the_others(store: RedisStore, other: RedisStore) -> None:
    store.put_many({A: b"1"})
    assert other.get_many([B, A]) == [None, b"1"]


def test_reading_tells_what_is_left_of_a_life(store: RedisStore, other: RedisStore, clock: Clock) -> None:
    store.put_many({A: b"1"}, 50)
    clock.now += 20
    assert other.fetch([A]) == {A: (b"1", 30)}
    clock.now -= 100  # the writer's clock was ahead
    assert other.fetch([A]) == {A: (b"1", 60)}


def test_redis_lets_go_of_an_entry_by_itself(redis_server: RedisServer, store: RedisStore) -> None:
    store.put_many({A: b"1"})
    assert 0 < redis_server.admin.pttl(PREFIX + A) <= 60_000
    store.put_many({B: b"1"}, 1e-9)
    until(lambda: redis_server.admin.dbsize() == 1)
    assert store.link.errors == 0


def test_a_write_that_redis_executes_late_lengthens_no_life(own_redis: RedisServer, clock: Clock) -> None:
    store = own_redis.store(clock, timeout_s=0.5)
    store.put_many({A: b"1"})
    own_redis.pause()
    store.put_many({B: b"2"})
    own_redis.resume()
    until(lambda: own_redis.admin.exists(PREFIX + B) == 1)
    clock.now += 60
    assert own_redis.store(clock).get_many([A, B]) == [None, None]


def test_two_versions_of_us_do_not_read_each_other(redis_server: RedisServer, store: RedisStore) -> None:
    store.put_many({A: b"1"})
    redis_server.admin.setrange(PREFIX + A, 0, b"\2")
    assert VERSION != b"\2" and store.get_many([A]) == [None]


@pytest.mark.parametrize("raw", [b"", b"{}", VERSION, VERSION + bytes(CHECK_BYTES), bytes(100)], ids=repr)
def test_anothers_value_is_none_of_ours(redis_server: RedisServer, store: RedisStore, raw: bytes) -> None:
    redis_server.admin.set(PREFIX + A, raw)
    assert store.get_many([A, B]) == [None, None]
    assert (store.claim([A]), store.poll([A]), store.link.errors) == ([True], ({}, [A]), 0)
    store.put_many({A: b"1"})
    assert store.get_many([A]) == [b"1"]


def test_anothers_list_is_none_of_ours(redis_server: RedisServer, store: RedisStore) -> None:
    redis_server.admin.rpush(PREFIX + A, b"x")
    redis_server.admin.rpush(PREFIX + A + b":claim", b"x")
    assert (store.get_many([A]), store.claim([A]), store.poll([A])) == ([None], [False], ({}, []))
    store.put_many({A: b"1"})
    assert (store.get_many([A]), redis_server.admin.dbsize(), store.link.errors) == ([b"1"], 1, 0)


def test_an_entry_is_none_under_another_key(redis_server: RedisServer, store: RedisStore) -> None:
    store.put_many({A: b"1"})
    redis_server.admin.copy(PREFIX + A, PREFIX + B)
    assert store.get_many([A, B]) == [b"1", None]


@given(st.binary(max_size=40), st.data())
def test_an_entry_that_was_touched_is_none(running_redis: RedisServer, value: bytes, data: st.DataObject) -> None:
    store = running_redis.store()
    store.put_many({A: value})
    raw = bytearray(running_redis.admin.get(PREFIX + A))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    running_redis.admin.set(PREFIX + A, bytes(raw[: data.draw(st.integers(place + 1, len(raw)))]))
    assert store.get_many([A]) == [None]


# Claims


def test_one_of_all_computes(store: RedisStore, other: RedisStore) -> None:
    assert store.claim([A, B]) == [True, True]
    assert other.claim([B, C]) == [False, True]
    assert other.poll([A, B, C]) == ({}, [A, B, C])


def test_a_value_ends_its_claim(redis_server: RedisServer, store: RedisStore, other: RedisStore) -> None:
    store.claim([A, B])
    store.put_many({A: b"1"})
    assert other.poll([A, B]) == ({A: (b"1", 60)}, [B])
    assert redis_server.admin.exists(PREFIX + A + b":claim") == 0


def test_what_has_come_in_the_meantime_is_not_computed_again(store: RedisStore, other: RedisStore) -> None:
    assert other.get_many([A]) == [None]
    store.claim([A])
    store.put_many({A: b"1"})
    assert other.claim([A, B]) == [False, True]


def test_what_was_given_up_is_the_next_ones(store: RedisStore, other: RedisStore) -> None:
    store.claim([A, B])
    store.release([A, C])
    assert other.poll([A, B]) == ({}, [B])
    assert other.claim([A, B]) == [True, False]


def test_only_ones_own_claim_is_given_up(store: RedisStore, other: RedisStore) -> None:
    store.claim([A])
    other.release([A])
    assert other.claim([A]) == [False]


def test_a_claimant_that_dies_is_waited_for_a_lease_long(redis_server: RedisServer) -> None:
    dead, other = redis_server.store(lease_s=0.05), redis_server.store()
    assert dead.claim([A]) == [True]
    until(lambda: other.claim([A]) == [True])
    dead.release([A])  # it was only slow: the claim is the other's now
    assert dead.claim([A]) == [False]


class Workers(RuleBasedStateMachine):
    """Two workers on one Redis, beside a dictionary of what should be there."""

    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.server.admin.flushall()
        self.clock = Clock()
        self.stores = [self.server.store(self.clock), self.server.store(self.clock)]
        self.kept: dict[bytes, tuple[float, bytes]] = {}
        self.claims: dict[bytes, int] = {}

    def there(self, key: bytes) -> bytes | None:
        deadline, value = self.kept.get(key, (0, b""))
        return value if self.clock.now < deadline else None

    @rule(who=st.integers(0, 1), entries=st.dictionaries(st.sampled_from(KEYS[:4]), st.binary(max_size=9), max_size=3))
    def put(self, who: int, entries: dict[bytes, bytes]) -> None:
        self.stores[who].put_many(entries)
        for key, value in entries.items():
            self.kept[key] = self.clock.now + 60, value
            self.claims.pop(key, None)

    @rule(who=st.integers(0, 1), keys=st.lists(st.sampled_from(KEYS[:4]), max_size=5))
    def get(self, who: int, keys: list[bytes]) -> None:
        assert self.stores[who].get_many(keys) == [self.there(key) for key in keys]

    @rule(who=st.integers(0, 1), keys=st.lists(st.sampled_from(KEYS[:4]), unique=True))
    def claim(self, who: int, keys: list[bytes]) -> None:
        free = [key not in self.claims for key in keys]
        for key in keys:
            self.claims.setdefault(key, who)
        expected = [was and self.there(key) is None for key, was in zip(keys, free, strict=True)]
        assert self.stores[who].claim(keys) == expected

    @rule(who=st.integers(0, 1), keys=st.lists(st.sampled_from(KEYS[:4]), unique=True))
    def release(self, who: int, keys: list[bytes]) -> None:
        self.stores[who].release(keys)
        self.claims = {key: owner for key, owner in self.claims.items() if owner != who or key not in keys}

    @rule(who=st.integers(0, 1))
    def poll(self, who: int) -> None:
        there, waiting = self.stores[who].poll(KEYS[:4])
        assert {key: kept.value for key, kept in there.items()} == {
            key: value for key in KEYS[:4] if (value := self.there(key)) is not None
        }
        assert waiting == [key for key in KEYS[:4] if key in self.claims and self.there(key) is None]

    @rule(key=st.sampled_from(KEYS[:4]), raw=st.binary(max_size=40))
    def spoil(self, key: bytes, raw: bytes) -> None:
        self.server.admin.set(PREFIX + key, raw)
        self.kept.pop(key, None)

    @rule(seconds=st.sampled_from([0.5, 29.5, 60.0]))
    def live(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def lose_the_connections(self) -> None:
        self.server.admin.client_kill_filter(_type="normal", skipme=True)

    @invariant()
    def nothing_fails(self) -> None:
        assert [store.link.errors for store in self.stores] == [0, 0]


def test_two_workers_do_what_a_dictionary_does(redis_server: RedisServer) -> None:
    machine = type("Machine", (Workers,), {"server": redis_server})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30))
