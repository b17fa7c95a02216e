"""Workers that share a Redis: what one has answered is the others' hit, and one computes what all are asked at once."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from handler.cache import CacheManager
from handler.redis_store import PREFIX
from handler.settings import CacheSettings
from handler.stores import MemoryStore
from tests.handler.payloads import RAW, Pixels
from tests.handler.redis_server import PATIENCE_S, Clock, RedisServer
from tests.harness import Worker, post

KEYS = [bytes([i]) * 16 for i in range(4)]
A, B, C, D = KEYS


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new(redis_server: RedisServer, clock: Clock) -> Callable[..., CacheManager]:
    """Another worker's cache; it waits for ever, and claims last as long, unless the test says otherwise."""

    def made(*, entries: int = 9, wait_s: float = 3600, lease_s: float = 3600) -> CacheManager:
        memory = MemoryStore(entries=entries, size_bytes=9999, ttl_s=60, clock=clock)
        return CacheManager(memory, ["digest"], redis_server.store(clock, lease_s=lease_s), wait_s)

    return made


New = Callable[..., CacheManager]


def test_what_one_has_answered_is_the_others_hit(new: New) -> None:
    one, other = new(), new()
    one.put({A: b"1", B: b"2"})
    assert other.look_up([C, A, B, A, C]) == [None, b"1", b"2", b"1", None]
    counts = other.counts
    assert (counts.hits, counts.shared_hits, counts.misses, counts.errors) == (3, 3, 2, 0)


def test_memory_comes_first_and_redis_is_asked_for_the_rest_in_one_go(redis_server: RedisServer, new: New) -> None:
    one, other = new(), new()
    one.put({A: b"1", B: b"2"})
    other.put({C: b"3"})
    before, lacked = redis_server.round_trips(), redis_server.admin.info("stats")["keyspace_misses"]
    assert other.look_up([*KEYS, D]) == [b"1", b"2", b"3", None, None]
    assert redis_server.round_trips() - before == 2 + 1
    assert redis_server.admin.info("stats")["keyspace_misses"] - lacked == 1  # equal requests ask once
    before = redis_server.round_trips()
    assert other.look_up([A, B, C]) == [b"1", b"2", b"3"]
    assert redis_server.round_trips() - before == 1
    assert (other.counts.hits, other.counts.shared_hits) == (6, 2)


def test_nothing_lives_longer_than_its_time_in_both_tiers_together(new: New, clock: Clock) -> None:
    one, other = new(), new()
    one.put({A: b"1"})
    clock.now += 50
    assert other.look_up([A]) == [b"1"]
    clock.now += 9.5
    assert other.look_up([A]) == [b"1"]
    clock.now += 0.5
    assert other.look_up([A]) == one.look_up([A]) == [None]
    assert other.counts.expired == one.counts.expired == 1


def test_what_memory_has_no_room_for_is_still_in_redis(new: New) -> None:
    cache = new(entries=1)
    cache.put({A: b"1", B: b"2"})
    assert cache.look_up([A, B]) == [b"1", b"2"]
    assert cache.counts.shared_hits == 1


def test_models_do_not_share(new: New, redis_server: RedisServer, clock: Clock) -> None:
    other = CacheManager(MemoryStore(entries=9, size_bytes=999, ttl_s=60), ["other"], redis_server.store(clock))
    one = new()
    one.put({one.key("raw", b"x"): b"1"})
    assert other.look_up([other.key("raw", b"x")]) == [None]


# Single flight


def test_others_claims_are_waited_for(new: New) -> None:
    one, other = new(), new()
    assert one.claim([A, B]) == {A, B}
    assert other.claim([A, B, C, C]) == {C}
    found: dict[bytes, bytes] = {}
    waiting = threading.Thread(target=lambda: found.update(other.wait([A, B])))
    waiting.start()
    one.put({A: b"1"})
    one.put({B: b"2"})
    waiting.join(PATIENCE_S)
    assert found == {A: b"1", B: b"2"}
    assert other.store.get_many([A, B]) == [b"1", b"2"]  # from now on here too
    assert other.counts.deduplicated == 2


def test_what_came_between_looking_and_claiming_is_not_computed_again(new: New) -> None:
    one, other = new(), new()
    assert other.look_up([A]) == [None]
    one.claim([A])
    one.put({A: b"1"})
    assert other.claim([A]) == set()
    assert other.wait([A]) == {A: b"1"}


def test_nobody_waits_for_what_was_given_up(new: New) -> None:
    one, other = new(), new()
    one.claim([A, B])
    one.put({A: b"1"})
    one.release([A, B])
    assert other.wait([A, B, C]) == {A: b"1"}
    assert other.claim([B]) == {B}


def test_a_claimant_that_dies_is_waited_for_a_lease_long(new: New) -> None:
    dead, other = new(lease_s=0.05), new()
    dead.claim([A])
    assert other.wait([A]) == {}
    assert other.claim([A]) == {A}


def test_waiting_has_a_bound(new: New) -> None:
    one, other = new(), new(wait_s=0.03)
    one.claim([A, B])
    one.put({A: b"1"})
    assert other.wait([A, B]) == {A: b"1"}
    assert other.claim([B]) == set()  # the claim stood all the time


def test_waiting_ends_with_redis(own_redis: RedisServer, clock: Clock) -> None:
    memory = MemoryStore(entries=9, size_bytes=999, ttl_s=60)
    one, other = (CacheManager(memory, [], own_redis.store(clock), 3600) for _ in range(2))
    one.claim([A])
    waiting = threading.Thread(target=lambda: other.wait([A]))
    waiting.start()
    own_redis.stop()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
    assert other.claim([A]) == {A}  # everyone for himself
    other.put({A: b"1"})
    assert other.look_up([A]) == [b"1"]
    assert other.counts.errors == 1


def test_one_of_32_workers_computes(new: New) -> None:
    """Whatever the order in which they come: late ones have looked before the answer came, and claim after that."""
    computed, found, together = [], [], threading.Barrier(32)

    def work(cache: CacheManager) -> None:
        together.wait(PATIENCE_S)
        [answer] = cache.look_up([A])
        if answer is None and A in cache.claim([A]):
            computed.append(cache)
            cache.put({A: b"1"})
            answer = b"1"
        found.append(answer or cache.wait([A]).get(A))

    threads = [threading.Thread(target=work, args=[new()]) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == [b"1"] * 32
    assert len(computed) == 1


# Settings, and a whole worker


def test_settings_make_the_shared_tier(redis_server: RedisServer) -> None:
    settings = CacheSettings(redis_url=redis_server.url, redis_timeout_s=7, lease_s=30, wait_s=5, ttl_s=9)
    cache = CacheManager.from_settings(settings, ["digest"])
    cache.claim([A])
    assert 9_000 < redis_server.admin.pttl(PREFIX + A + b":claim") <= 30_000
    cache.put({A: b"1"})
    assert 0 < redis_server.admin.pttl(PREFIX + A) <= 9_000
    assert cache.wait_s == 5


def test_a_disabled_cache_shares_nothing_either(redis_server: RedisServer) -> None:
    cache = CacheManager.from_settings(CacheSettings(redis_url=redis_server.url, enabled=False), [])
    cache.put({A: b"1"})
    assert cache.look_up([A]) == [None] and redis_server.admin.dbsize() == 0


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer) -> pytest.MonkeyPatch:
    monkeypatch.setenv("DISTILLERY__HANDLER__CACHE__REDIS_URL", redis_server.url)
    monkeypatch.setenv("DISTILLERY__HANDLER__CACHE__REDIS_TIMEOUT_S", str(PATIENCE_S))
    return monkeypatch


def test_what_one_worker_has_answered_is_the_other_workers_hit(
    variables: pytest.MonkeyPatch, in_place: Path, images: Pixels
) -> None:
    with Worker(in_place, in_place=True) as one, Worker(in_place, in_place=True) as other:
        [first] = one.ask(post(images[0].tobytes(), RAW))
        [second] = other.ask(post(images[0].tobytes(), RAW))
    assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("MISS", "HIT")
    assert {**first.json, "source": "cache"} == second.json


def test_a_worker_starts_and_answers_without_redis(
    variables: pytest.MonkeyPatch, in_place: Path, images: Pixels
) -> None:
    variables.setenv("DISTILLERY__HANDLER__CACHE__REDIS_URL", "unix:///nowhere/socket")
    with Worker(in_place, in_place=True) as worker:
        replies = [worker.ask(post(images[0].tobytes(), RAW))[0] for _ in range(2)]
        assert [reply.headers["X-Cache"] for reply in replies] == ["MISS", "HIT"]
        assert worker.handler.service.cache.counts.errors == 1
