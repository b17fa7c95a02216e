"""Logits → what is said of them: the probabilities and classes of one forward, and what options add to a head."""

import logging
from collections.abc import Sequence
from functools import partial
from math import exp, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from handler import codecs
from handler.codecs import answer
from handler.contract import Contract, probabilities
from handler.options import NONE
from handler.work import Work, each

if TYPE_CHECKING:  # it loads torch
    from handler.inside import Inside

log = logging.getLogger(__name__)
FEW = 64  # logits: Python is through with them before NumPy's first calls are, whose code is no longer in the cache
UNIT = 10.0**answer.DIGITS


class Scores:
    """What one forward says of its images, a row each; `sound` where the logits are finite, and only there."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.logits = logits
        self.sound: list[bool] = []
        self.rows: list[list[float]] = []
        self.ids: list[int] = []
        if logits.size <= FEW:
            for row in logits.tolist():
                self._add(row)
        else:
            finite: NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(axis=1))
            self.sound = finite.tolist()
            self.rows = probabilities(np.where(finite[:, np.newaxis], logits, 0)).round(answer.DIGITS).tolist()
            self.ids = logits.argmax(axis=1).tolist()

    def _add(self, logits: list[float]) -> None:
        """One more image; as `probabilities` and its rounding."""
        top = max(logits)
        powers = [exp(logit - top) for logit in logits]
        total = sum(powers)
        sound = isfinite(sum(logits))  # float32 cannot overflow the sum
        self.sound.append(sound)
        self.rows.append([round(power / total * UNIT) / UNIT for power in powers] if sound else [])
        self.ids.append(logits.index(top))

    def told(self, labels: Sequence[str]) -> list[tuple[str, float]]:
        """The class of each sound image, and its probability."""
        return [(labels[k], row[k]) for k, row, sound in zip(self.ids, self.rows, self.sound, strict=True) if sound]


def head_each(batch: Sequence[Work], scores: Scores, contract: Contract, inside: "Inside") -> None:
    """Give each its head; what the model has no finite logits for gets none, and the log says so."""
    start = 0
    for work in batch:
        end = start + work.item.count
        if not all(scores.sound[start:end]):
            log.error("request %s: the model's logits are not finite", work.request.request_id)
        elif work.item.options:
            each(partial(_shape, scores, slice(start, end), contract, inside), [work])
        else:
            rows, ids = scores.rows[start:end], scores.ids[start:end]
            work.head = answer.head(work.item.form, rows, ids, contract.labels)
        start = end


def _shape(scores: Scores, part: slice, contract: Contract, inside: "Inside", work: Work) -> None:
    """A head with options; its images are the `part` of the forward."""
    item, options = work.item, work.item.options or NONE
    form, rows, ids, labels = item.form, scores.rows[part], scores.ids[part], contract.labels
    images, found = codecs.stacked([item], contract), dict[str, Any]()
    if options.top_k:
        best = np.argsort(-scores.logits[part], axis=1, kind="stable")[:, : options.top_k].tolist()
        found["top_k"] = [
            [{"label": labels[k], "class_id": k, "probability": row[k]} for k in order]
            for row, order in zip(rows, best, strict=True)
        ]
    if options.logits:
        found["logits"] = np.ascontiguousarray(scores.logits[part])
    if options.features:
        found["features"] = inside.features(images)
    if options.explanation:
        slopes = inside.saliency(images, ids).astype(np.float64).round(6)  # float32 knows no more digits
        form, rows = form.replace("prediction", "explanation"), slopes.tolist()
    work.head = answer.head(form, rows, ids, labels) + answer.more(found)
