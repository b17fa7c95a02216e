"""Keys never meet, counts add up, settings are obeyed."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handler.cache import CacheManager, Counts
from handler.settings import CacheSettings
from handler.stores import MemoryStore

SCOPE = ["digest", "student", "1.0"]


def manager(scope: list[str] = SCOPE) -> CacheManager:
    return CacheManager(MemoryStore(entries=9, size_bytes=9999, ttl_s=9, clock=lambda: 0.0), scope)


def test_a_key_is_sixteen_bytes_and_the_same_for_the_same() -> None:
    assert manager().key("raw", b"pixels") == manager().key("raw", b"pixels")
    assert len(manager().key("raw", b"")) == 16


@pytest.mark.parametrize(
    ("scope", "kind", "payload"),
    [
        (["other", "student", "1.0"], "raw", b"pixels"),
        (["digest", "student", "2.0"], "raw", b"pixels"),
        (["digest", "student1.0", ""], "raw", b"pixels"),
        (["digeststudent", "1.0"], "raw", b"pixels"),
        (SCOPE, "image", b"pixels"),
        (SCOPE, "ra", b"wpixels"),
        (SCOPE, "raw", b"pixel"),
        (SCOPE, "raw", b"pixels\0"),
    ],
)
def test_whatever_the_answer_depends_on_is_in_the_key(scope: list[str], kind: str, payload: bytes) -> None:
    assert manager(scope).key(kind, payload) != manager().key("raw", b"pixels")


PARTS = st.tuples(st.lists(st.text("ab\0", max_size=3), max_size=3), st.text("ab\0", max_size=3), st.binary(max_size=3))


@given(PARTS, PARTS)
@example(([], "k", bytes(8)), ([], "k" + chr(0) * 7 + chr(8), b""))  # meet if the kind is not behind its length
def test_keys_are_equal_only_if_all_parts_are(
    one: tuple[list[str], str, bytes], other: tuple[list[str], str, bytes]
) -> None:
    keys = [manager(scope).key(kind, payload) for scope, kind, payload in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_making_a_key_leaves_the_next_one_alone() -> None:
    cache = manager()
    first = cache.key("raw", b"a")
    cache.key("raw", b"b")
    assert cache.key("raw", b"a") == first


def test_a_batch_is_looked_up_in_order_and_counted() -> None:
    cache = manager()
    cache.put({b"a": b"1", b"b": b""})
    assert cache.look_up([b"b", b"x", b"a", b"x"]) == [b"", None, b"1", None]
    assert (cache.counts.hits, cache.counts.misses) == (2, 2)


def test_the_stores_losses_are_among_the_counts() -> None:
    cache = CacheManager(MemoryStore(entries=1, size_bytes=9999, ttl_s=0), SCOPE)
    cache.put({b"a": b"1"})
    cache.look_up([b"a"])
    assert cache.counts == Counts(0, 0, misses=1, bypassed=0, deduplicated=0, expired=1, evicted=0, errors=0)
    cache = CacheManager(MemoryStore(entries=1, size_bytes=9999, ttl_s=9, clock=lambda: 0.0), SCOPE)
    cache.put({b"a": b"1", b"b": b"2"})
    assert cache.counts.evicted == 1


def test_alone_a_worker_computes_all_that_is_missing() -> None:
    cache = manager()
    assert cache.claim([b"a", b"b", b"a"]) == {b"a", b"b"}
    assert cache.wait([b"a"]) == {}
    cache.release([b"a"])
    assert cache.claim([b"a"]) == {b"a"}


def test_settings_size_the_store() -> None:
    store = CacheManager.from_settings(CacheSettings(entries=3, size_bytes=44, ttl_s=5), SCOPE).store
    assert isinstance(store, MemoryStore)
    assert (store.entries, store.size_bytes, store.ttl_s) == (3, 44, 5)
    disabled = CacheManager.from_settings(CacheSettings(enabled=False), SCOPE)
    disabled.put({b"a": b"1"})
    assert disabled.look_up([b"a"]) == [None]
