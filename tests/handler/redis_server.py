"""A Redis of the test's own: on a Unix socket in a folder of its own, nothing on disk."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from handler.redis_link import RedisLink
from handler.redis_store import RedisStore

PATIENCE_S = 60.0  # where the test is not about waiting: a busy machine is no failure


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class RedisServer:
    """Runs from `start` to `stop`, which may come again; `admin` is a client past everything that is tested."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="redis"))  # pytest's own folder: too long a name for a socket
        self.url = f"unix://{self.folder}/socket"
        self.admin: Any = redis.Redis.from_url(self.url, socket_timeout=PATIENCE_S)

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.admin.close()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Returns when it answers."""
        command = ["redis-server", "--port", "0", "--bind", "127.0.0.1", "--unixsocket", f"{self.folder}/socket"]
        command += ["--dir", str(self.folder), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "redis-server has ended"
        try:
            return bool(self.admin.ping())
        except redis.ConnectionError:
            return False

    def stop(self) -> None:
        """At once, with all that is in it; also when it is paused."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """It accepts connections and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def store(self, clock: Clock | None = None, *, timeout_s: float = PATIENCE_S, lease_s: float = 60) -> RedisStore:
        """A store as a worker has it, for 60 seconds, whose time stands still but for `clock`."""
        clock = clock or Clock()
        link = RedisLink(self.url, timeout_s=timeout_s, clock=clock)
        return RedisStore(link, ttl_s=60, lease_s=lease_s, wall=clock)

    def round_trips(self) -> int:
        """How often it has read from a connection so far, without this time."""
        return int(self.admin.info("stats")["total_reads_processed"]) - 1


def started() -> Iterator[RedisServer]:
    """One Redis, for a fixture."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed; on Debian: apt-get install redis-server")
    with RedisServer() as server:
        yield server


def until(done: Callable[[], bool]) -> None:
    """Returns when `done()` is true."""
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
