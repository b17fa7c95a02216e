"""An open-loop client: every request has its time, and its latency counts from that time, sent or not.

One thread, non-blocking sockets, kept connections. A request that is due while all connections are busy waits, and its
wait counts: a server that stands still is charged for what it kept waiting (no coordinated omission). With all times 0
it is a closed loop of `connections` clients: how answers are verified, and how `serving bench` measures.
"""

import gc
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

LOST = 0  # the status of a request whose connection broke or whose answer never came
IDLE = -1
CHUNK = 1 << 16
CONNECT_S = 5.0


class Requests(Protocol):
    """A list of requests, or what makes each when it is sent."""

    def __getitem__(self, place: int, /) -> bytes: ...


@dataclass(frozen=True)
class Drive:
    """What became of each request: seconds from the start (sent and done may be NaN), status, body of the answer.

    `ended` is when it was over, `cpu_s` what the client itself took of the processor.
    """

    times: NDArray[np.float64]
    sent: NDArray[np.float64]
    done: NDArray[np.float64]
    status: NDArray[np.int64]
    bodies: list[bytes]
    ended: float
    cpu_s: float

    @property
    def latencies(self) -> NDArray[np.float64]:
        """Seconds from the scheduled time to the answer; who never got one has waited until the end, at least."""
        return np.where(np.isnan(self.done), self.ended, self.done) - self.times


@dataclass(frozen=True)
class Reply:
    """One answer; `kept` is false when the server closes the connection after it."""

    status: int
    body: bytes
    kept: bool


def read(received: bytes | bytearray) -> Reply | None:
    """The answer in the bytes that have come so far; None while it is not whole."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    lines = bytes(received[:end]).split(b"\r\n")
    protocol, status = lines[0].split(b" ", 2)[:2]
    headers = {name.lower(): value.strip().lower() for name, _, value in (line.partition(b":") for line in lines[1:])}
    kept = headers.get(b"connection", b"close" if protocol == b"HTTP/1.0" else b"") != b"close"
    if b"chunked" in headers.get(b"transfer-encoding", b""):
        whole = _chunks(received, end + 4)
        return None if whole is None else Reply(int(status), whole, kept)
    length = int(headers.get(b"content-length", b"0"))
    body = bytes(received[end + 4 : end + 4 + length])
    return Reply(int(status), body, kept) if len(body) == length else None


def _chunks(received: bytes | bytearray, at: int) -> bytes | None:
    body = b""
    while (end := received.find(b"\r\n", at)) >= 0:
        size = int(bytes(received[at:end]).partition(b";")[0], 16)
        at = end + 2
        if len(received) < at + size + 2:
            return None
        if size == 0:
            return body
        body += received[at : at + size]
        at += size + 2
    return None


def request(path: str, content_type: str | None, body: bytes, /, **headers: str) -> bytes:
    """The bytes of a POST; None: without a Content-Type."""
    own = {} if content_type is None else {"Content-Type": content_type}
    named = {"Host": "127.0.0.1", **own, **headers, "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def arrivals(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """The times of a Poisson process: independent clients, who do not wait for one another."""
    enough = int(rate * seconds + 10 * (rate * seconds) ** 0.5 + 10)
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, size=enough))
    return times[times < seconds]


def drive(port: int, requests: Requests, times: NDArray[np.float64], *, connections: int, wait_s: float) -> Drive:
    """Send `requests[i]` at `times[i]` (ascending, seconds); `wait_s` after the last one the rest is lost."""
    with _quiet(), _Lines(port, connections) as lines:
        return _run(lines, requests, times, float(times[-1]) + wait_s)


def _run(lines: "_Lines", requests: Requests, times: NDArray[np.float64], limit: float) -> Drive:
    count, due = len(times), times.tolist()
    sent, done, status = np.full(count, np.nan), np.full(count, np.nan), np.full(count, LOST)
    bodies = [b""] * count
    following = finished = 0
    start, cpu = time.perf_counter(), time.process_time()
    while finished < count and (now := time.perf_counter() - start) < limit:
        while following < count and due[following] <= now and lines.free:
            sent[following] = time.perf_counter() - start
            finished += not lines.send(following, requests[following])
            following += 1
        waiting = following < count and bool(lines.free)
        for place, reply in lines.wait(max(0.0, min(limit, due[following] if waiting else limit) - now)):
            finished += 1
            if reply:
                done[place], status[place], bodies[place] = time.perf_counter() - start, reply.status, reply.body
    return Drive(times, sent, done, status, bodies, time.perf_counter() - start, time.process_time() - cpu)


@dataclass(slots=True, eq=False)
class _Line:
    """A connection; `place` is the request that it is busy with, or IDLE."""

    socket: socket.socket
    place: int = IDLE
    received: bytearray = field(default_factory=bytearray)


class _Lines:
    """The connections, free and busy; one that breaks is made anew."""

    def __init__(self, port: int, count: int) -> None:
        self.port = port
        self.epoll = select.epoll()
        self.all: dict[int, _Line] = {}
        self.free: deque[_Line] = deque()
        for _ in range(count):
            self._open()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        for line in self.all.values():
            line.socket.close()
        self.epoll.close()

    def send(self, place: int, request: bytes) -> bool:
        """Send on the connection that has been free for longest; false when it broke."""
        line = self.free.popleft()
        line.place = place
        try:
            line.socket.sendall(request)
        except OSError:
            self._renew(line)
            return False
        return True

    def wait(self, pause_s: float) -> Iterator[tuple[int, Reply | None]]:
        """What has come within `pause_s`: the place of each request that is over, and its answer if there is one."""
        # epoll alone wakes up on whole milliseconds; select does so in time, and sees one descriptor here.
        select.select([self.epoll], [], [], pause_s)
        for number, _ in self.epoll.poll(0):
            line = self.all[number]
            place = line.place
            received = self._receive(line)
            line.received += received
            reply = read(line.received) if received else None
            if reply and reply.kept:
                line.place, line.received = IDLE, bytearray()
                self.free.append(line)
            elif reply or not received:
                self._renew(line)
            if place != IDLE and (reply or not received):
                yield place, reply

    def _receive(self, line: _Line) -> bytes:
        try:
            return line.socket.recv(CHUNK)
        except OSError:
            return b""

    def _open(self) -> None:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=CONNECT_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = _Line(made)
        self.all[made.fileno()] = line
        self.free.append(line)
        self.epoll.register(made, select.EPOLLIN)

    def _renew(self, line: _Line) -> None:
        if line in self.free:
            self.free.remove(line)
        del self.all[line.socket.fileno()]
        line.socket.close()
        self._open()


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection meanwhile: with torch loaded it takes as long as many requests."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
