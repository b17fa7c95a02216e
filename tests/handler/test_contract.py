"""The contract survives its file, and logits become probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from handler.contract import Contract, probabilities
from handler.errors import BundleError


def test_what_is_written_is_read(contract: Contract, tmp_path: Path) -> None:
    (tmp_path / "contract.json").write_text(contract.to_json())
    assert Contract.read(tmp_path / "contract.json") == contract


def test_sizes(contract: Contract) -> None:
    assert (contract.size, contract.shape) == (784, (1, 28, 28))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"version": 1', '"version": 2', "version: expected one of 1, got 2"),
        ('"height"', '"heigth"', "did you mean 'height'"),
        ('"dtype": "uint8"', '"dtype": "float32"', "dtype: expected one of uint8"),
        ("{", "", "not a contract"),
        ('"network": "separable",', "", "network: a value is required"),
    ],
)
def test_what_is_no_contract_is_refused(contract: Contract, tmp_path: Path, old: str, new: str, text: str) -> None:
    path = tmp_path / "contract.json"
    path.write_text(contract.to_json().replace(old, new, 1))
    with pytest.raises(BundleError, match=text):
        Contract.read(path)


def test_a_missing_contract_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a contract"):
        Contract.read(tmp_path / "contract.json")


NUMBERS = st.floats(-(2.0**127), 2.0**127, width=32)
LOGITS = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=NUMBERS)


@given(LOGITS)
def test_probabilities_are_torchs_and_sum_to_one(logits: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    found = probabilities(logits)
    expected = torch.from_numpy(logits).double().softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
