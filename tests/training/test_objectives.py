"""Objectives against cases worked out by hand, torch.distributions, finite differences, and laws of their papers."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from handler.errors import SettingsError
from training import objectives
from training.objectives import (
    OBJECTIVES,
    attention,
    dist,
    dkd,
    find,
    hint,
    kd,
    logit_regression,
    relational,
    similarity,
    standardize,
)

Pair = Callable[[Tensor, Tensor], Tensor]

# dkd's labels are read off the teacher (its third choice), so that they belong to their sample wherever it stands.
LOGITS: dict[str, Pair] = {
    "kd": partial(kd, temperature=2.0),
    "dkd": lambda z_s, z_t: dkd(z_s, z_t, z_t.argsort(1)[:, 2], 2.0),
    "dist": partial(dist, temperature=2.0),
    "logit_regression": logit_regression,
    "standardized kd": lambda z_s, z_t: kd(standardize(z_s), standardize(z_t), 2.0),
}
FEATURES: dict[str, Pair] = {f.__name__: f for f in (hint, attention, similarity, relational)}
ALL = {**LOGITS, **FEATURES}
every = pytest.mark.parametrize("name", ALL)
seeds = st.integers(0, 10_000)


def shape(name: str, batch: int) -> tuple[int, ...]:
    return (batch, 5) if name in LOGITS else (batch, 3, 2, 2)


def normal(seed: int, *size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(function: Pair, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(function(student, teacher), student)[0]


# By hand


def test_kd_by_hand() -> None:
    z_t, z_s = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)  # softmax: 3/4, 1/4 and 1/2, 1/2
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kd(z_s, z_t, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # the same shares at T = 2, the factor T² = 4, and a second sample of which both say the same
    z_t, z_s = torch.tensor([[2 * math.log(3.0), 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert kd(z_s, z_t, 2.0).item() == pytest.approx(4 * expected / 2, rel=1e-6)


def test_dkd_by_hand() -> None:
    # The teacher says 6/10, 3/10, 1/10, the student thirds; the label is class 0. Then the label against the rest
    # is (6/10, 4/10) against (1/3, 2/3), and the others among themselves (3/4, 1/4) against (1/2, 1/2).
    split = 0.6 * math.log(0.6 * 3) + 0.4 * math.log(0.4 * 3 / 2)
    others = 0.75 * math.log(0.75 * 2) + 0.25 * math.log(0.25 * 2)
    z_t, z_s, label = torch.tensor([[6.0, 3.0, 1.0]]).log(), torch.zeros(1, 3), torch.tensor([0])
    assert dkd(z_s, z_t, label, 1.0).item() == pytest.approx(split + 8 * others, rel=1e-6)
    # at T = 2, with logits twice as large, times T²; the second sample, of label 2, is imitated perfectly
    z_t, z_s = torch.cat([2 * z_t, z_t]), torch.cat([z_s, z_t])
    found = dkd(z_s, z_t, torch.tensor([0, 2]), 2.0, target=3.0, others=5.0)
    assert found.item() == pytest.approx(4 * (3 * split + 5 * others) / 2, rel=1e-6)


def test_dist_by_hand() -> None:
    p_s = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    p_t = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]])
    # Rows less their mean of 1/3, up to scale: (5, −1, −4) and (−4, −1, 5): ρ = −39/42; (−1, −1, 2) and (2, −1, −1):
    # ρ = −3/6. Columns of two values rise or fall: ρ is −1 (fall, rise), 1 (fall, fall), −1 (rise, fall).
    inter, intra = ((1 + 39 / 42) + (1 + 3 / 6)) / 2, (2 + 0 + 2) / 3
    assert dist(p_s.log(), p_t.log(), 1.0).item() == pytest.approx(inter + intra, rel=1e-5)
    found = dist(2 * p_s.log(), 2 * p_t.log(), 2.0, inter=2.0, intra=3.0)  # the same shares, times T²
    assert found.item() == pytest.approx(4 * (2 * inter + 3 * intra), rel=1e-5)


def test_logit_regression_by_hand() -> None:
    z_s, z_t = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]), torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert logit_regression(z_s, z_t).item() == ((4 + 1 + 9) / 2 + 0) / 2  # less the mean of 3: −2, −1, 3
    assert logit_regression(z_s, z_t, center=0.0).item() == ((1 + 4 + 36) / 2 + 3 * 16 / 2) / 2
    assert logit_regression(torch.tensor([[3.0]]), torch.tensor([[1.0]])).item() == 2**2 / 2  # one output: a value


def test_hint_by_hand() -> None:
    f_s, f_t = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert hint(f_s, f_t).item() == (0 + 4 + 9 + 16) / 4


def test_attention_by_hand() -> None:
    f_s = torch.tensor([[1.0, 2.0], [math.sqrt(2), 0.0]]).view(1, 2, 1, 2)  # Q = (1 + 2, 4 + 0), of length 5
    f_t = torch.tensor([0.0, -2.0]).view(1, 1, 1, 2)  # Q = (0, 4), of length 4
    assert attention(f_s, f_t).item() == pytest.approx((3 / 5 - 0) ** 2 + (4 / 5 - 1) ** 2)
    # on a grid of 1×4 the teacher's Q is (2, 0, 4, 4), pooled to (1, 4); of the features 2 and −2 nothing would be left
    f_t = torch.tensor([math.sqrt(2), 0.0, 2.0, -2.0]).view(1, 1, 1, 4)
    expected = (3 / 5 - 1 / math.sqrt(17)) ** 2 + (4 / 5 - 4 / math.sqrt(17)) ** 2
    assert attention(f_s, f_t).item() == pytest.approx(expected, rel=1e-5)
    assert attention(f_t, f_s).item() == pytest.approx(expected, rel=1e-5)


def test_similarity_by_hand() -> None:
    f_s, f_t = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.eye(2)
    # Rows of A·Aᵀ made as long as 1: all 1/√2 for the student, the unit matrix for the teacher.
    row = (1 / math.sqrt(2) - 1) ** 2 + 1 / 2
    assert similarity(f_s, f_t).item() == pytest.approx(2 * row / 2)


def test_relational_by_hand() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0]])
    # Distances over the three pairs, divided by their mean over all nine (8/9): 9/8, 18/8, 9/8.
    # Points 0, 1, 3: distances 1, 3, 2, mean 12/9: 6/8, 18/8, 12/8. Small differences count half their square.
    other = torch.tensor([[0.0], [1.0], [3.0]])
    assert relational(line, other).item() == pytest.approx(2 * (2 * (3 / 8) ** 2 / 2) / 9)
    # Points 0, 1, 1: distances 1, 1, 0, mean 4/9: 18/8, 18/8, 0. Above 1 a difference counts less a half.
    other = torch.tensor([[0.0], [1.0], [1.0]])
    assert relational(line, other).item() == pytest.approx(2 * (2 * (9 / 8 - 1 / 2)) / 9)


def test_standardize_by_hand() -> None:
    # mean 2, mean square deviation 2/3; equal logits say nothing
    found = standardize(torch.tensor([[1.0, 2.0, 3.0], [7.0, 7.0, 7.0]]))
    torch.testing.assert_close(found, torch.tensor([[-math.sqrt(1.5), 0.0, math.sqrt(1.5)], [0.0, 0.0, 0.0]]))


# Against torch.distributions and finite differences


@settings(max_examples=50)
@given(seed=seeds, temperature=st.floats(0.5, 20))
def test_kd_equals_torch_distributions(seed: int, temperature: float) -> None:
    def reference(z_s: Tensor, z_t: Tensor) -> Tensor:
        p_s, p_t = Categorical(logits=z_s / temperature), Categorical(logits=z_t / temperature)
        return temperature**2 * kl_divergence(p_t, p_s).mean()

    z_s, z_t, ours = normal(seed, 6, 5), normal(seed + 1, 6, 5), partial(kd, temperature=temperature)
    torch.testing.assert_close(ours(z_s, z_t), reference(z_s, z_t))
    torch.testing.assert_close(gradient(ours, z_s, z_t), gradient(reference, z_s, z_t))


@settings(max_examples=20)
@given(seed=seeds, temperature=st.floats(0.5, 20), target=st.floats(0, 5), others=st.floats(0, 10))
def test_dkd_equals_torch_distributions(seed: int, temperature: float, target: float, others: float) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])

    def reference(z_s: Tensor, z_t: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for s, t, y in zip(z_s / temperature, z_t / temperature, labels.tolist(), strict=True):
            rest = [k for k in range(5) if k != y]
            p_s, p_t = s.softmax(0)[y], t.softmax(0)[y]
            split_s, split_t = (Categorical(probs=torch.stack([p, 1 - p])) for p in (p_s, p_t))
            rest_s, rest_t = Categorical(logits=s[rest]), Categorical(logits=t[rest])
            total = total + target * kl_divergence(split_t, split_s) + others * kl_divergence(rest_t, rest_s)
        return temperature**2 * total / 6

    def ours(z_s: Tensor, z_t: Tensor) -> Tensor:
        return dkd(z_s, z_t, labels, temperature, target, others)

    z_s, z_t = normal(seed, 6, 5), normal(seed + 1, 6, 5)
    torch.testing.assert_close(ours(z_s, z_t), reference(z_s, z_t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(ours, z_s, z_t), gradient(reference, z_s, z_t), rtol=1e-5, atol=1e-6)


@every
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    size = shape(name, 4)
    assert torch.autograd.gradcheck(ALL[name], (normal(0, *size).requires_grad_(), normal(1, *size)))


def test_the_gradient_of_kd_tends_to_the_difference_of_centred_logits() -> None:
    """Hinton et al. 2015, eq. 4: as T grows, K · dkd/dz_s → (z̄_s − z̄_t) / B; 1/K of the regression's."""
    z_s, z_t = normal(0, 6, 5), normal(1, 6, 5)
    limit = ((z_s - z_s.mean(1, keepdim=True)) - (z_t - z_t.mean(1, keepdim=True))) / 6
    torch.testing.assert_close(gradient(logit_regression, z_s, z_t), limit)
    for temperature, tolerance in ((1e3, 1e-2), (1e5, 1e-4)):
        found = 5 * gradient(partial(kd, temperature=temperature), z_s, z_t)
        torch.testing.assert_close(found, limit, rtol=0, atol=tolerance)


@settings(max_examples=50)
@given(seed=seeds, temperature=st.floats(0.5, 20))
def test_dkd_is_kd_when_its_parts_are_weighed_as_there(seed: int, temperature: float) -> None:
    """Zhao et al. 2022, eq. 6: KD = TCKD + (1 − p_t,y) · NCKD, for one sample."""
    z_s, z_t, label = normal(seed, 1, 5), normal(seed + 1, 1, 5), torch.tensor([seed % 5])
    others = 1 - (z_t / temperature).softmax(1)[0, seed % 5].item()
    torch.testing.assert_close(dkd(z_s, z_t, label, temperature, others=others), kd(z_s, z_t, temperature))


# Laws that all share


def test_every_objective_is_among_these() -> None:
    """A new one is held against all that follows as soon as it is in one of the tables above."""
    assert {name for name, objective in OBJECTIVES.items() if objective.reads_features} == set(FEATURES)
    assert {name for name, objective in OBJECTIVES.items() if not objective.reads_features} == set(LOGITS) - {
        "standardized kd"
    }


@every
@pytest.mark.parametrize("batch", [1, 6])
def test_zero_with_no_gradient_when_the_student_is_the_teacher(name: str, batch: int) -> None:
    x = normal(0, *shape(name, batch))
    assert ALL[name](x, x).item() == pytest.approx(0, abs=1e-12)
    assert gradient(ALL[name], x, x).abs().max().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("size", [20.0, 80.0, 1e4])
def test_zero_when_both_are_as_sure_of_the_same(name: str, size: float) -> None:
    """Probabilities of a saturated teacher are so small that their squares vanish, or 0 for a whole class."""
    z = size * torch.eye(5)[[0, 1, 2, 2]] + normal(0, 4, 5, dtype=torch.float32)
    assert LOGITS[name](z, z).item() == pytest.approx(0, abs=1e-5)


@every
@settings(max_examples=25)
@given(seed=seeds, batch=st.integers(1, 5), scale=st.floats(1e-2, 20), like=st.floats(0, 1))
def test_never_negative(name: str, seed: int, batch: int, scale: float, like: float) -> None:
    teacher, noise = (scale * normal(seed + i, *shape(name, batch), dtype=torch.float32) for i in (0, 1))
    value = ALL[name](like * teacher + (1 - like) * noise, teacher).item()
    assert value >= -1e-5
    if like < 0.9 and batch > 2 and 0.1 < scale < 1:
        assert value > 1e-6


@every
def test_the_same_when_the_batch_is_given_twice_over(name: str) -> None:
    a, b = normal(0, *shape(name, 4)), normal(1, *shape(name, 4))
    torch.testing.assert_close(ALL[name](torch.cat([a, a]), torch.cat([b, b])), ALL[name](a, b))


def extremes(name: str, batch: int) -> dict[str, Tensor]:
    """What training should survive: saturated at one place or everywhere, and nothing said at all."""
    size = shape(name, batch)
    signs = torch.where(normal(3, *size) > 0, 80.0, -80.0)
    one = torch.full(size, -80.0)
    one.view(batch, -1)[:, 0] = 80.0
    return {"signs": signs, "opposite": -signs, "one": one, "zero": torch.zeros(size), "usual": normal(4, *size)}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_finite_at_extremes(name: str, dtype: torch.dtype, batch: int) -> None:
    known = {key: x.to(dtype) for key, x in extremes(name, batch).items()}
    for key_s, student in known.items():
        for key_t, teacher in known.items():
            value = ALL[name](student, teacher)
            assert value.dtype == torch.float32
            assert value.isfinite(), (key_s, key_t)
            assert value >= -1e-5, (key_s, key_t)
            assert gradient(ALL[name], student, teacher).isfinite().all(), (key_s, key_t)


@pytest.mark.parametrize("name", LOGITS)
@settings(max_examples=50)
@given(seed=seeds, temperature=st.floats(0.3, 5), size=st.floats(1, 200))
def test_a_finite_gradient_whatever_the_logits(name: str, seed: int, temperature: float, size: float) -> None:
    """Among them probabilities below the smallest normal number of float32, and classes that nobody thinks of."""
    z_s, z_t = (size / temperature * normal(seed + i, 3, 5, dtype=torch.float32) for i in (0, 1))
    assert gradient(LOGITS[name], z_s, z_t).isfinite().all()


@pytest.mark.parametrize("gap", range(60, 110, 2))
def test_a_class_that_nobody_thinks_of_has_a_finite_gradient(gap: int) -> None:
    """In float32 e^−88 is the smallest normal number, e^−104 is 0: what divides by them is not finite."""
    z_s, z_t = (normal(seed, 4, 5, dtype=torch.float32) for seed in (0, 1))
    z_s[:, 0] -= gap
    for temperature in (1.0, 8.0):
        found = gradient(partial(dist, temperature=temperature), temperature * z_s, temperature * z_t)
        assert found.isfinite().all()
        assert found[:, 1:].abs().min() > 0


@pytest.mark.parametrize("classes", [3, 7, 10])
@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-7])
def test_dist_takes_no_rounding_for_a_relation(classes: int, noise: float) -> None:
    """Like the logits of a network whose last layer begins at zero."""
    z_s = noise * normal(0, 4, classes, dtype=torch.float32)
    assert not gradient(partial(dist, temperature=1.0), z_s, normal(1, 4, classes, dtype=torch.float32)).any()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computed_in_float32_whatever_it_is_given(name: str, dtype: torch.dtype) -> None:
    a, b = (normal(seed, *shape(name, 4)).to(dtype) for seed in (0, 1))
    assert torch.equal(ALL[name](a, b), ALL[name](a.float(), b.float()))


# Invariances


@settings(max_examples=50)
@given(seed=seeds, scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_standardize_forgets_scale_and_shift_of_each_sample(seed: int, scale: float, shift: float) -> None:
    """Sun et al. 2024, section 4.2: what is left are the logits' relations."""
    z = normal(seed, 3, 5)
    scales, shifts = torch.tensor([[1.0], [scale], [2.0]]), torch.tensor([[0.0], [shift], [-1.0]])
    torch.testing.assert_close(standardize(scales * z + shifts), standardize(z), rtol=1e-5, atol=1e-5)


@settings(max_examples=50)
@given(seed=seeds, parts=st.lists(st.floats(0.05, 1), min_size=4, max_size=4))
def test_dist_does_not_see_scale_and_shift_of_probabilities(seed: int, parts: list[float]) -> None:
    """Huang et al. 2022, eq. 5: a·p + b with a > 0 is as good as p. Both are distributions where b = (1 − a) / K
    (then a may differ between samples), or where q takes the rest, the same in all (then it may between classes)."""
    p_s, p_t = normal(seed, 4, 5).softmax(1), normal(seed + 1, 4, 5).softmax(1)
    a = torch.tensor(parts, dtype=torch.float64)[:, None]
    inter = partial(dist, temperature=1.0, intra=0.0)
    torch.testing.assert_close(inter((a * p_s + (1 - a) / 5).log(), p_t.log()), inter(p_s.log(), p_t.log()))
    assert inter((a * p_t + (1 - a) / 5).log(), p_t.log()).item() == pytest.approx(0, abs=1e-9)
    q = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.2]])
    intra = partial(dist, temperature=1.0, inter=0.0)
    moved = (parts[0] * p_s + (1 - parts[0]) * q).log()
    torch.testing.assert_close(intra(moved, p_t.log()), intra(p_s.log(), p_t.log()), rtol=1e-6, atol=1e-6)


def test_attention_does_not_see_the_scale_of_a_sample_nor_the_order_of_channels() -> None:
    f_s, f_t = normal(0, 4, 3, 2, 2), normal(1, 4, 6, 2, 2)
    scale = torch.tensor([0.1, 1.0, 3.0, 50.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(attention(scale * f_s[:, [2, 0, 1]], f_t), attention(f_s, f_t))


@pytest.mark.parametrize("name", ["similarity", "relational"])
def test_relations_of_samples_do_not_see_scale_and_rotation(name: str) -> None:
    f_s, f_t = normal(0, 4, 3, 2, 2), normal(1, 4, 7)
    rotation, _ = torch.linalg.qr(normal(2, 12, 12))
    rotated = 7 * f_s.flatten(1) @ rotation
    torch.testing.assert_close(FEATURES[name](rotated, f_t), FEATURES[name](f_s, f_t))


def test_relational_does_not_see_a_shift() -> None:
    f_s, f_t = normal(0, 4, 6), normal(1, 4, 7)
    torch.testing.assert_close(relational(f_s + 5, f_t), relational(f_s, f_t))


@settings(max_examples=30)
@given(seed=seeds, shift=st.floats(-50, 50))
def test_a_shift_of_all_logits_of_a_sample_changes_nothing(seed: int, shift: float) -> None:
    z_s, z_t = normal(seed, 3, 5), normal(seed + 1, 3, 5)
    moved = z_s + torch.tensor([[shift], [0.0], [-shift]])
    for name, objective in LOGITS.items():
        torch.testing.assert_close(objective(moved, z_t), objective(z_s, z_t), msg=name)


# Refusals


def test_dkd_refuses_two_classes() -> None:
    with pytest.raises(SettingsError, match=r"^dkd: expected at least 3 classes, got 2; with two, use kd$"):
        dkd(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), 1.0)
    assert dkd(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), 1.0).item() == 0


@pytest.mark.parametrize("sizes", [((2, 8), (2, 8)), ((2, 5, 8), (2, 5, 8)), ((2, 3, 4, 4), (2, 8))], ids=str)
def test_attention_refuses_what_has_no_grid(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(SettingsError, match=r"^attention: expected layers that give maps .*, got shapes \("):
        attention(torch.zeros(sizes[0]), torch.zeros(sizes[1]))


def test_an_objective_by_name_and_what_it_is_given() -> None:
    assert find("dkd").function is objectives.dkd
    assert find("dkd").arguments == ("labels", "temperature", "target", "others")
    assert find("hint").arguments == ()
    with pytest.raises(SettingsError, match=r"^unknown objective 'atention': did you mean 'attention'"):
        find("atention")
