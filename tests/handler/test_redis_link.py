"""Nothing that Redis does costs an answer: gone, paused, restarted, full, locked, or no Redis at all."""

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from handler.errors import SettingsError
from handler.redis_link import FIRST_PAUSE_S, LONGEST_PAUSE_S, RedisLink
from handler.redis_store import RedisStore
from tests.handler.redis_server import PATIENCE_S, Clock, RedisServer

A, B = bytes(16), bytes([1]) * 16
SHORT_S = 0.5  # long enough for a Redis that runs
NOWHERE = "unix:///nowhere/socket"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)  # an earlier test's worker may still emit its metrics, by INFO


def over(link: RedisLink) -> RedisStore:
    return RedisStore(link, ttl_s=60, lease_s=60)


def everything(store: RedisStore) -> list[Any]:
    """What each call says; without Redis: `NOTHING`."""
    store.put_many({A: b"1"})
    store.release([A])
    return [store.get_many([A, B]), store.claim([A, B]), store.poll([A, B])]


NOTHING = [[None, None], [True, True], ({}, [])]


def test_without_redis_nothing_is_there_and_it_is_said_once(clock: Clock, caplog: Any) -> None:
    store = over(RedisLink(NOWHERE, timeout_s=1, clock=clock))
    for _ in range(20):
        assert everything(store) == NOTHING
        clock.now += LONGEST_PAUSE_S
    [line] = caplog.messages
    assert line.startswith("Redis is away, answers go on without it: ConnectionError: Error 2 connecting to")
    assert store.link.errors == 20  # and not one for each call


def test_it_is_left_alone_longer_and_longer(clock: Clock) -> None:
    store = over(RedisLink(NOWHERE, timeout_s=1, clock=clock))
    tried = []
    for _ in range(400):
        before = store.link.errors
        everything(store)
        if store.link.errors > before:
            tried.append(clock.now - 1000)
        clock.now += 0.0625
    assert tried == [0, 1, 3, 7, 12, 17, 22]


def test_a_paused_redis_costs_one_timeout_and_comes_back(own_redis: RedisServer, clock: Clock, caplog: Any) -> None:
    store = own_redis.store(clock, timeout_s=SHORT_S)
    store.put_many({A: b"1"})
    assert store.get_many([A]) == [b"1"]
    own_redis.pause()
    for _ in range(100):
        assert store.get_many([A]) == [None]
    assert store.link.errors == 1
    clock.now += FIRST_PAUSE_S
    assert everything(store) == NOTHING and store.link.errors == 2  # a new connection is accepted, and nobody answers
    own_redis.resume()
    found: list[bytes | None] = []
    while not any(found):  # on a busy machine it may take longer than the timeout once more
        assert clock.now < 1060
        clock.now += LONGEST_PAUSE_S
        found = store.get_many([A])
    assert found == [b"1"]
    assert [line.split(":")[0] for line in caplog.messages] == [
        "Redis is away, answers go on without it",
        "Redis is back",
    ]
    assert "Timeout" in caplog.messages[0]


def test_a_late_answer_is_not_taken_for_the_next_ones(own_redis: RedisServer, clock: Clock) -> None:
    store, admin = own_redis.store(clock, timeout_s=SHORT_S), own_redis.store(clock)
    admin.put_many({A: b"1", B: b"2"})
    assert store.get_many([B]) == [b"2"]
    own_redis.pause()
    assert store.get_many([A]) == [None]
    own_redis.resume()
    found: list[bytes | None] = [None]
    while found == [None]:
        assert clock.now < 1060
        clock.now += LONGEST_PAUSE_S
        found = store.get_many([B])
    assert found == [b"2"]


def test_a_restart_between_two_batches_is_not_noticed(own_redis: RedisServer, clock: Clock, caplog: Any) -> None:
    store = own_redis.store(clock)
    store.put_many({A: b"1"})
    own_redis.stop()
    own_redis.start()
    assert store.get_many([A]) == [None]
    store.put_many({A: b"2"})
    assert store.get_many([A]) == [b"2"]
    assert (store.link.errors, caplog.messages) == (0, [])


def test_a_restart_is_survived_by_whoever_asks_meanwhile(own_redis: RedisServer, clock: Clock, caplog: Any) -> None:
    store = own_redis.store(clock)
    store.put_many({A: b"1"})
    own_redis.stop()
    assert everything(store) == NOTHING
    own_redis.start()
    assert everything(store) == NOTHING  # it is still left alone
    clock.now += FIRST_PAUSE_S
    store.put_many({A: b"2"})
    assert store.get_many([A]) == [b"2"]
    assert len(caplog.messages) == 2 and store.link.errors == 1
    own_redis.stop()
    everything(store)
    clock.now += FIRST_PAUSE_S  # and not longer: it had been back
    own_redis.start()
    store.put_many({A: b"3"})
    assert store.get_many([A]) == [b"3"]
    assert len(caplog.messages) == 4


def test_a_connection_lost_in_the_middle_is_made_anew(own_redis: RedisServer, clock: Clock) -> None:
    store = own_redis.store(clock)
    store.get_many([A])
    own_redis.pause()
    asked = threading.Thread(target=lambda: store.get_many([A]))
    asked.start()
    own_redis.stop()
    asked.join(PATIENCE_S)
    assert store.link.errors == 1
    own_redis.start()
    clock.now += FIRST_PAUSE_S
    store.put_many({A: b"1"})
    assert store.get_many([A]) == [b"1"]


def test_a_full_redis_is_read_on(own_redis: RedisServer, clock: Clock, caplog: Any) -> None:
    store = own_redis.store(clock)
    store.put_many({A: b"1"})
    own_redis.admin.config_set("maxmemory-policy", "noeviction")
    own_redis.admin.config_set("maxmemory", "1mb")
    with pytest.raises(OutOfMemoryError):
        own_redis.admin.append("ballast", bytes(1 << 20))
        own_redis.admin.append("ballast", b"and no more")
    for _ in range(3):
        store.put_many({B: b"2", A: b"3"})
        assert store.claim([A, B]) == [False, True]  # the value is there; nobody can claim the other
        assert store.get_many([A, B]) == [b"1", None]
        store.release([B])
    assert store.link.errors == 6
    assert [line.split(":")[0] for line in caplog.messages] == ["Redis refuses our writes", "Redis refuses our claims"]
    assert "maxmemory" in caplog.messages[0]
    own_redis.admin.config_set("maxmemory", 0)
    store.put_many({B: b"2"})
    assert store.get_many([B]) == [b"2"]
    assert (store.link.errors, caplog.messages[2:]) == (6, ["Redis takes our writes again"])


def test_refused_reads_are_nothing_and_no_outage(own_redis: RedisServer, clock: Clock, caplog: Any) -> None:
    own_redis.admin.acl_setuser("default", enabled=True, commands=["-mget"])
    store = own_redis.store(clock)
    assert everything(store) == NOTHING
    assert [line.split(":")[0] for line in caplog.messages] == ["Redis refuses our reads", "Redis refuses our claims"]


def test_a_password_that_is_wrong_or_missing_is_an_outage(own_redis: RedisServer, clock: Clock, caplog: Any) -> None:
    own_redis.admin.config_set("requirepass", "right")
    for url in (own_redis.url, f"{own_redis.url}?password=wr0ng"):
        assert everything(over(RedisLink(url, timeout_s=PATIENCE_S, clock=clock))) == NOTHING
    assert [line.split(": ")[1] for line in caplog.messages] == ["AuthenticationError"] * 2
    assert "wr0ng" not in caplog.text
    store = over(RedisLink(f"{own_redis.url}?password=right", timeout_s=PATIENCE_S, clock=clock))
    store.put_many({A: b"1"})
    assert store.get_many([A]) == [b"1"]


def test_over_tcp_with_a_password_and_a_database(own_redis: RedisServer, clock: Clock, caplog: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own_redis.admin.config_set("requirepass", "right")
    own_redis.admin.config_set("port", port)
    store = over(RedisLink(f"redis://:right@127.0.0.1:{port}/3", timeout_s=PATIENCE_S, clock=clock))
    store.put_many({A: b"1"})
    assert store.get_many([A, B]) == [b"1", None]
    assert (own_redis.admin.dbsize(), store.link.errors, caplog.messages) == (0, 0, [])


@contextmanager
def impostor(reply: bytes, login: str = "", database: int = 0) -> Iterator[str]:
    """Something else that listens where a Redis should, and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    if not connection.recv(65536):
                        return
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        yield f"redis://{login}127.0.0.1:{port}/{database}"
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join(PATIENCE_S)


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$abc\r\n", b"", b"*-7\r\n", b"\xff\r\n"])
def test_what_is_no_redis_is_an_outage(reply: bytes, clock: Clock, caplog: Any) -> None:
    with impostor(reply, ":s3cret@", 1) as url:
        store = over(RedisLink(url, timeout_s=PATIENCE_S, clock=clock))
        assert everything(store) == NOTHING
    assert store.link.errors == 1 and len(caplog.messages) == 1
    assert "s3cret" not in caplog.text and "\n" not in caplog.messages[0]


@pytest.mark.parametrize("reply", [b"+OK\r\n", b"*0\r\n", b"*1\r\n:1\r\n"])
def test_odd_replies_are_nothing(reply: bytes, clock: Clock) -> None:
    with impostor(20 * reply) as url:
        store = over(RedisLink(url, timeout_s=PATIENCE_S, clock=clock))
        assert everything(store) == NOTHING


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "http://:s3cret@localhost",
        "redis://user:s3/cret@localhost",
        "redis://:s3cret@localhost:port",
        "redis://:s3cret@localhost?colour=red",
        "redis://:s3cret@localhost?socket_timeout=long",
        "redis://:s3cret@[::1",
    ],
)
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^cache.redis_url: expected redis://.*$") as caught:
        RedisLink(url, timeout_s=1)
    assert "s3" not in str(caught.value)


def test_the_cache_loads_redis_only_if_it_is_told_to_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import handler.cache, sys; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "redis", None)  # as if it was not installed
    with pytest.raises(SettingsError, match=r"^cache.redis_url is set, and the package redis is not there"):
        RedisLink("redis://localhost", timeout_s=1)
