"""What a picture claims is computed right."""

from training.plots import frontier


def test_the_frontier_is_what_nothing_beats() -> None:
    """By hand: 2 for 91 loses to 1 for 92, 3 for 94 to 3 for 95, and 5 for 95 costs more for nothing."""
    costs, percents = [5, 3, 2, 1, 3, 9], [95, 94, 91, 92, 95, 96]
    assert frontier(costs, percents) == ([1, 3, 9], [92, 95, 96])
