"""The core without a server: order, one forward, deduplication, and whose fault costs whom what."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler import codecs
from handler.cache import CacheManager
from handler.contract import Contract, probabilities
from handler.errors import BadInput
from handler.inside import Inside
from handler.messages import Answer, Request
from handler.metrics import Metrics
from handler.service import Service
from handler.settings import LimitSettings
from handler.stores import MemoryStore
from tests.handler.payloads import JSON, RAW, dumps

CONTRACT = Contract(network="any", channels=1, height=1, width=3, labels=("a", "b", "c"))
CLOSED = Inside(Path(), CONTRACT)


class Echo:
    """A model whose logits are the pixels, and which remembers what it was asked; 255 stands for infinity."""

    engine, device, contract = "echo", "cpu", CONTRACT

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.fault: Exception | None = None

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Nothing to warm."""

    def predict(self, images: Any) -> Any:
        assert images.dtype == np.uint8 and images.shape[1:] == CONTRACT.shape
        if self.fault:
            raise self.fault
        self.batches.append(images.reshape(-1, 3).tolist())
        logits = images.reshape(-1, 3).astype(np.float32)
        return np.where(logits == 255, np.inf, logits)


class Bench:
    def __init__(self) -> None:
        self.model, self.now = Echo(), 0.0
        self.store = MemoryStore(entries=100, size_bytes=1 << 20, ttl_s=60, clock=lambda: self.now)
        self.cache, self.metrics = CacheManager(self.store, ["digest"]), Metrics()
        identity = {"name": "m", "version": "1"}
        self.service = Service(self.model, self.cache, LimitSettings(rows=3), identity, self.metrics, CLOSED)

    def ask(self, *requests: Request) -> list[Answer]:
        return self.service.answer(requests)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def raw(*pixels: int, **options: Any) -> Request:
    return Request(payload=bytes(pixels), content_type=RAW, request_id=f"r{pixels}", **options)


def rows(*pixels: list[int]) -> Request:
    return Request(payload=dumps(list(pixels)), content_type=JSON)


BAD = Request(payload=b"xx", content_type=RAW, request_id="bad")


def outcomes(answers: list[Answer]) -> list[str]:
    return [answer.outcome for answer in answers]


def test_one_forward_for_all_that_must_be_computed(bench: Bench) -> None:
    bench.ask(raw(1, 2, 3))
    answers = bench.ask(raw(1, 2, 3), raw(4, 5, 6), BAD, rows([7, 8, 9], [3, 2, 1]), raw(4, 5, 6))
    assert bench.model.batches == [[[1, 2, 3]], [[4, 5, 6], [7, 8, 9], [3, 2, 1]]]
    assert outcomes(answers) == ["HIT", "MISS", "ERROR", "MISS", "MISS"]
    assert [json.loads(answer.body).get("source") for answer in answers] == ["cache", "model", None, "model", "model"]
    assert json.loads(answers[3].body)["class_id"] == [2, 0]


def test_nothing_to_compute_asks_the_model_nothing(bench: Bench) -> None:
    assert bench.ask() == []
    assert outcomes(bench.ask(BAD)) == ["ERROR"]
    bench.ask(raw(1, 2, 3))
    bench.ask(raw(1, 2, 3))
    assert len(bench.model.batches) == 1


def test_storing_and_counting_wait_until_the_answers_are_sent(bench: Bench) -> None:
    """An adapter that can do so sends what `respond` gives and settles then; the next batch finds it settled anyway."""
    assert outcomes(bench.service.respond([raw(1, 2, 3)])) == ["MISS"]
    assert not len(bench.store) and not bench.metrics.noted["distillery_batch_requests"] and not bench.metrics.told
    bench.service.settle()
    assert len(bench.store) == 1
    assert list(bench.metrics.noted["distillery_batch_requests"]) == [1]
    assert [label for label, _ in bench.metrics.told] == ["c"]
    assert outcomes(bench.service.respond([raw(4, 5, 6)])) == ["MISS"]
    assert outcomes(bench.service.respond([raw(1, 2, 3), raw(4, 5, 6)])) == ["HIT", "HIT"]


def test_what_cannot_be_stored_is_logged_and_the_rest_is_done(bench: Bench, caplog: Any) -> None:
    bench.cache.put = lambda _: 1 / 0  # type: ignore[method-assign, assignment]
    assert outcomes(bench.ask(raw(1, 2, 3))) == ["MISS"]
    assert "an answer is not stored, or not counted" in caplog.text and "ZeroDivisionError" in caplog.text
    assert list(bench.metrics.noted["distillery_batch_requests"]) == [1]


def test_equal_requests_of_a_batch_are_computed_once(bench: Bench) -> None:
    answers = bench.ask(raw(1, 2, 3), raw(1, 2, 3), raw(1, 2, 3), raw(3, 2, 1))
    assert bench.model.batches == [[[1, 2, 3], [3, 2, 1]]]
    assert outcomes(answers) == ["MISS"] * 4 and answers[0].body == answers[1].body == answers[2].body
    counts = bench.cache.counts
    assert (counts.hits, counts.misses, counts.deduplicated) == (0, 4, 2)


def test_equal_bad_requests_each_get_their_own_error(bench: Bench) -> None:
    bad = [Request(payload=b"[1]", content_type=JSON, request_id=name) for name in "xy"]
    found = [json.loads(answer.body) for answer in bench.ask(*bad)]
    assert [(body["code"], body["request_id"]) for body in found] == [("bad_shape", "x"), ("bad_shape", "y")]


def test_an_answer_ends_with_its_time(bench: Bench) -> None:
    bench.ask(raw(1, 2, 3))
    bench.now = 59.9
    assert outcomes(bench.ask(raw(1, 2, 3))) == ["HIT"]
    bench.now = 60
    assert outcomes(bench.ask(raw(1, 2, 3))) == ["MISS"]
    assert bench.cache.counts.expired == 1


def test_bypassing_computes_anew_and_refreshes_what_is_kept(bench: Bench) -> None:
    bench.ask(raw(1, 2, 3))
    bench.now = 59
    assert outcomes(bench.ask(raw(1, 2, 3, look_up=False))) == ["BYPASS"]
    bench.now = 100
    assert outcomes(bench.ask(raw(1, 2, 3))) == ["HIT"]
    assert bench.cache.counts.bypassed == 1


def test_what_must_not_be_stored_is_not(bench: Bench) -> None:
    bench.ask(raw(1, 2, 3, look_up=False, store=False))
    assert outcomes(bench.ask(raw(1, 2, 3))) == ["MISS"]
    assert len(bench.model.batches) == 2


def test_a_twin_that_may_be_stored_is(bench: Bench) -> None:
    answers = bench.ask(raw(1, 2, 3, look_up=False, store=False), raw(1, 2, 3))
    assert outcomes(answers) == ["BYPASS", "MISS"] and len(bench.model.batches) == 1
    assert outcomes(bench.ask(raw(1, 2, 3))) == ["HIT"]


def test_a_request_that_was_not_readable_keeps_its_error(bench: Bench) -> None:
    request = Request(request_id="r", error=BadInput("empty_body", "no part"))
    [answer, good] = bench.ask(request, raw(1, 2, 3))
    assert (answer.status, json.loads(answer.body)["code"], good.status) == (400, "empty_body", 200)


def test_logits_that_are_not_finite_fail_their_own_request_only(bench: Bench, caplog: Any) -> None:
    answers = bench.ask(raw(1, 2, 3), rows([1, 1, 1], [255, 0, 0]), raw(3, 2, 1), raw(9, 255, 9))
    assert [answer.status for answer in answers] == [200, 500, 200, 500]
    assert json.loads(answers[2].body)["class_id"] == [0]
    assert "r(9, 255, 9): the model's logits are not finite" in caplog.text
    assert outcomes(bench.ask(raw(9, 255, 9))) == ["ERROR"]  # and the failure was not stored


def test_a_failed_forward_fails_what_needed_it_only(bench: Bench, caplog: Any) -> None:
    bench.ask(raw(1, 2, 3))
    bench.model.fault = RuntimeError("told so")
    answers = bench.ask(raw(1, 2, 3), raw(4, 5, 6), BAD, raw(4, 5, 6))
    assert [answer.status for answer in answers] == [200, 500, 400, 500]
    assert json.loads(answers[1].body) == {
        "error": "the model could not answer; the worker's log says why, under this request_id",
        "code": "internal",
        "request_id": "r(4, 5, 6)",
    }
    assert "told so" in caplog.text and "r(4, 5, 6)" in caplog.text
    bench.model.fault = None
    assert outcomes(bench.ask(raw(4, 5, 6))) == ["MISS"]


@pytest.mark.parametrize("step", ["kind_of", "decode"])
def test_a_fault_of_ours_in_one_request_is_its_own(bench: Bench, monkeypatch: Any, caplog: Any, step: str) -> None:
    real = getattr(codecs, step)

    def broken(*arguments: Any) -> Any:
        if bytes([4, 5, 6]) in arguments:
            raise RuntimeError("told so")
        return real(*arguments)

    monkeypatch.setattr(codecs, step, broken)
    assert [answer.status for answer in bench.ask(raw(1, 2, 3), raw(4, 5, 6), raw(7, 8, 9))] == [200, 500, 200]
    assert "request r(4, 5, 6) failed" in caplog.text and "told so" in caplog.text


def test_a_failed_store_costs_no_answer_that_is_computed(bench: Bench, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(bench.cache, "put", lambda _: 1 / 0)
    assert bench.ask(raw(1, 2, 3))[0].status == 200
    assert "ZeroDivisionError" in caplog.text


def test_a_failed_lookup_costs_nobody_an_answer(bench: Bench, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(bench.cache, "look_up", lambda _: 1 / 0)
    assert outcomes(bench.ask(raw(1, 2, 3), BAD)) == ["MISS", "ERROR"]
    assert "the cache cannot be asked" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_batch_that_fails_is_answered_not_raised(bench: Bench, monkeypatch: Any, caplog: Any) -> None:
    bench.ask(raw(4, 5, 6))
    monkeypatch.setattr(bench.service, "_run", lambda _: 1 / 0)
    assert [answer.status for answer in bench.ask(raw(1, 2, 3), BAD, raw(4, 5, 6))] == [500, 400, 200]
    assert "a batch failed; requests r(1, 2, 3), bad\n" in caplog.text


PIXEL = st.integers(0, 3)
ROW = st.tuples(PIXEL, PIXEL, PIXEL)
REQUESTS: st.SearchStrategy[tuple[Request, list[Any]]] = st.one_of(
    ROW.map(lambda row: (raw(*row), [row])),
    ROW.map(lambda row: (raw(*row, look_up=False), [row])),
    st.lists(ROW, min_size=1, max_size=4).map(lambda r: (rows(*map(list, r)), r if len(r) <= 3 else [])),
    st.just((BAD, [])),
)


@settings(max_examples=150)
@given(st.lists(st.lists(REQUESTS, max_size=6), max_size=5))
def test_any_batch_is_answered_as_each_request_would_be_alone(batches: list[list[tuple[Request, list[Any]]]]) -> None:
    """The law of batching, caching and deduplication together: none of them changes a prediction."""
    bench = Bench()
    for batch in batches:
        before = len(bench.model.batches)
        answers = bench.ask(*[request for request, _ in batch])
        assert len(bench.model.batches) - before <= 1
        for answer, (_, expected) in zip(answers, batch, strict=True):
            if not expected:
                assert answer.status in (400, 413)
                continue
            body = json.loads(answer.body)
            scores = probabilities(np.array(expected, np.float32))
            np.testing.assert_allclose(body["prediction"], scores, atol=1e-8)
            assert body["source"] == ("cache" if answer.outcome == "HIT" else "model")
            assert dict(answer.headers)["X-Cache"] == answer.outcome


def test_the_core_knows_neither_torch_nor_torchserve() -> None:
    code = "import handler.service, sys; sys.exit(bool({'torch', 'ts'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
