"""What a request asks for beside its images: top_k, logits, features, explanations, a description; alone and mixed."""

import functools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import handler
from handler import student_handler
from handler.bundle import FILES
from handler.contract import Contract, probabilities
from handler.engines import network_of
from handler.errors import BadInput
from handler.messages import Answer, Request
from handler.options import Options, parse, wishes
from tests.bundles import LABELS
from tests.handler.payloads import JSON, RAW, Golden, Pixels, dumps
from tests.handler.test_service import ROW, Bench, raw
from tests.handler.test_student_handler import BAD, altered, forms
from tests.harness import Post, Worker, multipart, post

ALL = {"top_k": 3, "logits": True, "features": True}
PLAIN = ["prediction", "label", "class_id", "source", "model"]


# The grammar

GOOD: list[tuple[dict[str, Any], Options | None]] = [
    ({}, None),
    ({"logits": False, "features": False}, None),
    ({"top_k": 1}, Options(top_k=1)),
    ({"top_k": 10**30}, Options(top_k=10**30)),
    (ALL, Options(top_k=3, logits=True, features=True)),
]
WRONG: list[tuple[Any, str]] = [
    ([], 'options: expected an object such as {"top_k": 3}, got a list'),
    (None, 'options: expected an object such as {"top_k": 3}, got null'),
    ({"topk": 3}, "unknown option 'topk': did you mean 'top_k'?"),
    ({"explanation": True}, "unknown option 'explanation': expected one of features, logits, top_k"),
    ({"a\nb" * 99: 1}, f"unknown option '{('a b' * 99)[:60]}': expected one of features, logits, top_k"),
    ({"top_k": 0}, "options.top_k: expected a whole number above 0, got a number"),
    ({"top_k": -1}, "options.top_k: expected a whole number above 0, got a number"),
    ({"top_k": 2.0}, "options.top_k: expected a whole number above 0, got a number"),
    ({"top_k": True}, "options.top_k: expected a whole number above 0, got true or false"),
    ({"top_k": None}, "options.top_k: expected a whole number above 0, got null"),
    ({"logits": 1}, "options.logits: expected true or false, got a number"),
    ({"features": "true"}, "options.features: expected true or false, got a string"),
    ({"features": [[[]]]}, "options.features: expected true or false, got a list"),
]


@pytest.mark.parametrize(("value", "expected"), GOOD)
def test_options_are_read(value: dict[str, Any], expected: Options | None) -> None:
    assert parse(value) == expected


@pytest.mark.parametrize(("value", "text"), WRONG)
def test_a_wrong_option_is_named(value: Any, text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(value)
    assert (caught.value.code, str(caught.value)) == ("bad_option", text)


NAMED = st.fixed_dictionaries(
    {}, optional={"top_k": st.integers(1, 4), "logits": st.booleans(), "features": st.booleans()}
)


@given(NAMED, NAMED)
def test_what_the_body_names_wins_over_the_header(header: dict[str, Any], body: dict[str, Any]) -> None:
    assert parse(body, wishes({"x-OPTIONS": json.dumps(header)}).options) == parse({**header, **body})


@pytest.mark.parametrize("text", ["", "top_k=3", "{'top_k': 3}", "[" * 9999, "NaN", '"\ud800"', "3"])
def test_a_header_that_is_no_json_object_is_named(text: str) -> None:
    with pytest.raises(BadInput, match=r"expected an? (JSON )?object such as"):
        wishes({"X-Options": text})


# The core: equal bytes under another shape

OPTIONS = st.one_of(st.none(), NAMED.map(lambda named: parse({**named, "features": False})))


@settings(max_examples=100)
@given(st.lists(st.lists(st.tuples(ROW, OPTIONS), max_size=6), max_size=4))
def test_equal_bytes_with_other_options_never_share_an_answer(
    batches: list[list[tuple[tuple[int, int, int], Options | None]]],
) -> None:
    """In the cache, in a batch, and in none of both: an answer holds what was asked for and no more."""
    bench = Bench()
    for batch in batches:
        answers = bench.ask(*[raw(*row, options=options) for row, options in batch])
        for (row, options), answer in zip(batch, answers, strict=True):
            found = json.loads(answer.body)
            asked = options or Options()
            extra = [name for name in ("top_k", "logits") if getattr(asked, name)]
            assert list(found) == [*PLAIN[:3], *extra, *PLAIN[3:]]
            scores = probabilities(np.array([row], np.float32))[0]
            np.testing.assert_allclose(found["prediction"][0], scores, atol=1e-8)
            if asked.logits:
                assert found["logits"] == [list(row)]
            if asked.top_k:
                best = sorted(range(3), key=lambda k: (-scores[k], k))[: asked.top_k]
                assert [one["class_id"] for one in found["top_k"][0]] == best
                assert [one["probability"] for one in found["top_k"][0]] == [found["prediction"][0][k] for k in best]
    assert bench.cache.counts.misses - bench.cache.counts.deduplicated == len(
        {(row, options) for batch in batches for row, options in batch}
    )


def test_what_is_not_offered_costs_its_own_request_only(bench: Bench) -> None:
    """This network is none of ours; twice, for an error is not stored."""
    for _ in range(2):
        asked = [None, Options(features=True), Options(explanation=True), Options(logits=True)]
        answers = bench.ask(*[raw(1, 2, 3, options=options) for options in asked])
        assert [answer.status for answer in answers] == [200, 501, 501, 200]
        assert json.loads(answers[1].body)["code"] == "unsupported"


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_description_is_no_prediction(bench: Bench) -> None:
    bench.service.description = b'{"engine":"echo"}'
    good, told = bench.ask(raw(1, 2, 3), Request(request_id="x", describe=True))
    assert (good.status, told) == (200, Answer(200, b'{"engine":"echo"}', "BYPASS"))
    assert bench.cache.counts.misses == 1


# The wire


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Worker]:
    """One worker for the module, in this repository's code; what tests ask twice is in its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "__file__", str(root / "handler" / "__init__.py"))
        patch.setattr(student_handler, "__file__", str(root / "student_handler.py"))
        patch.setenv("TS_DECODE_INPUT_REQUEST", "false")
        with Worker(root, in_place=True) as worker:
            yield worker


@pytest.fixture(scope="module")
def network(root: Path) -> torch.nn.Module:
    return network_of(root / FILES.weights, Contract.read(root / FILES.contract))


PREDICT, EXPLAIN = {"url_path": "", "explain": "False"}, {"url_path": "", "explain": "True"}
"""The headers that TorchServe's front end adds on its routes, in the place of a client's of the same names."""


def by(route: dict[str, str], sent: Post, **headers: Any) -> Post:
    """As the front end hands it on from a route; X_Options as JSON."""
    own = {name.replace("_", "-"): v if isinstance(v, str) else json.dumps(v) for name, v in headers.items()}
    return Post({**sent.headers, **own, **route}, sent.parameters)


def test_options_add_to_the_answer(served: Worker, network: Any, images: Pixels, golden: Golden) -> None:
    """In every form of a request: as a header, and in JSON as a field."""
    rows = images[:2].reshape(2, 784).tolist()
    sent = [post(dumps({key: rows, "options": ALL}), JSON) for key in ("features", "instances")]
    sent += [by(PREDICT, post(dumps(body), JSON), X_Options=ALL) for body in ({"features": rows}, rows)]
    with torch.no_grad():
        inner = network[:-1](torch.from_numpy(images[:2, None])).numpy()
    for reply in served.ask(*sent):
        found = reply.json
        assert list(found)[1:] == ["label", "class_id", "top_k", "logits", "features", "source", "model"]
        np.testing.assert_allclose(found["logits"], golden["logits"][:2], atol=1e-4)
        np.testing.assert_allclose(found["features"], inner, atol=1e-5)
        for best, row, k in zip(found["top_k"], reply.scores, found["class_id"], strict=True):
            assert len(best) == 3 and best[0]["class_id"] == k
            assert [one["probability"] for one in best] == sorted(row, reverse=True)[:3]
            assert all(one == {**one, "label": LABELS[one["class_id"]]} for one in best)


def test_more_classes_than_there_are_is_all_of_them(served: Worker, images: Pixels) -> None:
    [reply] = served.ask(post(images[0].tobytes(), RAW, X_Options='{"top_k": 99}'))
    [best] = reply.json["top_k"]
    assert sorted(one["class_id"] for one in best) == list(range(10))


def test_an_explanation_says_which_pixels_move_the_answer(served: Worker, network: Any, images: Pixels) -> None:
    several = post(dumps({"features": images[:3].reshape(3, 784).tolist()}), JSON)
    [reply] = served.ask(by(EXPLAIN, several))
    assert list(reply.json) == ["explanation", *PLAIN[1:]]
    for image, found, k in zip(images, reply.json["explanation"], reply.json["class_id"], strict=False):
        pixels = torch.from_numpy(image[None, None]).float().requires_grad_()
        network(pixels)[0, k].backward()
        assert pixels.grad is not None
        slopes = pixels.grad[0, 0].abs().numpy()
        np.testing.assert_allclose(found, slopes / slopes.max(), atol=1e-5)
    [kserve] = served.ask(by(EXPLAIN, post(dumps({"instances": [images[0].tolist()]}), JSON), X_Options={"top_k": 1}))
    assert list(kserve.json) == ["explanations", "label", "class_id", "top_k", "source", "model"]
    assert near(kserve.json["explanations"], reply.json["explanation"][:1])


def test_each_shape_of_an_answer_has_its_own_place_in_the_cache(worker: Worker, images: Pixels) -> None:
    plain = post(images[0].tobytes(), RAW)
    shapes = [by(PREDICT, plain), by(EXPLAIN, plain)]
    shapes += [by(route, plain, X_Options={"top_k": k}) for route in (PREDICT, EXPLAIN) for k in (1, 2)]
    for outcome in ("MISS", "HIT"):
        for sent in shapes:
            assert worker.ask(sent)[0].headers["X-Cache"] == outcome
    same = [
        by(PREDICT, plain, x_options='{"top_k":1,  "logits":false}'),
        by(PREDICT, plain, X_Options={"logits": False}),
    ]
    assert [reply.headers["X-Cache"] for reply in worker.ask(*same)] == ["HIT", "HIT"]


# What TorchServe's front end may say, and what a client may not

DESCRIBE = Post({"describe": "True"})
FORM = "application/x-www-form-urlencoded"


def test_the_model_describes_itself(served: Worker, root: Path) -> None:
    [reply] = served.ask(DESCRIBE)
    found, report = reply.json, json.loads((root / FILES.report).read_text())
    assert (reply.status, reply.content_type) == (200, JSON)
    assert found["model"] == served.ask(post(bytes(784), RAW))[0].json["model"]
    assert found["contract"] == json.loads((root / FILES.contract).read_text())
    assert list(found["engine"]) == ["name", "device", "micro_batch", "threads", "why"]
    assert (found["engine"]["name"], found["engine"]["device"]) == ("onnx", "cpu")
    assert found["evidence"] == {"served": "student", **report["engines"]["student"]["onnx"]}
    assert (found["options"], found["explanations"]) == (["top_k", "logits", "features"], True)


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        (by(PREDICT, post(bytes(784), RAW), describe="True"), "prediction"),
        (by({**PREDICT, "Explain": "True", "EXPLAIN": "True"}, post(bytes(784), RAW), Describe="True"), "prediction"),
        (by(PREDICT, multipart(data=(RAW, bytes(784)), explain=("", b"True")), describe="True"), "prediction"),
        (by({}, post(bytes(784), RAW), describe="True"), "prediction"),
        (by(PREDICT, Post({"Content-Type": FORM}), describe="True"), "empty_body"),
        (by(PREDICT, post(b"", None), describe="True"), "empty_body"),
        (by({}, post(b"", None), describe="True"), "empty_body"),
        # The old routes, /invocations and the like, add no header: a client's has its way with its own answer.
        (by({}, post(bytes(784), RAW), explain="True"), "explanation"),
        (by({}, Post({"Content-Type": FORM}), describe="True"), "contract"),
    ],
)
def test_a_forged_header_has_no_effect_but_on_the_old_routes(
    served: Worker, images: Pixels, sent: Post, key: str
) -> None:
    neighbours = [by(PREDICT, post(image.tobytes(), RAW)) for image in images[:2]]
    alone = [reply.json["prediction"] for reply in served.ask(*neighbours)]
    before, forged, behind = served.ask(neighbours[0], sent, neighbours[1])
    assert [before.json["prediction"], behind.json["prediction"]] == alone
    assert key in forged.json or key == forged.json.get("code")


def test_a_part_with_the_name_of_a_header_is_no_header(served: Worker, images: Pixels) -> None:
    parts = {"X-Options": ("", b"{}"), "Cache-Control": ("", b"no-store"), "data": (RAW, images[0].tobytes())}
    [reply] = served.ask(multipart(**parts))
    assert list(reply.json) == PLAIN


# Everything mixed

BODIES = ("raw", "png", "features", "instances, nested", "body options", "bad body options", "783 bytes")
ASKED = (None, {"top_k": 2}, {"logits": True}, {"features": True}, ALL, {"top_k": 0}, "nonsense")
ROUTES: tuple[dict[str, str], ...] = (
    PREDICT, EXPLAIN, {**PREDICT, "describe": "True"}, {**PREDICT, "Explain": "True"}, {"explain": "True"}, {},
)  # fmt: skip
MIXED = st.tuples(st.integers(0, 2), st.sampled_from(BODIES), st.sampled_from(ASKED), st.sampled_from(ROUTES))


def mixed(images: Pixels, index: int, body: str, asked: Any, route: dict[str, str]) -> Post:
    image = images[index]
    in_body = {"body options": {"top_k": 4, "logits": False}, "bad body options": {"logits": "yes"}}
    if body in in_body:
        sent = post(dumps({"features": image.ravel().tolist(), "options": in_body[body]}), JSON)
    else:
        sent = post(bytes(783), RAW) if body == "783 bytes" else forms(image)[body]
    return by(route, sent, X_Options=asked) if asked is not None else by(route, sent)


def near(one: Any, other: Any) -> bool:
    """The same JSON, its numbers within what the order of sums may change."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one.keys() - {"source"})
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    return bool(np.isclose(one, other, rtol=1e-4, atol=1e-5)) if isinstance(one, float) else one == other


@settings(max_examples=60)
@given(batches=st.lists(st.lists(MIXED | st.none(), min_size=1, max_size=8), min_size=1, max_size=2))
def test_a_mixed_batch_gives_each_what_it_gets_alone(served: Worker, images: Pixels, batches: list[list[Any]]) -> None:
    """Predictions, explanations, descriptions, wrong options, forged headers; the cache fills from batch to batch."""

    @functools.cache
    def alone(item: str) -> Any:
        index, body, asked, route = json.loads(item)
        [reply] = served.ask(by({}, mixed(images, index, body, asked, route), Cache_Control="no-store"))
        return {**reply.json, "status": reply.status}

    for batch in batches:
        replies = served.ask(*[mixed(images, *item) if item else DESCRIBE for item in batch])
        for i, (item, reply) in enumerate(zip(batch, replies, strict=True)):
            found = {**reply.json, "status": reply.status}
            if item is None:
                assert "contract" in found
                continue
            assert found.pop("request_id", f"id-{i}") == f"id-{i}"
            expected = {key: value for key, value in alone(json.dumps(item)).items() if key != "request_id"}
            assert near(found, expected), item


# Where something is lacking


def test_without_captum_all_but_explanations_is_served(
    root: Path, images: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the archive's own code: nothing of it imports captum before it is asked to explain."""
    for name in ("captum", "captum.attr"):
        monkeypatch.setitem(sys.modules, name, None)
    plain = post(images[0].tobytes(), RAW)
    with Worker(root) as worker:
        asked = [by(PREDICT, plain), by(EXPLAIN, plain), by(PREDICT, plain, X_Options=ALL), DESCRIBE]
        good, lacking, whole, told = worker.ask(*asked)
        assert [good.status, whole.status] == [200, 200] and lacking.error == (501, "unsupported")
        assert lacking.json["error"] == "an explanation needs captum where the server runs: pip install captum"
        assert told.json["explanations"] is False and told.json["options"] == list(ALL)


def test_a_network_of_others_has_no_inside(root: Path, images: Pixels, tmp_path: Path) -> None:
    """It is served by its exported engines, and says so."""

    def change(copy: Path) -> None:
        contract = json.loads((copy / FILES.contract).read_text())
        (copy / FILES.contract).write_text(json.dumps({**contract, "network": "theirs"}))

    plain = post(images[0].tobytes(), RAW)
    with Worker(altered(root, tmp_path, change)) as worker:
        asked = [by(EXPLAIN, plain), by(PREDICT, plain, X_Options=ALL), by(PREDICT, plain, X_Options={"top_k": 1})]
        *lacking, good, told = worker.ask(*asked, DESCRIBE)
        assert [reply.error for reply in lacking] == [(501, "unsupported")] * 2 and good.status == 200
        assert "network 'theirs'" in lacking[0].json["error"]
        assert (told.json["options"], told.json["explanations"]) == (["top_k", "logits"], False)


def test_a_fault_while_explaining_is_its_own(
    worker: Worker, images: Pixels, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(worker.handler.service.inside, "saliency", lambda *_: 1 / 0)
    plain = post(images[0].tobytes(), RAW)
    replies = worker.ask(by(PREDICT, plain), by(EXPLAIN, plain), by(PREDICT, plain))
    assert [reply.status for reply in replies] == [200, 500, 200]
    assert "request id-1 failed" in caplog.text


@pytest.mark.usefixtures("faulty")
def test_no_log_line_quotes_a_request(worker: Worker, images: Pixels, caplog: Any) -> None:
    """Nor its headers, whatever becomes of it."""
    caplog.set_level(logging.DEBUG)
    secret = {"Authorization": "Bearer S3CRET", "X-S3CRET": "S3CRET"}
    sent = [post(b"S3CRET"), post(b'{"S3CRET": S3CRET', JSON), multipart(S3CRET=("", b"S3CRET"))]
    sent += [by(PREDICT, post(images[i].tobytes(), RAW), X_Options={"S3CRET": 1}) for i in (0, 1)]
    sent += [item for item, _ in BAD.values()] + [post(images[1].tobytes(), RAW)]
    replies = worker.ask(*[Post({**item.headers, **secret}, item.parameters) for item in sent])
    assert all(reply.status >= 400 for reply in replies)
    assert "told so" in caplog.text and f"request {replies[-1].request_id} failed" in caplog.text
    assert "S3CRET" not in caplog.text
