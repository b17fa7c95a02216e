"""Measures against hand-computed values."""

import functools
import math

import pytest
import torch
from torch import nn

from training import evaluate

# Three images, two classes; confidences 0.75, 0.75 and 0.9; the second is wrong.
LOGITS = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0], [0.0, math.log(9)]])
LABELS = torch.tensor([0, 1, 1])


def test_accuracy_and_agreement() -> None:
    assert evaluate.accuracy(LOGITS, LABELS) == pytest.approx(2 / 3)
    assert evaluate.agreement(LOGITS, torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0]])) == pytest.approx(2 / 3)


def test_calibration_error_by_hand() -> None:
    # Two images of confidence 0.75 share a bin (accuracy 0.5), one of 0.9 has its own (accuracy 1).
    expected = 2 / 3 * abs(0.5 - 0.75) + 1 / 3 * abs(1 - 0.9)
    assert evaluate.calibration_error(LOGITS, LABELS) == pytest.approx(expected, abs=1e-6)


def test_reliability_accounts_for_every_image() -> None:
    bins = evaluate.reliability(LOGITS, LABELS)
    assert len(bins["share"]) == 15
    assert sum(bins["share"]) == pytest.approx(1)
    assert bins["share"][11] == pytest.approx(2 / 3)  # (11/15, 12/15] holds 0.75
    assert bins["share"][13] == pytest.approx(1 / 3)  # (13/15, 14/15] holds 0.9


def test_confidence_one_is_in_the_last_bin() -> None:
    bins = evaluate.reliability(torch.tensor([[100.0, 0.0]]), torch.tensor([0]))
    assert bins["share"][14] == 1


def test_confusion_has_labels_as_rows() -> None:
    assert evaluate.confusion(LOGITS, LABELS).tolist() == [[1, 0], [1, 1]]


def test_quality_per_class() -> None:
    found = evaluate.quality(LOGITS, LABELS, ["a", "b"], LOGITS)
    a, b = found["per_class"]
    assert (a["precision"], a["recall"], a["images"]) == pytest.approx((0.5, 1.0, 1))
    assert (b["precision"], b["recall"], b["images"]) == pytest.approx((1.0, 0.5, 2))
    assert found["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.25) + math.log(0.9)) / 3, abs=1e-6)
    assert found["agreement"] == 1


def test_interval_is_wilsons() -> None:
    # Newcombe 1998, Stat. Med. 17:857, table I, method 3: 81 of 263 → 0.2553 to 0.3662.
    low, high = evaluate.interval(81 / 263, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_macs_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 25, 2))

    class Floats(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network(x.float())  # type: ignore[no-any-return]

    assert evaluate.macs(Floats(), (1, 5, 5)) == 4 * 9 * 25 + 200


def test_logits_of_leaves_the_mode_and_the_statistics_as_they_were() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(7, 1, 2, 2)
    whole, parts = evaluate.logits_of(network, images), evaluate.logits_of(network, images, batch=2)
    torch.testing.assert_close(whole, parts)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_latency_gives_each_call_its_turns() -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1

    runs = {name: functools.partial(count, name) for name in calls}
    found = evaluate.latency_ms(runs, repetitions=3, seconds=0)
    assert set(found) == {"a", "b"}
    assert calls == {"a": 4, "b": 4}  # one to warm up, one a round
    assert 0 <= found["a"]["p50"] <= found["a"]["p99"]
