"""The core over a Redis that workers share: one computes, the others wait; nobody waits for what will not come."""

import json
import threading
import time
from collections.abc import Callable

import pytest

from handler.cache import CacheManager
from handler.messages import Request
from handler.metrics import Metrics
from handler.service import Service
from handler.settings import LimitSettings
from handler.stores import MemoryStore
from tests.handler.payloads import JSON
from tests.handler.redis_server import PATIENCE_S, Clock, RedisServer
from tests.handler.test_service import BAD, CLOSED, Echo, outcomes, raw

New = Callable[..., Service]


@pytest.fixture
def new(redis_server: RedisServer) -> New:
    """Another worker's service; it waits for ever, and claims last as long, unless the test says otherwise."""

    def made(*, lease_s: float = 3600, wait_s: float = 3600) -> Service:
        memory = MemoryStore(entries=9, size_bytes=9999, ttl_s=60)
        cache = CacheManager(memory, ["digest"], redis_server.store(Clock(), lease_s=lease_s), wait_s)
        return Service(Echo(), cache, LimitSettings(rows=3), {"name": "m"}, Metrics(), CLOSED)

    return made


def batches(service: Service) -> list[list[list[int]]]:
    assert isinstance(service.model, Echo)
    return service.model.batches


def key(service: Service, *pixels: int) -> bytes:
    return service.cache.key("raw", bytes(pixels))


def test_what_one_worker_has_answered_is_a_hit_on_the_other(new: New) -> None:
    one, other = new(), new()
    [first], [second] = one.answer([raw(1, 2, 3)]), other.answer([raw(1, 2, 3)])
    assert (first.outcome, second.outcome, batches(other)) == ("MISS", "HIT", [])
    assert second.body == first.body.replace(b'"model"', b'"cache"', 1)


def test_requests_that_are_the_same_at_once_are_computed_once(new: New, redis_server: RedisServer) -> None:
    """By two workers, each of which is asked 16 times, while the one that came first is at work."""
    one, other = new(), new()
    began, go_on = threading.Event(), threading.Event()
    predict = one.model.predict

    def slow(images: object) -> object:
        began.set()
        assert go_on.wait(PATIENCE_S)
        return predict(images)  # type: ignore[arg-type]

    one.model.predict = slow  # type: ignore[method-assign, assignment]
    found: dict[str, list[str]] = {}

    def ask(name: str, service: Service) -> None:
        found[name] = outcomes(service.answer([raw(1, 2, 3)] * 16))

    threads = [threading.Thread(target=ask, args=("one", one)), threading.Thread(target=ask, args=("other", other))]
    threads[0].start()
    assert began.wait(PATIENCE_S)
    threads[1].start()
    waiting = redis_server.round_trips()
    while redis_server.round_trips() < waiting + 10:  # the other one has claimed in vain, and looks again and again
        assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == {"one": ["MISS"] * 16, "other": ["HIT"] * 16}
    assert len(batches(one)) == 1 and batches(other) == []


def test_who_waits_has_shared_its_own_answers_before(new: New) -> None:
    """Else two workers that wait for each other's would both wait for as long as they may."""
    one, other = new(), new()
    theirs, ours = key(other, 1, 2, 3), key(one, 4, 5, 6)
    assert other.cache.claim([theirs])
    thread = threading.Thread(target=one.answer, args=([raw(1, 2, 3), raw(4, 5, 6)],))
    thread.start()
    end, seen = time.monotonic() + PATIENCE_S / 4, [None]
    while seen == [None] and time.monotonic() < end:
        seen = other.cache.look_up([ours])  # type: ignore[assignment]
    waiting = thread.is_alive()
    other.cache.put({theirs: b"{"})
    thread.join(PATIENCE_S)
    assert waiting and seen != [None]


def test_neighbours_of_what_another_computes_are_not_held_up_by_its_death(new: New) -> None:
    """The lease is over before the wait is: whoever waited computes."""
    dead, alive = new(lease_s=0.05), new()
    assert dead.cache.claim([key(dead, 1, 2, 3)])
    answers = alive.answer([raw(1, 2, 3), raw(4, 5, 6), raw(1, 2, 3)])
    assert outcomes(answers) == ["MISS"] * 3
    assert batches(alive) == [[[4, 5, 6]], [[1, 2, 3]]]
    assert outcomes(dead.answer([raw(1, 2, 3)])) == ["HIT"]


def test_waiting_ends(new: New) -> None:
    stuck, other = new(), new(wait_s=0.01)
    stuck.cache.claim([key(stuck, 1, 2, 3)])
    assert outcomes(other.answer([raw(1, 2, 3)])) == ["MISS"]


@pytest.mark.parametrize("store", [True, False])
def test_who_bypasses_the_cache_waits_for_nobody(new: New, store: bool) -> None:
    busy, other = new(), new()
    busy.cache.claim([key(busy, 1, 2, 3)])
    answers = other.answer([raw(1, 2, 3), raw(1, 2, 3, look_up=False, store=store)])
    assert outcomes(answers) == ["MISS", "BYPASS"] and len(batches(other)) == 1


def test_what_must_not_be_stored_is_not_shared(new: New) -> None:
    one, other = new(), new()
    one.answer([raw(1, 2, 3, look_up=False, store=False)])
    assert outcomes(other.answer([raw(1, 2, 3)])) == ["MISS"]


def test_a_claim_that_comes_to_nothing_is_given_up(new: New) -> None:
    """Whether the body was bad, the logits, or the model: the other worker does not wait, and nothing is kept."""
    bad = Request(payload=b"[1]", content_type=JSON, request_id="bad")
    failing, other = new(), new()
    assert outcomes(failing.answer([bad, raw(9, 255, 9), BAD])) == ["ERROR"] * 3
    failing.model.fault = RuntimeError("told so")  # type: ignore[attr-defined]
    assert outcomes(failing.answer([raw(1, 2, 3)])) == ["ERROR"]
    answers = other.answer([bad, raw(9, 255, 9), raw(1, 2, 3)])
    assert outcomes(answers) == ["ERROR", "ERROR", "MISS"]
    assert json.loads(answers[0].body)["code"] == "bad_shape"
    assert len(batches(other)) == 1


def test_redis_is_not_asked_for_what_has_no_key(new: New, redis_server: RedisServer) -> None:
    service = new()
    service.answer([raw(1, 2, 3)])
    before = redis_server.round_trips()
    assert outcomes(service.answer([BAD, raw(4, 5, 6, look_up=False, store=False), raw(1, 2, 3)])) == [
        "ERROR",
        "BYPASS",
        "HIT",
    ]
    assert redis_server.round_trips() == before + 1  # to ask for the number


def test_a_redis_that_is_gone_changes_no_answer(own_redis: RedisServer) -> None:
    cache = CacheManager(MemoryStore(entries=9, size_bytes=9999, ttl_s=60), [], own_redis.store(Clock()), 3600)
    service = Service(Echo(), cache, LimitSettings(), {}, Metrics(), CLOSED)
    own_redis.stop()
    assert outcomes(service.answer([raw(1, 2, 3), BAD, raw(1, 2, 3)])) == ["MISS", "ERROR", "MISS"]
    assert outcomes(service.answer([raw(1, 2, 3)])) == ["HIT"]
    assert cache.counts.errors > 0
