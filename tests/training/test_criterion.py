"""The weighted sum of terms: weights, schedules, samples without a label, and teachers that are wrong."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from handler.errors import SettingsError
from training.adapters import adapters
from training.batches import Batch
from training.config import ObjectiveSettings, TermSettings
from training.criterion import Criterion, judged, named
from training.features import Output
from training.objectives import attention, dist, dkd, kd, similarity, standardize
from training.schedule import Schedule

KD = TermSettings(objective="kd")
LOG = [[math.log(share) for share in row] for row in ((0.7, 0.2, 0.1), (0.1, 0.3, 0.6), (0.25, 0.35, 0.4))]
TEACHER = torch.tensor(LOG)
"""Answers 0, 2 and 2, sure by 0.7, 0.6 and 0.4."""
LABELS = torch.tensor([0, 1, -1])
"""Of the three, the teacher is right about the first and wrong about the second; nobody knows the third."""


def batch(labels: Tensor, classes: int = 3) -> Batch:
    targets = torch.eye(classes)[labels.clamp(min=0)] * (labels >= 0)[:, None]
    return Batch(
        torch.zeros(len(labels), 1, 1, 1), labels, targets, torch.arange(len(labels)), torch.zeros(len(labels))
    )


def logits(seed: int, count: int = 3, classes: int = 3) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * 2


def found(
    z_s: Tensor, z_t: Tensor | None = TEACHER, labels: Tensor = LABELS, progress: float = 0.0, **settings: Any
) -> dict[str, Tensor]:
    teacher = None if z_t is None else Output(z_t)
    terms: dict[str, Tensor] = Criterion(ObjectiveSettings(**settings))(Output(z_s), teacher, batch(labels), progress)
    return terms


def each(z_s: Tensor, z_t: Tensor, temperature: float) -> list[float]:
    """kd of each sample alone."""
    return [kd(z_s[i : i + 1], z_t[i : i + 1], temperature).item() for i in range(len(z_s))]


# The sum


def test_the_loss_by_hand() -> None:
    # The student knows nothing: its cross-entropy is log 3. The teacher says 1/2, 1/4, 1/4, which are 3/2, 3/4 and
    # 3/4 of a third.
    z_t = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]])
    terms = (KD, TermSettings(objective="logit_regression", weight=3.0))
    values = found(torch.zeros(1, 3), z_t, torch.tensor([0]), temperature=1.0, alpha=0.75, terms=terms)
    soft = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    regression = ((2 / 3) ** 2 + 2 * (1 / 3) ** 2) * math.log(2) ** 2 / 2  # centred: 2/3, −1/3, −1/3 of log 2
    assert list(values) == ["loss", "hard", "kd", "logit_regression"]
    assert values["hard"].item() == pytest.approx(math.log(3))
    assert values["kd"].item() == pytest.approx(soft, rel=1e-5)
    assert values["logit_regression"].item() == pytest.approx(regression, rel=1e-5)
    assert values["loss"].item() == pytest.approx(0.25 * math.log(3) + 0.75 * soft + 3 * regression, rel=1e-5)


def test_without_a_teacher_there_is_the_cross_entropy_alone() -> None:
    values = found(logits(0), None, alpha=0.0, terms=())
    assert list(values) == ["loss", "hard"]
    assert torch.equal(values["loss"], values["hard"])


def test_smoothed_and_mixed_targets_count_by_their_shares() -> None:
    z_s = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]])
    whole = batch(torch.tensor([0]))
    mixed = Batch(whole.images, whole.labels, torch.tensor([[0.8, 0.2, 0.0]]), whole.index, whole.view)
    values = Criterion(ObjectiveSettings(alpha=0.0, terms=()))(Output(z_s), None, mixed, 0.0)
    assert values["hard"].item() == pytest.approx(0.8 * math.log(2) + 0.2 * math.log(4))


@given(progress=st.floats(0, 1))
def test_alpha_temperature_and_weight_follow_their_schedules(progress: float) -> None:
    alpha = Schedule(kind="linear", start=0.2, end=0.8)
    temperature = Schedule(kind="linear", start=5.0, end=1.0)
    own = Schedule(kind="linear", start=1.0, end=3.0)
    weight = Schedule(kind="step", start=0.0, end=2.0, begin=0.5)
    terms = (KD, TermSettings(objective="dist", weight=weight, temperature=own))
    z_s = logits(0)
    values = found(z_s, progress=progress, alpha=alpha, temperature=temperature, terms=terms)
    assert values["kd"].item() == pytest.approx(kd(z_s, TEACHER, 5 - 4 * progress).item(), rel=1e-5)
    assert values["dist"].item() == pytest.approx(dist(z_s, TEACHER, 1 + 2 * progress).item(), rel=1e-5)
    a, w = 0.2 + 0.6 * progress, 0.0 if progress < 0.5 else 2.0
    expected = (1 - a) * values["hard"] + a * values["kd"] + w * values["dist"]
    assert values["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_options_and_standardization_reach_the_objective() -> None:
    z_s, labels = logits(0), torch.tensor([0, 1, 2])
    terms = (
        TermSettings(objective="kd", standardize=True),
        TermSettings(objective="dkd", options={"target": 2.0, "others": 3.0}),
    )
    values = found(z_s, labels=labels, temperature=2.0, terms=terms)
    assert torch.equal(values["kd"], kd(standardize(z_s), standardize(TEACHER), 2.0))
    assert torch.equal(values["dkd"], dkd(z_s, TEACHER, labels, 2.0, target=2.0, others=3.0))


def test_a_term_that_comes_twice_is_numbered() -> None:
    terms = (KD, TermSettings(objective="dist"), TermSettings(objective="kd", temperature=1.0), KD)
    assert list(named(terms).items()) == [("kd", KD), ("dist", terms[1]), ("kd_2", terms[2]), ("kd_3", KD)]
    z_s = logits(0)
    values = found(z_s, temperature=4.0, terms=terms)
    assert torch.equal(values["kd_2"], kd(z_s, TEACHER, 1.0))
    assert torch.equal(values["kd_3"], kd(z_s, TEACHER, 4.0))


# Samples without a label


def test_an_unlabelled_sample_adds_nothing_to_the_cross_entropy_and_its_logits_are_left_alone_by_dkd() -> None:
    z_s = logits(0).requires_grad_()
    terms = (TermSettings(objective="dkd"), KD)
    values = found(z_s, temperature=2.0, terms=terms)
    log_p = z_s.log_softmax(1)
    assert values["hard"].item() == pytest.approx((-log_p[0, 0] - log_p[1, 1]).item() / 3)
    assert values["dkd"].item() == pytest.approx(2 / 3 * dkd(z_s[:2], TEACHER[:2], LABELS[:2], 2.0).item())
    assert values["kd"].item() == pytest.approx(sum(each(z_s, TEACHER, 2.0)) / 3)
    for name in ("hard", "dkd"):
        (gradient,) = torch.autograd.grad(values[name], z_s, retain_graph=True)
        assert gradient[:2].abs().min() > 0
        assert not gradient[2].any()


def test_dkd_leaves_out_who_is_dropped_as_well_as_who_has_no_label() -> None:
    z_s = logits(0)
    values = found(z_s, temperature=2.0, terms=(TermSettings(objective="dkd"),), wrong_teacher="drop")
    assert values["dkd"].item() == pytest.approx(dkd(z_s[:1], TEACHER[:1], LABELS[:1], 2.0).item() / 3, rel=1e-5)


def test_a_batch_of_unlabelled_samples_learns_from_the_teacher_alone() -> None:
    z_s = logits(0).requires_grad_()
    values = found(z_s, labels=torch.tensor([-1, -1, -1]), alpha=0.5, terms=(KD, TermSettings(objective="dkd")))
    assert values["hard"].item() == values["dkd"].item() == 0
    torch.testing.assert_close(values["loss"], 0.5 * values["kd"])
    (gradient,) = torch.autograd.grad(values["dkd"], z_s)
    assert not gradient.any()


# Teachers that are wrong


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"wrong_teacher": "drop"}, [True, False, True]),
        ({"confidence": 0.5}, [True, True, False]),
        ({"confidence": 0.65}, [True, False, False]),
        ({"confidence": 0.5, "wrong_teacher": "drop"}, [True, False, False]),
        ({"confidence": 0.5, "wrong_teacher": "swap"}, [True, True, False]),
    ],
    ids=str,
)
def test_who_is_left_out(settings: dict[str, Any], expected: list[bool] | None) -> None:
    _, kept = judged(Output(TEACHER), LABELS, ObjectiveSettings(**settings))
    assert (None if kept is None else kept.tolist()) == expected
    z_s, alone = logits(0).requires_grad_(), each(logits(0), TEACHER, 2.0)
    mask = expected or [True] * 3
    if settings.get("wrong_teacher") != "swap":
        values = found(z_s, temperature=2.0, **settings)
        mean = sum(value for value, stays in zip(alone, mask, strict=True) if stays) / 3
        assert values["kd"].item() == pytest.approx(mean, rel=1e-5)
        (gradient,) = torch.autograd.grad(values["kd"], z_s)
        assert gradient.any(dim=1).tolist() == mask


def test_swap_exchanges_the_answer_and_the_label_where_the_teacher_is_wrong() -> None:
    features = {"layer": torch.ones(3, 2)}
    teacher, _ = judged(Output(TEACHER, features), LABELS, ObjectiveSettings(wrong_teacher="swap"))
    first, second, third = LOG
    assert torch.equal(teacher.logits, torch.tensor([first, [second[0], second[2], second[1]], third]))
    assert teacher.features is features
    swapped = found(logits(0), wrong_teacher="swap", temperature=2.0)["kd"]
    assert swapped.item() == pytest.approx(sum(each(logits(0), teacher.logits, 2.0)) / 3, rel=1e-5)
    assert not torch.equal(swapped, found(logits(0), temperature=2.0)["kd"])


def test_samples_are_compared_with_those_that_are_kept() -> None:
    f_s, f_t = logits(1, 3, 4), logits(2, 3, 6)
    term = TermSettings(objective="similarity", layers={"a": "b"})
    criterion = Criterion(ObjectiveSettings(wrong_teacher="drop", terms=(term,)))
    values = criterion(Output(logits(0), {"a": f_s}), Output(TEACHER, {"b": f_t}), batch(LABELS), 0.0)
    torch.testing.assert_close(values["similarity"], 2 / 3 * similarity(f_s[[0, 2]], f_t[[0, 2]]))


# Terms that read features


def features(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"map": torch.randn(3, 2, 4, 4, generator=generator), "vector": torch.randn(3, 5, generator=generator)}


def test_the_pairs_of_a_term_add_up() -> None:
    inside, outside = features(0) | {"other": features(2)["map"]}, features(1)
    term = TermSettings(objective="attention", layers={"map": "map", "other": "map"})
    values = Criterion(ObjectiveSettings(terms=(term,)))(
        Output(logits(0), inside), Output(TEACHER, outside), batch(LABELS), 0.0
    )
    expected = sum(attention(inside[name], outside["map"]) for name in ("map", "other"))
    torch.testing.assert_close(values["attention"], expected)


def hinted(kind: Any, labels: Tensor, **settings: Any) -> tuple[Criterion, dict[str, Tensor], dict[str, Tensor]]:
    """A hint at a map and a vector: the criterion, the student's features, the values."""
    terms = (TermSettings(objective="hint", adapter=kind, layers={"map": "map", "vector": "vector"}),)
    inside = {name: feature.requires_grad_() for name, feature in features(0).items()}
    criterion = Criterion(ObjectiveSettings(terms=terms, **settings), adapters(terms, inside, features(1)))
    student, teacher = Output(logits(0), inside), Output(TEACHER, features(1))
    return criterion, inside, criterion(student, teacher, batch(labels), 0.0)


@pytest.mark.parametrize("kind", ["convolution", "orthogonal"])
def test_a_hint_is_the_mean_square_behind_its_adapters(kind: str) -> None:
    criterion, inside, values = hinted(kind, LABELS)
    total = 0.0
    for name, theirs in features(1).items():
        ours, theirs = criterion.adapters[f"{name}|{name}"](inside[name], theirs)
        total += (ours - theirs).square().mean().item()
    assert values["hint"].item() == pytest.approx(total, rel=1e-5)


def test_a_sample_that_is_left_out_of_a_hint_has_no_gradient() -> None:
    _, inside, values = hinted("orthogonal", LABELS, wrong_teacher="drop")
    for gradient in torch.autograd.grad(values["hint"], list(inside.values())):
        assert gradient.flatten(1).any(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["convolution", "orthogonal"])
def test_no_sample_that_is_kept_is_a_zero_with_zero_gradients(kind: str) -> None:
    """Zeros, not nothing: several processes wait for each other's gradients of every parameter."""
    criterion, inside, values = hinted(kind, torch.tensor([1, 1, 1]), wrong_teacher="drop")
    assert values["hint"].item() == 0
    values["hint"].backward()  # type: ignore[no-untyped-call]
    for x in [*inside.values(), *criterion.parameters()]:
        assert x.grad is not None
        assert not x.grad.any()
    z_s = logits(0).requires_grad_()
    soft = found(z_s, labels=torch.tensor([1, 1, 1]), wrong_teacher="drop")["kd"]
    assert soft.item() == 0
    assert not torch.autograd.grad(soft, z_s)[0].any()


def test_one_sample_that_is_kept_is_enough() -> None:
    """The adapter's BatchNorm needs two, and has the whole batch."""
    _, _, values = hinted("convolution", torch.tensor([0, 1, 1]), wrong_teacher="drop")
    assert values["hint"].isfinite()
    assert values["hint"].item() > 0


# Refusals


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ({"objective": "kdd"}, "unknown objective 'kdd': did you mean '(d)?kd'"),
        ({"objective": "hints", "layers": {"a": "b"}}, "unknown objective 'hints': did you mean 'hint'"),
        ({"objective": "dkd", "options": {"other": 1.0}}, "unknown option of dkd 'other': did you mean 'others'"),
        (
            {"objective": "dkd", "options": {"labels": 1.0}},
            "unknown option of dkd 'labels': expected one of others, ta",
        ),
        ({"objective": "dist", "options": {"temperature": 1.0}}, "unknown option of dist 'temperature': "),
        ({"objective": "kd", "options": {"t": 1.0}}, "objective kd: expected no options, got t$"),
        ({"objective": "hint"}, r"objective hint: expected layers \{student: teacher\} to compare$"),
        ({"objective": "kd", "layers": {"a": "b"}}, "objective kd: expected no layers: it reads logits$"),
        (
            {"objective": "attention", "layers": {"a": "b"}, "standardize": True},
            "objective attention: expected standardize=false: it reads no logits$",
        ),
    ],
    ids=str,
)
def test_a_term_that_cannot_be_is_one_line(term: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=f"^{text}") as error:
        Criterion(ObjectiveSettings(terms=(KD, TermSettings(**term))))
    assert "\n" not in str(error.value)
