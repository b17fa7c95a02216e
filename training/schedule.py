"""Schedules: functions of training progress in 0..1 (0 before the first step, 1 after the last)."""

import math


def one_cycle(progress: float, warmup: float) -> float:
    """The learning rate's share of its peak: linear up during `warmup`, then a half cosine down to 0.

    Smith and Topin 2017, arXiv:1708.07120 (the cycle);
    Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5 (the cosine).
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
