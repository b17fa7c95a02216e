"""Logits → what is said of them: the probabilities and classes of one forward, and what options add to a head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from handler import codecs
from handler.codecs import answer
from handler.contract import Contract, probabilities
from handler.options import Options

if TYPE_CHECKING:  # it loads torch
    from handler.inside import Inside


class Scores:
    """What one forward says of its images, a row each; `sound` where the logits are finite."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.logits, self.sound = logits, [True] * len(logits)
        finite = np.isfinite(logits)
        if not finite.all():
            rows: NDArray[np.bool_] = np.asarray(finite.all(axis=1))
            self.sound, logits = rows.tolist(), np.where(rows[:, np.newaxis], logits, 0)
        self.scores = probabilities(logits)
        self.rows: list[list[float]] = self.scores.round(answer.DIGITS).tolist()
        self.ids: list[int] = self.scores.argmax(axis=1).tolist()

    def told(self, labels: Sequence[str]) -> list[tuple[str, float]]:
        """The class of each sound image, and its probability."""
        return [(labels[k], row[k]) for k, row, sound in zip(self.ids, self.rows, self.sound, strict=True) if sound]


def shaped(
    item: codecs.Item, options: Options, scores: Scores, part: slice, contract: Contract, inside: "Inside"
) -> bytes:
    """The head of an answer with options; its images are the `part` of the forward."""
    form, rows, ids, labels = item.form, scores.rows[part], scores.ids[part], contract.labels
    images, found = codecs.stacked([item], contract), dict[str, Any]()
    if options.top_k:
        best = np.argsort(-scores.scores[part], axis=1, kind="stable")[:, : options.top_k].tolist()
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
    return answer.head(form, rows, ids, labels) + answer.more(found)
