"""The bytes of an answer are JSON, whole, and in order."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.codecs import answer
from handler.errors import BadInput, Internal, TooLarge

MODEL = {"name": "student", "version": "1.0", "digest": "d" * 64}


@pytest.mark.parametrize("source", ["model", "cache"])
def test_head_and_tail_make_the_documented_object(source: str) -> None:
    body = answer.head("prediction", [[0.25, 0.75]], [1], ["T-shirt/top", 'Bääg "x"']) + answer.tail(source, MODEL)
    expected = {"prediction": [[0.25, 0.75]], "label": ['Bääg "x"'], "class_id": [1], "source": source, "model": MODEL}
    assert list(json.loads(body).items()) == list(expected.items())
    assert "Bääg".encode() in body


@given(st.text(), st.text())
def test_an_error_quotes_anything(message: str, request_id: str) -> None:
    found = json.loads(answer.error(BadInput("bad_json", message + "\ud800"), request_id))
    assert list(found) == ["error", "code", "request_id"]
    assert found["code"] == "bad_json"
    assert found["error"][-1] == "?"


def test_status_and_code_are_the_errors_own() -> None:
    assert [error.status for error in (BadInput("a", ""), TooLarge("b", ""), Internal())] == [400, 413, 500]
    assert json.loads(answer.error(Internal(), "id"))["code"] == "internal"
