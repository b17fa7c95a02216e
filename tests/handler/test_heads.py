"""Few logits are scored in Python, many by NumPy: both as PyTorch would, and what is not finite harms no neighbour."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from handler.codecs.answer import DIGITS
from handler.heads import FEW, Scores

FINITE = st.floats(-1e4, 1e4, width=32)
ROW = st.lists(st.one_of(FINITE, st.sampled_from([math.inf, -math.inf, math.nan])), min_size=4, max_size=4)
ENOUGH = FEW // 4 + 1


def rows(found: list[list[float]]) -> NDArray[np.float32]:
    return np.array(found, np.float32).reshape(-1, 4)


@pytest.mark.parametrize("copies", [1, ENOUGH])
@given(row=st.lists(FINITE, min_size=4, max_size=4))
def test_probabilities_are_those_of_softmax(copies: int, row: list[float]) -> None:
    scores = Scores(rows([row] * copies))
    expected = torch.softmax(torch.tensor(row, dtype=torch.float64), 0)
    assert scores.sound == [True] * copies
    assert all(scores.rows[0] == other for other in scores.rows)
    np.testing.assert_allclose(scores.rows[0], expected.numpy(), atol=0.51 * 10**-DIGITS, rtol=0)
    assert scores.ids == [int(np.argmax(np.array(row, np.float32)))] * copies


@given(st.lists(ROW, min_size=1, max_size=3))
def test_few_are_as_many(found: list[list[float]]) -> None:
    few, many = Scores(rows(found)), Scores(rows(found + [[0.0] * 4] * ENOUGH))
    count = len(found)
    assert few.sound == many.sound[:count] == [all(map(math.isfinite, row)) for row in found]
    for i in (i for i in range(count) if few.sound[i]):
        assert few.ids[i] == many.ids[i]
        np.testing.assert_allclose(few.rows[i], many.rows[i], atol=1.01 * 10**-DIGITS, rtol=0)


@pytest.mark.parametrize("copies", [1, ENOUGH])
def test_of_what_is_not_finite_nothing_is_told(copies: int) -> None:
    scores = Scores(rows([[0, 0, math.log(2), 0], [0, math.nan, 0, 0]] * copies))
    labels, sure = zip(*scores.told("abcd"), strict=True)
    assert labels == ("c",) * copies and sure == pytest.approx([0.4] * copies)
    assert all(math.isfinite(x) for x in chain.from_iterable(scores.rows))
