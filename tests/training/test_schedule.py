import pytest

from training.schedule import one_cycle


def test_one_cycle_by_hand() -> None:
    assert one_cycle(0.0, 0.2) == 0.0
    assert one_cycle(0.1, 0.2) == pytest.approx(0.5)
    assert one_cycle(0.2, 0.2) == pytest.approx(1.0)
    assert one_cycle(0.6, 0.2) == pytest.approx(0.5)  # the middle of the cosine
    assert one_cycle(1.0, 0.2) == pytest.approx(0.0)
