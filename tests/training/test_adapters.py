"""Adapters: shapes that fit, projections that stay orthonormal, and nothing that is not trained."""

from typing import Any

import pytest
import torch
from torch import Tensor

from handler.errors import SettingsError
from training.adapters import Adapter, adapters, pair_name
from training.config import ObjectiveSettings, TermSettings
from training.criterion import Criterion
from training.objectives import hint

KINDS = ["convolution", "orthogonal"]
both = pytest.mark.parametrize("kind", KINDS)


def normal(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@both
@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((4, 3, 8, 8), (4, 5, 8, 8), (4, 64, 5)),
        ((4, 3, 8, 8), (4, 5, 4, 4), (4, 16, 5)),
        ((4, 5, 4, 4), (4, 3, 7, 7), (4, 16, 3)),
        ((4, 3, 8, 2), (4, 5, 2, 8), (4, 4, 5)),
        ((4, 3, 7), (4, 3, 5), (4, 3, 5)),
        ((4, 7), (4, 5), (4, 1, 5)),
        ((4, 5), (4, 5), (4, 1, 5)),
    ],
    ids=str,
)
def test_shapes(kind: str, student: tuple[int, ...], teacher: tuple[int, ...], expected: tuple[int, ...]) -> None:
    f_s, f_t = normal(0, *student), normal(1, *teacher)
    ours, theirs = Adapter(kind, f_s, f_t)(f_s, f_t)
    assert ours.shape == theirs.shape == expected


@pytest.mark.parametrize("teacher", [(2, 3, 4, 6), (2, 3, 8, 12)], ids=str)
def test_places_stay_together_and_the_larger_grid_is_averaged(teacher: tuple[int, ...]) -> None:
    f_s, f_t = normal(0, 2, 5, 4, 6), normal(1, *teacher)
    ours, theirs = (adapter := Adapter("convolution", f_s, f_t).eval())(f_s, f_t)
    side = teacher[2] // 4
    matrix = adapter.state_dict()["fit.project.weight"]
    for b, y, x in ((0, 0, 0), (0, 1, 3), (1, 3, 5)):
        place = f_t[b, :, side * y : side * (y + 1), side * x : side * (x + 1)].mean((1, 2))
        torch.testing.assert_close(theirs[b, 6 * y + x], place)
        torch.testing.assert_close(ours[b, 6 * y + x], matrix @ f_s[b, :, y, x], rtol=1e-4, atol=1e-5)


def trained(adapter: Adapter, f_s: Tensor, f_t: Tensor, steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.AdamW(adapter.parameters(), **options)
    losses = []
    for _ in range(steps):
        loss = hint(*adapter(f_s, f_t))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def projection(adapter: Adapter, student: int) -> Tensor:
    """The adapter's matrix `[teacher, student]`: what it makes of the unit vectors."""
    with torch.no_grad():
        rows: Tensor = adapter.get_submodule("fit.project")(torch.eye(student))
    return rows.T


@pytest.mark.parametrize(("student", "teacher"), [(3, 7), (7, 3), (5, 5)])
def test_the_projection_stays_orthonormal_while_it_is_trained(student: int, teacher: int) -> None:
    f_s, f_t = normal(0, 16, student), normal(1, 16, teacher)
    adapter = Adapter("orthogonal", f_s, f_t)
    before = projection(adapter, student)
    trained(adapter, f_s, f_t, 10, lr=0.1, weight_decay=0.1)
    after = projection(adapter, student)
    assert (after - before).abs().max() > 0.1
    product = after.T @ after if teacher >= student else after @ after.T
    torch.testing.assert_close(product, torch.eye(min(student, teacher)), rtol=0, atol=1e-5)


def test_a_wider_projection_keeps_the_geometry_of_the_student() -> None:
    f_s, f_t = normal(0, 6, 3), normal(1, 6, 8)
    ours, _ = Adapter("orthogonal", f_s, f_t)(f_s, f_t)
    torch.testing.assert_close(torch.cdist(ours.squeeze(1), ours.squeeze(1)), torch.cdist(f_s, f_s))


def test_the_orthogonal_target_is_layer_normalised() -> None:
    f_s, f_t = normal(0, 4, 6, 3), normal(1, 4, 6, 8)
    adapter = Adapter("orthogonal", f_s, f_t)
    ours, theirs = adapter(f_s, f_t)
    torch.testing.assert_close(theirs.mean(-1), torch.zeros(4, 6), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs.square().mean(-1), torch.ones(4, 6), rtol=0, atol=1e-4)
    scale, shift = normal(2, 4, 6, 1).abs() + 1, normal(3, 4, 6, 1)
    torch.testing.assert_close(adapter(f_s, scale * f_t + shift)[1], theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter(2 * f_s, f_t)[0], 2 * ours)


def test_the_convolution_does_not_see_the_scale_of_the_student_and_leaves_the_teacher_as_it_is() -> None:
    f_s, f_t = 3 * normal(0, 4, 3, 5, 5), normal(1, 4, 8, 5, 5)
    adapter = Adapter("convolution", f_s, f_t)
    ours, theirs = adapter(f_s, f_t)
    torch.testing.assert_close(adapter(10 * f_s, f_t)[0], ours, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.mean((0, 1)), torch.zeros(8), rtol=0, atol=1e-5)
    assert torch.equal(theirs.flatten(), f_t.movedim(1, -1).flatten())


def test_the_convolution_finds_a_linear_teacher() -> None:
    f_s = normal(0, 64, 4)
    f_t = f_s @ normal(1, 4, 3)
    losses = trained(Adapter("convolution", f_s, f_t), f_s, f_t, 300, lr=0.05, weight_decay=0.0)
    assert losses[0] > 0.5
    assert losses[-1] < 1e-3


@both
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 3, 8, 8), (2, 5)), ((2, 5), (2, 3, 8)), ((2, 7, 3), (2, 6, 3)), ((2,), (2,)), ((2, 1, 2, 3, 4),) * 2],
    ids=str,
)
def test_shapes_that_do_not_go_together_are_named(
    kind: str, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    with pytest.raises(SettingsError) as error:
        Adapter(kind, torch.zeros(student), torch.zeros(teacher))
    shapes = f"{student[1:]} and {teacher[1:]}"
    assert str(error.value) == f"hint: expected two maps, two vectors or two sequences as long, got shapes {shapes}"


def test_every_pair_of_a_hint_has_an_adapter_and_the_criterion_trains_them_all() -> None:
    inside = {"stem.0": normal(0, 2, 3, 4, 4), "head": normal(1, 2, 6)}
    outside = {
        "layer1.1.conv2": normal(2, 2, 5, 4, 4),
        "layer1.0.conv2": normal(4, 2, 5, 4, 4),
        "head": normal(3, 2, 8),
    }
    terms = (
        TermSettings(objective="hint", layers={"stem.0": "layer1.1.conv2"}),
        TermSettings(objective="attention", layers={"stem.0": "layer1.0.conv2"}),
        TermSettings(objective="hint", layers={"head": "head"}, adapter="orthogonal"),
        TermSettings(objective="kd"),
    )
    found = adapters(terms, inside, outside)
    names = [pair_name("stem.0", "layer1.1.conv2"), pair_name("head", "head")]
    assert list(found) == names == ["stem/0|layer1/1/conv2", "head|head"]
    criterion = Criterion(ObjectiveSettings(terms=terms), found)
    sizes = sorted(p.numel() for p in criterion.parameters())
    assert sizes == [5, 5, 3 * 5, 6 * 8]  # BatchNorm's two, the convolution, the projection
    assert all(p.requires_grad for p in criterion.parameters())
    assert {id(p) for p in found.parameters()} == {id(p) for p in criterion.parameters()}
    again = Criterion(ObjectiveSettings(terms=terms), adapters(terms, inside, outside))
    again.load_state_dict(criterion.state_dict())
    for name, (path_s, path_t) in zip(names, (("stem.0", "layer1.1.conv2"), ("head", "head")), strict=True):
        pair = inside[path_s], outside[path_t]
        torch.testing.assert_close(again.adapters[name].eval()(*pair), found[name].eval()(*pair))


def test_two_hints_on_one_pair_are_refused() -> None:
    terms = (TermSettings(objective="hint", layers={"a": "b"}),) * 2
    with pytest.raises(SettingsError, match="hint: expected each pair of layers once, got a: b twice"):
        adapters(terms, {}, {})
