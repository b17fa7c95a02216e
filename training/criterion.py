"""The objective of an experiment as one module: (1 − α)·cross-entropy + Σ weight·term, weights on a schedule."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.errors import SettingsError, unknown
from training.adapters import pair_name
from training.batches import Batch
from training.config import ObjectiveSettings, TermSettings
from training.features import Output
from training.objectives import find, standardize
from training.schedule import at


class Criterion(nn.Module):
    """The weighted sum. Adapters are its only parameters: they are trained with the student and left behind.

    Raises SettingsError for an unknown objective, or one that lacks the layers or labels that it needs.
    """

    def __init__(self, settings: ObjectiveSettings, adapters: nn.ModuleDict | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.terms = named(settings.terms)
        self.adapters = adapters if adapters is not None else nn.ModuleDict()

    def forward(self, student: Output, teacher: Output | None, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The terms, unweighted, by name, `hard` being the cross-entropy; `loss` is the sum to minimise.

        The cross-entropy is a mean over the batch, to which an unlabelled sample adds nothing. `teacher` may be
        None when there are no terms. `progress` is that of training, 0..1.
        """
        hard = F.cross_entropy(student.logits, batch.targets)
        found = {"hard": hard}
        alpha = at(self.settings.alpha, progress)
        loss = (1 - alpha) * hard
        if teacher is not None:
            teacher, kept = judged(teacher, batch.labels, self.settings)
            for name, term in self.terms.items():
                found[name] = self._term(term, student, teacher, batch.labels, kept, progress)
                loss = loss + (alpha if term.weight is None else at(term.weight, progress)) * found[name]
        return {"loss": loss, **found}

    def _term(
        self, term: TermSettings, student: Output, teacher: Output, labels: Tensor, kept: Tensor | None, progress: float
    ) -> Tensor:
        """The term over the samples that are kept, times their share: a sample left out adds nothing to the mean.

        Adapters see the whole batch: their BatchNorm needs more than the one sample that may be left, and other
        processes wait for their gradients.
        """
        objective = find(term.objective)
        pairs = self._pairs(term, student, teacher) if objective.reads_features else [_logits(term, student, teacher)]
        if "labels" in objective.arguments and bool((labels < 0).any()):
            kept = labels >= 0 if kept is None else kept & (labels >= 0)
        share: Tensor | float = 1.0
        if kept is not None:
            if not kept.any():
                return sum((ours.sum() * 0 for ours, _ in pairs), torch.zeros(()))
            share, labels = kept.float().mean(), labels[kept]
            pairs = [(ours[kept], theirs[kept]) for ours, theirs in pairs]
        temperature = self.settings.temperature if term.temperature is None else term.temperature
        known = {"labels": labels, "temperature": at(temperature, progress)}
        given = {name: value for name, value in known.items() if name in objective.arguments}
        return share * sum((objective.function(*pair, **given, **term.options) for pair in pairs), torch.zeros(()))

    def _pairs(self, term: TermSettings, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """The features that the term compares, through their adapter where it has one."""
        pairs = []
        for path_s, path_t in term.layers.items():
            f_s, f_t = student.features[path_s], teacher.features[path_t]
            name = pair_name(path_s, path_t)
            pairs.append(self.adapters[name](f_s, f_t) if term.objective == "hint" else (f_s, f_t))
        return pairs


def named(terms: tuple[TermSettings, ...]) -> dict[str, TermSettings]:
    """The terms by the names under which they are logged; one that comes twice is numbered. Unfit ones are refused."""
    found: dict[str, TermSettings] = {}
    for term in terms:
        objective, name = find(term.objective), term.objective
        if objective.reads_features != bool(term.layers):
            expected = (
                "layers {student: teacher} to compare" if objective.reads_features else "no layers: it reads logits"
            )
            raise SettingsError(f"objective {name}: expected {expected}")
        if objective.reads_features and term.standardize:
            raise SettingsError(f"objective {name}: expected standardize=false: it reads no logits")
        known = [option for option in objective.arguments if option not in ("labels", "temperature")]
        if term.options and not known:
            raise SettingsError(f"objective {name}: expected no options, got {', '.join(term.options)}")
        for option in term.options:
            if option not in known:
                raise SettingsError(unknown(f"option of {name}", option, known))
        same = sum(other.objective == name for other in found.values())
        found[f"{name}_{same + 1}" if same else name] = term
    return found


def judged(teacher: Output, labels: Tensor, settings: ObjectiveSettings) -> tuple[Output, Tensor | None]:
    """The teacher's output under the wrong-teacher rule, and which samples the terms may see (None: all), bool `[B]`.

    `swap` exchanges the logits of the teacher's answer and of the label (Wen, Lai and Qian 2021,
    arXiv:1911.07471, "probability shift"). Without a label (−1) nobody is wrong.
    """
    z_t, kept = teacher.logits, None
    answer = z_t.argmax(1)
    wrong = (answer != labels) & (labels >= 0)
    if settings.wrong_teacher == "drop":
        kept = ~wrong
    if settings.wrong_teacher == "swap":
        pair = torch.stack([answer, labels.clamp(min=0)], dim=1)
        swapped = z_t.scatter(1, pair, z_t.gather(1, pair.flip(1)))
        teacher = Output(torch.where(wrong[:, None], swapped, z_t), teacher.features)
    if settings.confidence > 0:
        sure = F.softmax(z_t, dim=1).amax(1) >= settings.confidence
        kept = sure if kept is None else kept & sure
    return teacher, kept


def _logits(term: TermSettings, student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
    if term.standardize:
        return standardize(student.logits), standardize(teacher.logits)
    return student.logits, teacher.logits
