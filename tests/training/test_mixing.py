"""Mixtures of images: what is drawn, and that pictures and targets agree about it."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.config import TrainSettings
from training.mixing import Mixing, draw

seeds = st.integers(0, 10_000)
sizes = st.tuples(st.integers(1, 16), st.integers(1, 16))
alphas = st.floats(0.05, 5)


def drawn(seed: int, count: int = 4, size: tuple[int, ...] = (8, 8), **changes: Any) -> Mixing:
    return draw(TrainSettings(network="n", **changes), torch.Generator().manual_seed(seed), count, size)


def sides(mask: Tensor) -> tuple[int, int]:
    """Height and width of the box in bool `[H, W]`, which holds nothing but one whole box (or nothing)."""
    rows, columns = mask.any(1), mask.any(0)
    assert torch.equal(mask, rows[:, None] & columns)
    for line in (rows, columns):
        inside = line.nonzero().flatten()
        assert len(inside) == 0 or len(inside) == inside[-1] - inside[0] + 1
    return int(rows.sum()), int(columns.sum())


def pixels(seed: int, *size: int) -> Tensor:
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# By hand


def test_mixup_by_hand() -> None:
    images, other = torch.tensor([[[[0, 255]]]], dtype=torch.uint8), torch.tensor([[[[200, 255]]]], dtype=torch.uint8)
    mixing = Mixing(partner=torch.tensor([0]), share=0.75)
    torch.testing.assert_close(mixing.mixed(images, other), torch.tensor([[[[50.0, 255.0]]]]))
    found = mixing.shared(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.2, 0.8]]))
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.05, 0.2]]))


def test_cutmix_by_hand() -> None:
    images, other = (torch.full((1, 2, 2, 2), value, dtype=torch.uint8) for value in (1, 9))
    box = torch.tensor([[False, False], [False, True]])
    found = Mixing(partner=torch.tensor([0]), share=0.75, box=box).mixed(images, other)
    assert found.dtype == torch.uint8
    assert found.tolist() == [[[[1, 1], [1, 9]]] * 2]


def test_erasing_by_hand() -> None:
    holes = torch.zeros(2, 1, 1, 2, dtype=torch.bool)
    holes[1, 0, 0, 1] = True
    mixing, images = Mixing(holes=holes), torch.full((1, 3, 1, 2), 7, dtype=torch.uint8)
    assert mixing.erased(images, slice(0, 1)).tolist() == [[[[7, 7]]] * 3]
    assert mixing.erased(images, slice(1, 2)).tolist() == [[[[7, 0]]] * 3]
    assert mixing.erased(images.float(), slice(1, 2)).tolist() == [[[[7, 0]]] * 3]
    assert Mixing().erased(images, slice(0, 1)) is images


# What is drawn


@pytest.mark.parametrize(
    "changes",
    [{"mixup": 0.4}, {"cutmix": 0.4}, {"erasing": 0.5}, {"mixup": 1.0, "cutmix": 1.0, "erasing": 0.5}],
    ids=str,
)
def test_a_seed_decides(changes: dict[str, Any]) -> None:
    def plain(seed: int) -> list[Any]:
        mixing = drawn(seed, count=8, **changes)
        return [x.tolist() if isinstance(x, Tensor) else x for x in vars(mixing).values()]

    torch.manual_seed(1)
    first = [plain(seed) for seed in range(10)]
    torch.manual_seed(2)
    assert [plain(seed) for seed in range(10)] == first
    assert all(one != other for one, other in itertools.pairwise(first))


def test_nothing_is_drawn_unless_it_is_wanted() -> None:
    assert drawn(0) == Mixing(partner=None, share=1.0, box=None, holes=None)
    mixup, cutmix, erasing = drawn(0, mixup=1.0), drawn(0, cutmix=1.0), drawn(0, erasing=1.0)
    assert (mixup.box, mixup.holes) == (cutmix.holes, erasing.partner) == (None, None)
    assert cutmix.box is not None
    assert erasing.holes is not None


def test_mixup_or_cutmix_by_a_coin() -> None:
    cut = [drawn(seed, mixup=1.0, cutmix=1.0).box is not None for seed in range(200)]
    assert 70 < sum(cut) < 130  # 4 standard deviations
    assert all(drawn(seed, cutmix=1.0).box is not None for seed in range(20))
    assert all(drawn(seed, mixup=1.0).box is None for seed in range(20))


@pytest.mark.parametrize(("mixup", "cutmix"), [(1e8, 0.05), (0.05, 1e8)])
def test_each_has_its_own_alpha(mixup: float, cutmix: float) -> None:
    """A large α means a half, always; a small one all or nothing."""
    found = [drawn(seed, mixup=mixup, cutmix=cutmix) for seed in range(60)]
    for alpha, shares in (
        (mixup, [mixing.share for mixing in found if mixing.box is None]),
        (cutmix, [mixing.share for mixing in found if mixing.box is not None]),
    ):
        assert (max(shares) > 0.95) is (alpha < 1)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_shares_are_of_a_beta_distribution(alpha: float) -> None:
    """Beta(α, α) has the mean 1/2 and the variance 1 / (4·(2α + 1))."""
    shares = torch.tensor([drawn(seed, mixup=alpha).share for seed in range(400)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean().item() - 0.5) < 4 * math.sqrt(variance / 400)
    assert shares.var().item() == pytest.approx(variance, rel=0.25)


def test_the_box_of_cutmix_is_as_large_as_the_share_it_takes() -> None:
    """With α this large the share is a half, so a box that no edge cuts off has sides of √½ of the image's."""
    boxes = [drawn(seed, size=(20, 40), cutmix=1e8).box for seed in range(150)]
    found = [sides(box) for box in boxes if box is not None]
    assert {max(height for height, _ in found), max(width for _, width in found)} <= {14, 15, 28, 29}
    assert max(height for height, _ in found) / 20 == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert max(width for _, width in found) / 40 == pytest.approx(math.sqrt(0.5), abs=0.03)
    anywhere = torch.stack([box for box in boxes if box is not None]).float().mean(0)
    assert anywhere.min() > 0.05  # no place is spared
    torch.testing.assert_close(anywhere, anywhere.flip(0, 1), rtol=0, atol=0.2)


def test_a_pixel_is_cut_where_its_middle_is() -> None:
    """A box with sides of √½ holds the middle of the one pixel, in both directions, half of the time."""
    taken = [drawn(seed, size=(1, 1), cutmix=1e8).share == 0 for seed in range(200)]
    assert 70 < sum(taken) < 130  # 4 standard deviations


@settings(max_examples=100)
@given(seed=seeds, size=sizes, alpha=alphas, count=st.integers(1, 9))
def test_the_share_of_cutmix_is_what_is_really_left(seed: int, size: tuple[int, int], alpha: float, count: int) -> None:
    mixing = drawn(seed, count, size, cutmix=alpha)
    assert mixing.partner is not None
    assert mixing.box is not None
    assert mixing.partner.sort().values.tolist() == list(range(count))
    height, width = sides(mixing.box)
    assert mixing.share == pytest.approx(1 - height * width / (size[0] * size[1]), abs=1e-6)
    images, other = torch.zeros(count, 1, *size, dtype=torch.uint8), torch.full((count, 1, *size), 255).byte()
    assert (mixing.mixed(images, other) == 0).float().mean().item() == pytest.approx(mixing.share, abs=1e-6)


@settings(max_examples=100)
@given(seed=seeds, alpha=alphas, count=st.integers(1, 6))
def test_mixup_stays_among_pixels(seed: int, alpha: float, count: int) -> None:
    mixing, images = drawn(seed, count, mixup=alpha), pixels(seed, count, 3, 8, 8)
    assert mixing.partner is not None
    assert 0 <= mixing.share <= 1
    assert mixing.partner.sort().values.tolist() == list(range(count))
    other = images[mixing.partner]
    mixed = mixing.mixed(images, other)
    assert mixed.dtype == torch.float32
    assert mixed.min() >= 0
    assert mixed.max() <= 255 + 1e-4
    low, high = torch.minimum(images, other).float(), torch.maximum(images, other).float()
    assert ((mixed >= low - 1e-4) & (mixed <= high + 1e-4)).all()


@settings(max_examples=50)
@given(
    seed=seeds,
    changes=st.sampled_from([{"mixup": 0.3}, {"cutmix": 0.3}]),
    rows=st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=5),
)
def test_targets_stay_probabilities(seed: int, changes: dict[str, Any], rows: Sequence[Sequence[float]]) -> None:
    targets = torch.tensor(rows)
    targets = targets / targets.sum(1, keepdim=True)
    mixing = drawn(seed, len(rows), **changes)
    assert mixing.partner is not None
    found = mixing.shared(targets, targets[mixing.partner])
    torch.testing.assert_close(found.sum(1), torch.ones(len(rows)))
    assert found.min() >= 0


@settings(max_examples=100)
@given(seed=seeds, size=st.tuples(st.integers(2, 24), st.integers(2, 24)), share=st.floats(0.1, 1))
def test_only_the_holes_are_erased_and_they_are_boxes(seed: int, size: tuple[int, int], share: float) -> None:
    mixing, images = drawn(seed, 4, size, erasing=share), pixels(seed, 4, 3, *size).clamp(min=1)
    assert mixing.holes is not None
    erased = mixing.erased(images, slice(0, 4))
    assert torch.equal(erased == 0, mixing.holes.expand(-1, 3, -1, -1))
    assert torch.equal(erased[erased > 0], images[erased > 0])
    for hole in mixing.holes[:, 0]:
        height, width = sides(hole)
        # A side may reach into one pixel more than its length; areas are 33 % at most.
        assert max(height - 1, 0) * max(width - 1, 0) <= 0.33 * size[0] * size[1]


def test_holes_have_the_sizes_and_shapes_of_the_paper_and_lie_anywhere() -> None:
    """Zhong et al. 2017, algorithm 1; only holes that no edge cuts off are as they were drawn."""
    holes = torch.cat([drawn(seed, 50, (40, 40), erasing=1.0).holes for seed in range(8)])[:, 0]  # type: ignore[misc]
    whole = [sides(hole) for hole in holes if not (hole[0].any() or hole[-1].any() or hole[:, [0, -1]].any())]
    areas = [height * width / 1600 for height, width in whole]
    ratios = [height / width for height, width in whole]
    assert 0.01 < min(areas) < 0.04
    assert 0.2 < max(areas) < 0.36
    assert 0.25 < min(ratios) < 0.4
    assert 2.5 < max(ratios) < 4
    assert holes.float().mean(0).min() > 0.02


def test_as_many_images_have_a_hole_as_asked() -> None:
    holes = torch.cat([drawn(seed, 100, erasing=0.3).holes for seed in range(4)])  # type: ignore[misc]
    assert 0.2 < holes.flatten(1).any(1).float().mean().item() < 0.4
