"""Our reading and writing of TorchServe's frames, beside upstream's own, on any message."""

import io
import itertools
import struct
import sys
import types
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any

import pytest
import ts.protocol.otf_message_handler as otf
from hypothesis import example, given
from hypothesis import strategies as st
from ts.context import Context, RequestProcessor
from ts.service import Service

from handler import frames
from handler.cache import CacheManager
from handler.forms import Parts
from handler.frames import Reader
from handler.messages import Answer, Outcome, Request
from handler.settings import CacheSettings
from handler.student_handler import _request_in_frame
from tests.handler.payloads import RAW, Pixels
from tests.handler.test_options import ALL, DESCRIBE, EXPLAIN, PREDICT, by
from tests.handler.test_student_handler import BAD, forms
from tests.harness import END, Post, Worker, encoded, multipart, post

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PARTS = st.dictionaries(TEXT, st.tuples(TEXT, st.binary(max_size=300)), max_size=3)
POSTS = st.lists(st.builds(Post, st.dictionaries(TEXT, TEXT, max_size=4), PARTS), min_size=1, max_size=5)
ALIKE = post(END * 2, RAW)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


class Wire:
    """A socket that hands its bytes over in pieces of the sizes given, again and again."""

    def __init__(self, data: bytes, sizes: Iterable[int] = (1 << 20,)) -> None:
        self.stream, self.sizes = io.BytesIO(data), itertools.cycle(sizes)

    def recv(self, length: int) -> bytes:
        return self.stream.read(min(length, next(self.sizes)))


def frame(posts: Iterable[Post]) -> bytes:
    return b"I" + b"".join(encoded(f"id-{i}", item) for i, item in enumerate(posts)) + END


@pytest.fixture(autouse=True, scope="module")
def undecoded() -> Iterator[None]:
    """As config.properties has it: the server leaves JSON as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TS_DECODE_INPUT_REQUEST", "false")
        yield


def upstream(data: bytes) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Id, headers (with the type of each part) and row of each request, as TorchServe's own code reads them."""
    _, batch = otf.retrieve_msg(Wire(data))
    headers, rows, ids = Service.retrieve_data_for_inference(batch)
    for i, row in enumerate(rows):
        yield ids[i], headers[i].get_request_properties(), row


def carried(request_id: str, headers: bytes, parts: Parts) -> Request:
    """A request that carries all that it was read from, where it has room; its one part is its payload."""
    alone = len(parts) == 1
    kept = headers, [(name, kind, None if alone else value) for name, kind, value in parts]
    return Request(parts[0][2] if alone else b"", RAW, request_id, False, False, kept)  # type: ignore[arg-type]


def ours(batch: list[Request]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The same, as we read them."""
    for request in batch:
        assert (request.content_type, request.look_up, request.store) == (RAW, False, False)
        headers, parts = request.options  # type: ignore[misc]
        types_of_parts = {name: {"content-type": kind} for name, kind, _ in parts}
        row = {name: request.payload if value is None else value for name, _, value in parts}
        yield request.request_id, {**types_of_parts, **frames.parsed(headers)}, row


@given(batches=st.lists(POSTS, min_size=1, max_size=3), sizes=SIZES)
@example(batches=[[post(bytes(600_000), RAW)] * 2], sizes=[70_000, 3])
@example(batches=[[ALIKE, Post(ALIKE.headers, {**ALIKE.parameters, "more": ("", b"")}), ALIKE], [ALIKE]], sizes=[7])
@example(batches=[[ALIKE, post(bytes(8), RAW), ALIKE, Post(ALIKE.headers), post(bytes(9), RAW)]], sizes=[1 << 20])
def test_any_batches_are_read_as_upstream_reads_them(batches: list[list[Post]], sizes: list[int]) -> None:
    """In pieces of any size; a frame begins where the one before it ended."""
    wire = Wire(b"".join(map(frame, batches)), sizes)
    reader = Reader(lambda _: pytest.fail("no load message was sent"), carried)
    for posts in batches:
        command, batch = reader.message(wire)
        assert command == b"I"
        assert list(ours(batch)) == list(upstream(frame(posts)))


@given(TEXT, TEXT, st.integers(-1, 3), SIZES)
def test_a_load_message_is_left_to_upstream(model: str, path: str, gpu: int, sizes: list[int]) -> None:
    data = b"L"
    for value in (model, path, 32, "student_handler.py", gpu, ""):
        number, text = (value, b"") if isinstance(value, int) else (len(value.encode()), value.encode())
        data += struct.pack("!i", number) + text
    data += b"\x01"
    wire = Wire(data + frame([post(b"x", RAW)]), sizes)
    reader = Reader(otf.retrieve_msg, carried)
    assert reader.message(wire) == otf.retrieve_msg(Wire(data))
    assert len(reader.message(wire)[1]) == 1


def test_a_front_end_that_has_gone_ends_the_worker() -> None:
    whole = frame([post(bytes(99), RAW)])
    for data in (b"", whole[:1], whole[:40], whole[:-1]):
        with pytest.raises(SystemExit) as ended:
            Reader(otf.retrieve_msg, carried).message(Wire(data))
        assert ended.value.code == 0


ANSWERS = st.builds(
    Answer,
    st.sampled_from([200, 400, 413, 415, 500]),
    st.binary(max_size=50),
    st.sampled_from(["HIT", "MISS", "BYPASS", "ERROR"]),
)


@given(st.lists(st.tuples(TEXT, ANSWERS), min_size=1, max_size=6))
def test_any_answers_are_written_as_upstream_writes_them(answered: list[tuple[str, Answer]]) -> None:
    context = Context("m", "", None, 8, None, "0.12.0")
    context.request_processor = [RequestProcessor({}) for _ in answered]
    for i, (_, answer) in enumerate(answered):
        context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, i)
        for name, value in answer.headers:
            context.set_response_header(i, name, value)
    ids = {i: request_id for i, (request_id, _) in enumerate(answered)}
    bodies = [answer.body for _, answer in answered]
    expected = otf.create_predict_response(bodies, ids, "Prediction success", 200, context=context)
    requests = [Request(request_id=request_id) for request_id in ids.values()]
    assert frames.response(requests, [answer for _, answer in answered]) == expected


def test_the_bytes_of_any_reply_are_the_same_by_both_ways(worker: Worker, images: Pixels) -> None:
    """Every form of an image and every bad body, twice: first computed, then from the cache."""
    sent = [*forms(images[3]).values(), *(item for item, _ in BAD.values())]
    sent += [post(images[4].tobytes(), RAW, Cache_Control=control) for control in ("no-cache", "max-age=0, No-Store")]
    plain = post(images[7].tobytes(), RAW)
    sent += [by(route, plain, X_Options=ask) for route in (PREDICT, EXPLAIN) for ask in (ALL, {"top_k": 0})]
    sent += [DESCRIBE, by(PREDICT, plain, describe="True"), multipart(**{"X-Options": ("", b"x"), "data": (RAW, b"x")})]
    sent += [by(PREDICT, post(END * 2, RAW), X_Options={"top_k": 0})] * 2  # the second is not like the first
    sent += [multipart(body=("", images[5].tobytes()), data=(RAW, images[6].tobytes()))]
    data = frame(sent)
    service = worker.handler.service

    def exchanged() -> bytes:
        _, batch = Reader(otf.retrieve_msg, _request_in_frame).message(Wire(data, [999]))
        return frames.response(batch, service.answer(batch))

    by_upstream = [worker.service.predict(otf.retrieve_msg(Wire(data))[1]) for _ in range(2)]
    service.cache = CacheManager.from_settings(CacheSettings(), [])
    by_us = [exchanged() for _ in range(2)]
    assert by_us == by_upstream
    assert by_us[0] != by_us[1]


@pytest.fixture
def worker_process(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A main module that looks as a worker's does."""
    main = types.ModuleType("__main__")
    main.retrieve_msg = otf.retrieve_msg  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(Service, "predict", Service.predict)
    return main


def test_it_takes_upstreams_place_in_a_worker(worker_process: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    outcome: Outcome = "MISS"
    told: list[str] = []

    def answer(batch: list[Request]) -> list[Answer]:
        told.append("answered")
        return [Answer(200, request.payload, outcome) for request in batch]

    frames.install(answer, carried, lambda: told.append("settled"))
    wire = Wire(frame([post(b"x", RAW)]) * 2)
    for _ in range(2):
        command, batch = worker_process.retrieve_msg(wire)
        assert command == b"I" and isinstance(batch[0], Request)
        assert Service.predict(None, batch).endswith(b"\0\0\0\1x" + END)
    assert told == ["settled", "answered"] * 2, "what is left is done after an answer is sent, before the next is read"
    assert "TorchServe 0.12.0: its frames are read and written in one pass" in caplog.text


def test_another_version_is_left_alone(worker_process: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    before = Service.predict
    monkeypatch.setattr("ts.__version__", "0.13.0")
    frames.install(lambda _: [], carried)
    assert worker_process.retrieve_msg is otf.retrieve_msg and Service.predict is before
    assert "TorchServe 0.13.0: its own protocol code is used, for ours was proved against 0.12.0" in caplog.text


def test_what_is_no_worker_is_left_alone() -> None:
    before = Service.predict
    frames.install(lambda _: [], carried)
    assert Service.predict is before and not hasattr(sys.modules["__main__"], "retrieve_msg")
