"""Whatever a body is: an answer or a refusal, nothing kept of what is refused, and no neighbour that notices."""

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.handler.hostile import TYPES, Hostile, hostile
from tests.handler.payloads import RAW, Pixels
from tests.harness import Post, Worker, multipart, post

GENERATED = st.integers(0, 2**32 - 1).map(hostile)
ANYTHING = st.tuples(st.binary(max_size=2000), st.sampled_from(TYPES) | st.text(max_size=40))
same_worker = settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def neighbours(worker: Worker, bad: Post, known: Post, computed: Post) -> Any:
    """The answer of one between two good ones, which must be what they would be without it."""
    [alone] = worker.ask(computed)
    before, reply, after = worker.ask(known, bad, computed)
    [kept] = worker.ask(known)
    assert (before.status, before.headers["X-Cache"]) == (200, "HIT") and before.body == kept.body
    assert (after.status, after.headers["X-Cache"]) == (200, "BYPASS")
    if reply.status == 200:  # it was in the same forward
        np.testing.assert_allclose(after.scores, alone.scores, atol=1e-6)
    else:
        assert after.body == alone.body
    return reply


def check(worker: Worker, bad: Post, images: Pixels) -> None:
    known, computed = post(images[0].tobytes(), RAW), post(images[1].tobytes(), RAW, Cache_Control="no-store")
    worker.ask(known)
    entries = len(worker.handler.service.cache.store)
    reply = neighbours(worker, bad, known, computed)
    [again] = worker.ask(bad)
    if reply.status == 200:
        assert again.headers["X-Cache"] == "HIT" and (again.scores == reply.scores).all()
    else:
        assert 400 <= reply.status < 500 and set(reply.json) == {"error", "code", "request_id"}
        assert again.error == reply.error
        assert len(worker.handler.service.cache.store) == entries


@same_worker
@given(GENERATED | ANYTHING)
def test_a_body_of_any_kind_hurts_at_most_itself(worker: Worker, images: Pixels, body: Hostile) -> None:
    check(worker, post(*body), images)


@same_worker
@given(GENERATED | ANYTHING)
def test_a_part_of_any_kind_hurts_at_most_itself(worker: Worker, images: Pixels, body: Hostile) -> None:
    content, kind = body
    check(worker, multipart(data=(kind or "", content)), images)
