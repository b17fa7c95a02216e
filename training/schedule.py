"""Schedules: functions of training progress in 0..1 (0 before the first step, 1 after the last).

A weight, α or temperature of an experiment is a number, or a schedule written as a mapping:

    temperature: {kind: linear, start: 5, end: 1}
    alpha: {kind: warmup, end: 0.9, finish: 0.2}
    weight: {kind: step, start: 0, end: 1, begin: 0.33}
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """From `start` to `end` while progress goes from `begin` to `finish`; constant before and after.

    linear: along a line; cosine: along half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5);
    warmup: linear, from 0 where `start` is not given; step: at once, at `begin`.
    """

    kind: Literal["linear", "cosine", "warmup", "step"]
    start: float = 0.0
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __call__(self, progress: float) -> float:
        """The value at `progress`, 0..1."""
        if self.kind == "step":
            return self.start if progress < self.begin else self.end
        share = min(max((progress - self.begin) / (self.finish - self.begin), 0.0), 1.0)
        if self.kind == "cosine":
            share = 0.5 * (1 - math.cos(math.pi * share))
        return self.start + (self.end - self.start) * share


Value = float | Schedule
"""A number, or how it changes while training."""


def at(value: Value, progress: float) -> float:
    """The number that `value` is at `progress`."""
    return value(progress) if isinstance(value, Schedule) else value


def extremes(value: Value) -> tuple[float, float]:
    """The smallest and the largest number that `value` ever is."""
    ends = (value.start, value.end) if isinstance(value, Schedule) else (value, value)
    return min(ends), max(ends)


def one_cycle(progress: float, warmup: float) -> float:
    """The learning rate's share of its peak: linear up during `warmup`, then a half cosine down to 0.

    Smith and Topin 2017, arXiv:1708.07120 (the cycle);
    Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5 (the cosine).
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
