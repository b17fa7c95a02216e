"""The client: what it sends, what it makes of answers, when it tries again and when it must not."""

import json
from pathlib import Path
from typing import Any

import pytest

from handler.errors import BadInput, DistilleryError, ServeError, TooLarge, Unsupported
from serving.client import Client, token
from tests.serving.conftest import Stub

MODEL = {"name": "student", "version": "1.0", "digest": "d" * 64}
GOOD = {"prediction": [[0.25, 0.75]], "label": ["shoe"], "class_id": [1], "source": "model", "model": MODEL}
REFUSED = {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."}


def keys(path: Path, inference: str) -> Path:
    path.write_text(json.dumps({"management": {"key": "mmm"}, "inference": {"key": inference}, "API": {"key": "a"}}))
    return path


def client(stub: Stub, pauses: list[float] | None = None, **options: Any) -> Client:
    found = pauses if pauses is not None else []
    return Client(stub.url, sleep=found.append, jitter=lambda: 0.5, **options)


def test_a_prediction_is_typed_and_whole(stub: Stub) -> None:
    stub.answers = [(200, GOOD)]
    with client(stub) as one:
        found = one.predict(b"bytes", "image/png")
    assert (found.label, found.class_id, found.scores, found.source) == ("shoe", 1, (0.25, 0.75), "model")
    assert (found.name, found.version, found.digest) == ("student", "1.0", "d" * 64)
    assert found.probability == 0.75
    asked = stub.asked[0]
    assert (asked.path, asked.body, asked.headers["Content-Type"]) == ("/predictions/student", b"bytes", "image/png")
    assert "Cache-Control" not in asked.headers and "Authorization" not in asked.headers


def test_without_a_content_type_none_is_invented(stub: Stub) -> None:
    stub.answers = [(200, GOOD)]
    with client(stub) as one:
        one.predict(b"bytes", cache=False)
    assert "Content-Type" not in stub.asked[0].headers
    assert stub.asked[0].headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    "failure", [(503, {"code": 503, "message": "queue full"}), (500, {"message": "Worker died."}), None]
)
def test_a_busy_or_dying_server_is_asked_again(stub: Stub, failure: tuple[int, Any] | None) -> None:
    stub.answers = [failure, failure, (200, GOOD)]
    pauses: list[float] = []
    with client(stub, pauses) as one:
        assert one.predict(b"x").label == "shoe"
    assert pauses == [0.1, 0.2]  # doubled, times 0.5 + jitter


def test_attempts_are_bounded_and_the_last_failure_is_told(stub: Stub) -> None:
    stub.answers = [(503, {"code": 503, "message": "queue full"})]
    pauses: list[float] = []
    with client(stub, pauses, attempts=4) as one, pytest.raises(DistilleryError, match="503: queue full"):
        one.predict(b"x")
    assert len(stub.asked) == 4
    assert pauses == [0.1, 0.2, 0.4]


def test_jitter_spreads_the_pauses(stub: Stub) -> None:
    stub.answers = [(503, {})]
    spread = []
    for jitter in (0.0, 0.999):
        pauses: list[float] = []
        one = Client(stub.url, attempts=2, sleep=pauses.append, jitter=lambda: jitter)  # noqa: B023
        with one, pytest.raises(DistilleryError):
            one.predict(b"x")
        spread += pauses
    assert spread == pytest.approx([0.05, 0.1499])


@pytest.mark.parametrize(("status", "kind"), [(400, BadInput), (413, TooLarge), (415, Unsupported)])
def test_a_refused_payload_is_not_sent_again_and_has_the_servers_words(
    stub: Stub, status: int, kind: type[ServeError]
) -> None:
    stub.answers = [(status, {"error": "expected 784 numbers", "code": "bad_shape", "request_id": "r"})]
    pauses: list[float] = []
    with client(stub, pauses) as one, pytest.raises(kind, match=r"^expected 784 numbers$") as caught:
        one.predict(b"x")
    assert caught.value.code == "bad_shape"
    assert len(stub.asked) == 1 and pauses == []


def test_torchserves_own_413_has_no_body(stub: Stub) -> None:
    stub.answers = [(413, b"")]
    with client(stub) as one, pytest.raises(TooLarge, match="max_request_size"):
        one.predict(b"x")


def test_nobody_there_is_one_line() -> None:
    one = Client("http://127.0.0.1:1", sleep=lambda pause: None, attempts=2)
    with one, pytest.raises(DistilleryError, match=r"^http://127.0.0.1:1/.*: no TorchServe is listening there$"):
        one.predict(b"x")


def test_a_strangers_answer_is_an_error(stub: Stub) -> None:
    stub.answers = [(200, b"<html>")]
    with client(stub) as one, pytest.raises(DistilleryError, match="without a prediction"):
        one.predict(b"x")


def test_the_token_of_the_key_file_is_sent(stub: Stub, tmp_path: Path) -> None:
    stub.answers = [(200, GOOD)]
    with client(stub, key_file=keys(tmp_path / "key_file.json", "iii")) as one:
        one.predict(b"x")
    assert stub.asked[0].headers["Authorization"] == "Bearer iii"


def test_a_restarted_servers_new_token_is_read(stub: Stub, tmp_path: Path) -> None:
    stub.answers = [(400, REFUSED), (200, GOOD)]
    with client(stub, key_file=keys(tmp_path / "key_file.json", "old")) as one:
        keys(tmp_path / "key_file.json", "new")
        assert one.predict(b"x").label == "shoe"
    assert [asked.headers["Authorization"] for asked in stub.asked] == ["Bearer old", "Bearer new"]


def test_a_refused_token_is_named_once(stub: Stub, tmp_path: Path) -> None:
    stub.answers = [(400, REFUSED)]
    one = client(stub, key_file=keys(tmp_path / "key_file.json", "bad"))
    with one, pytest.raises(DistilleryError, match=r"the token was refused: .*key_file\.json"):
        one.predict(b"x")
    assert len(stub.asked) == 1


def test_a_key_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "key_file.json"
    assert token(path, "inference") is None
    path.write_text("{}")
    with pytest.raises(DistilleryError, match="not a key file"):
        token(path, "inference")


def test_proxies_of_the_environment_have_no_part_in_it(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    stub.answers = [(200, GOOD)]
    with client(stub, attempts=1) as one:
        assert one.predict(b"x").label == "shoe"
