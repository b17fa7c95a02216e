"""How sure a mean over seeds is: standard deviation and t-intervals, of values and of paired differences."""

import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student_t  # type: ignore[import-untyped]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n − 1) and 95 % interval of the mean; the last two are None for a single value.

    mean ± t_{0.975, n−1} · sd / √n (Student 1908, Biometrika 6:1).
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return {"mean": mean, "sd": None, "interval_95": None}
    sd = statistics.stdev(values)
    half = float(student_t.ppf(0.975, count - 1)) * sd / count**0.5
    return {"mean": mean, "sd": sd, "interval_95": [mean - half, mean + half]}


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The summary of `values` − `others`, pair by pair: what varies alike from seed to seed cancels out.

    Raises ValueError when there are more of one than of the other.
    """
    return summary([value - other for value, other in zip(values, others, strict=True)])
