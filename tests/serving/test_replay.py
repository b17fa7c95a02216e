"""The worker's half of `check`: frames as TorchServe writes them, and what counts as the same answer."""

import json
import warnings
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # TorchServe leaves its version.txt open
    from ts.protocol.otf_message_handler import create_predict_response

    from serving.replay import TOLERANCES, Frame, compare, replay, row

LOGITS = np.array([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5]], np.float32)
EXPECTED = np.array([[0.04201007, 0.11419520, 0.84379473], [0.78559703, 0.03911257, 0.17529040]])  # by hand
LAST = np.array([0, 0, 1])
STORED = {"logits": LOGITS}
TOLERANCE, WIDE = TOLERANCES["logits"], TOLERANCES["logits_onnx-int8"]


class Scripted:
    """A Service that answers every batch with these bodies, all with one status."""

    def __init__(self, status: int, *bodies: bytes) -> None:
        self.status, self.bodies = status, bodies

    def predict(self, batch: list[dict[str, Any]]) -> bytearray:
        ids = {i: f"id-{i}" for i in range(len(self.bodies))}
        return bytearray(create_predict_response(list(self.bodies), ids, "Prediction success", self.status))


def body(scores: list[float]) -> bytes:
    return json.dumps({"prediction": [scores]}).encode()


def test_a_frame_of_torchserves_own_encoder_is_read() -> None:
    frame = bytes(Scripted(415, b"one", "zwei ä".encode()).predict([]))
    assert [(answer.status, answer.body.decode()) for answer in Frame(frame).answers()] == [
        (415, "one"),
        (415, "zwei ä"),
    ]


def test_probabilities_are_collected_batch_by_batch() -> None:
    rows = [row(b"x", "image/png")] * 4
    found = replay(Scripted(200, body([0.25, 0.75]), body([1.0, 0.0])), rows, 2)
    assert found.tolist() == [[0.25, 0.75], [1.0, 0.0]] * 2


def test_an_answer_that_is_no_prediction_fails_with_its_text() -> None:
    with pytest.raises(ValueError, match="a golden payload got 400: expected 784"):
        replay(Scripted(400, b"expected 784"), [row(b"x", "image/png")], 1)


def test_a_missing_answer_fails() -> None:
    with pytest.raises(ValueError, match="2 requests got 1 answers"):
        replay(Scripted(200, body([1.0])), [row(b"x", "image/png")] * 2, 2)


def test_the_same_answers_pass_and_their_difference_is_told() -> None:
    assert compare("raw", EXPECTED, STORED) < 1e-7
    assert compare("raw", EXPECTED + LAST * TOLERANCE / 2, STORED) == pytest.approx(TOLERANCE / 2, rel=1e-3)


def test_a_difference_beyond_the_tolerance_fails() -> None:
    with pytest.raises(ValueError, match=r"as raw: probabilities differ by up to 0\.002 .*, 0 of 2 classes changed"):
        compare("raw", EXPECTED + LAST * TOLERANCE * 2, STORED)


def test_int8_is_compared_with_its_own_logits() -> None:
    rounded = np.array([[0.1, 1.0, 2.5], [1.9, -1.0, 0.7]], np.float32)
    powers = np.exp(rounded.astype(np.float64))
    found = powers / powers.sum(axis=1, keepdims=True)
    with pytest.raises(ValueError, match="probabilities differ"):
        compare("raw", found, STORED)
    both = {**STORED, "logits_onnx-int8": rounded}
    assert compare("raw", found, both) < 1e-7
    assert compare("raw", found + LAST * WIDE / 4, both) == pytest.approx(WIDE / 4, rel=1e-3)
    assert compare("raw", EXPECTED, both) < 1e-7, "another engine, in the same archive"
    with pytest.raises(ValueError, match=r"allowed 0\.1"):
        compare("raw", found + LAST * WIDE * 2, both)


def test_another_class_fails_unless_the_two_were_equal() -> None:
    with pytest.raises(ValueError, match="1 of 2 classes changed"):
        compare("png", EXPECTED[:, [0, 2, 1]] * [[1], [0]] + EXPECTED * [[0], [1]], STORED)
    even = np.array([[0.50004, 0.49996]])
    assert compare("png", even[:, ::-1], {"logits": np.log(even).astype(np.float32)}) < TOLERANCE
    close = np.array([[0.5 + 0.75 * TOLERANCE, 0.5 - 0.75 * TOLERANCE]])
    with pytest.raises(ValueError, match="1 of 1 classes changed"):  # each probability within the tolerance
        compare("png", close + np.array([-0.8, 0.8]) * TOLERANCE, {"logits": np.log(close).astype(np.float32)})
