"""TorchServe's worker protocol in one pass: upstream's frames, read through a buffer and written at once.

Upstream makes some 25 system calls and objects a request, half of a small model's throughput. Used only with the
version that it was proved against (tests/handler/test_frames.py); with others `StudentHandler.handle` is called.

    request  = id, [name, value]… −1, [name, Content-Type, value]… −1      each text behind its length,
    batch    = "I", request…, −1                                           all numbers int32, big-endian
    response = code, message, [id, Content-Type, status, phrase, headers, body]… −1
"""

import functools
import logging
import struct
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from handler.forms import Parts
from handler.messages import HEADERS, Answer, Outcome, Request

log = logging.getLogger(__name__)
PROVED = "0.12.0"
CHUNK = 1 << 18  # bytes that one read asks for: more than a Unix socket holds
_pack, _unpack = struct.Struct("!i").pack, struct.Struct("!i").unpack_from
END = _pack(-1)

Read = Callable[[str, bytes, Parts], Request]
"""What an id, the headers as they stand in the frame (`parsed` reads them) and parts ask for; never raises."""
Likely = tuple[bytes, Request] | None
"""A request whose body is its one part, and all of its frame between id and value: clients repeat themselves."""


class Incomplete(Exception):
    """So many bytes of a value are not here yet."""


class Reader:
    """What the front end sends, read in large pieces; `message` takes the place of upstream's `retrieve_msg`."""

    def __init__(
        self, upstream: Callable[[Any], tuple[bytes, Any]], read: Read, settle: Callable[[], None] = lambda: None
    ) -> None:
        self.upstream, self.read, self.settle = upstream, read, settle
        self.data, self.at = b"", 0
        self.likely: Likely = None

    def message(self, connection: Any) -> tuple[bytes, Any]:
        """The next command and what belongs to it; ends the process, as upstream does, when the front end is gone."""
        self.settle()  # the answers to the last batch are sent
        self.connection = connection
        if (command := self.recv(1)) == b"I":
            return command, self._batch()
        self.at -= 1
        return self.upstream(self)  # loading: it reads from here

    def recv(self, length: int) -> bytes:
        """Up to `length` bytes, at least one: a socket to upstream's code."""
        if self.at == len(self.data):
            self._receive(1)
        found = self.data[self.at : self.at + length]
        self.at += len(found)
        return found

    def _batch(self) -> list[Request]:
        batch: list[Request] = []
        while True:
            try:
                one, self.at, self.likely = request(self.data, self.at, self.likely, self.read)
            except (struct.error, Incomplete) as error:
                self._receive(error.args[0] if isinstance(error, Incomplete) else 1)
            else:
                if one is None:
                    return batch
                batch.append(one)

    def _receive(self, least: int) -> None:
        """At least so many bytes more, behind those that are still to be read."""
        pieces, size = [self.data[self.at :]] if self.at < len(self.data) else [], 0  # one alone is not copied
        while size < least:
            piece = self.connection.recv(CHUNK)
            if not piece:
                log.info("the front end has gone")
                sys.exit(0)
            pieces.append(piece)
            size += len(piece)
        self.data, self.at = b"".join(pieces), 0


def request(data: bytes, at: int, likely: Likely, read: Read) -> tuple[Request | None, int, Likely]:
    """The request that begins at `at`, None for the end of the batch; where the next begins; what that is likely like.

    Raises struct.error or Incomplete where `data` ends too early.
    """
    if (length := _unpack(data, at)[0]) < 0:
        return None, at + 4, likely
    request_id, at = data[at + 4 : at + 4 + length].decode(), at + 4 + length
    if likely and data.startswith(likely[0], at):
        begin, last = at + len(likely[0]), likely[1]
        end = begin + len(last.payload)
        if data.startswith(END, end):
            wishes = last.look_up, last.store, last.options
            return Request(data[begin:end], last.content_type, request_id, *wishes), end + 4, likely
    begin, parts = at, Parts()
    while (length := _unpack(data, at)[0]) >= 0:
        at += 4 + length
        at += 4 + _unpack(data, at)[0]
    at += 4
    headers = data[begin:at]
    while (length := _unpack(data, at)[0]) >= 0:
        name, at = data[at + 4 : at + 4 + length], at + 4 + length
        (length,) = _unpack(data, at)
        kind, at = data[at + 4 : at + 4 + length], at + 4 + length
        (length,) = _unpack(data, at)  # only now is it certain that name and kind are whole
        value, at = data[at + 4 : at + 4 + length], at + 4 + length
        if at > len(data):
            raise Incomplete(at - len(data))
        parts.append((name.decode(), kind.decode(), value))
    found = read(request_id, headers, parts)
    if len(parts) == 1 and value and found.payload is value:  # one that cannot be read has no payload
        likely = data[begin : at - len(value)], found
    return found, at + 4, likely


def parsed(headers: bytes) -> dict[str, str]:
    """The headers of a request; of those with one name the last."""
    found, at = {}, 0
    while (length := _unpack(headers, at)[0]) >= 0:
        name, at = headers[at + 4 : at + 4 + length].decode(), at + 4 + length
        (length,) = _unpack(headers, at)
        found[name], at = headers[at + 4 : at + 4 + length].decode(), at + 4 + length
    return found


def response(batch: Sequence[Request], answers: Sequence[Answer]) -> bytes:
    """The frame that answers a batch."""
    pieces = [_SUCCESS]
    for asked, answer in zip(batch, answers, strict=True):
        request_id = asked.request_id.encode()
        head = _head(answer.status, answer.outcome)
        pieces += (_pack(len(request_id)), request_id, head, _pack(len(answer.body)), answer.body)
    pieces.append(END)
    return b"".join(pieces)


@functools.lru_cache(64)
def _head(status: int, outcome: Outcome) -> bytes:
    """What stands between the id and the body."""
    headers, phrase = dict(HEADERS[outcome]), HTTPStatus(status).phrase
    pairs = b"".join(_text(name) + _text(value) for name, value in headers.items())
    return _text(headers["content-type"]) + _pack(status) + _text(phrase) + _pack(len(headers)) + pairs


def _text(text: str) -> bytes:
    value = text.encode()
    return _pack(len(value)) + value


def install(
    answer: Callable[[list[Request]], list[Answer]], read: Read, settle: Callable[[], None] = lambda: None
) -> None:
    """Take upstream's place in the worker that this process is, if it is one and of the version that was proved.

    `answer` says what each request of a batch gets; `settle` is called when that is sent.
    """
    modules: dict[str, Any] = sys.modules  # of TorchServe, which is not ours to import
    if not hasattr(worker := modules["__main__"], "retrieve_msg"):
        return
    if (version := modules["ts"].__version__) != PROVED:
        log.warning("TorchServe %s: its own protocol code is used, for ours was proved against %s", version, PROVED)
        return
    worker.retrieve_msg = Reader(worker.retrieve_msg, read, settle).message
    modules["ts.service"].Service.predict = lambda _, batch: response(batch, answer(batch))
    log.info("TorchServe %s: its frames are read and written in one pass", version)


_SUCCESS = _pack(200) + _text("Prediction success")
