"""Images out of a teacher: what it asks for, and nothing done to the teacher itself."""

import logging
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.errors import DistilleryError
from handler.networks import Normalize, conv_bn
from training import synthesize as module
from training.config import SynthesisSettings
from training.data import Dataset, Split
from training.synthesize import Inversion, clip, noise, pixels_of, synthesize, variation
from training.teacher import Mixture
from training.views import Views

CPU = torch.device("cpu")
SHAPE, CLASSES = (1, 8, 8), 4
SETTINGS = SynthesisSettings(images=40, steps=60)
NOISE = replace(SETTINGS, steps=0)


def network(*inside: nn.Module) -> nn.Sequential:
    return nn.Sequential(Normalize([0.4], [0.2]), *inside, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))


@pytest.fixture(scope="module")
def teacher(dataset: Dataset) -> nn.Sequential:
    """A network with two BatchNorms that knows the quadrants."""
    torch.manual_seed(0)
    found = network(conv_bn(1, 8, 3), nn.ReLU(), conv_bn(8, 8, 3), nn.ReLU())
    optimizer = torch.optim.Adam(found.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(found(dataset.train.images), dataset.train.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    return found.eval()


def make(teacher: nn.Module, settings: SynthesisSettings = SETTINGS, seed: int = 0) -> Split:
    return synthesize(teacher, SHAPE, CLASSES, settings, seed, CPU)


@torch.no_grad()
def surprise(teacher: nn.Module, made: Split) -> float:
    """Cross-entropy of the teacher's answer with the class that was wanted."""
    return F.cross_entropy(teacher(made.images), made.labels).item()


@torch.no_grad()
def distance(teacher: nn.Sequential, made: Split) -> float:
    """How far the inputs of the BatchNorms are from what they remember: computed layer by layer, without hooks."""
    x, total = made.images, 0.0
    for layer in [part for child in teacher for part in (child if isinstance(child, nn.Sequential) else [child])]:
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            total += (x.mean((0, 2, 3)) - layer.running_mean).norm().item()
            total += (x.var((0, 2, 3)) - layer.running_var).norm().item()
        x = layer(x)
    return total


def test_the_teacher_sees_the_wanted_class(teacher: nn.Sequential) -> None:
    made, noise = make(teacher), make(teacher, NOISE)
    assert surprise(teacher, made) < 0.5 * surprise(teacher, noise)
    assert (teacher(made.images).argmax(1) == made.labels).float().mean() > 0.75


def test_its_statistics_are_those_that_the_teacher_remembers(teacher: nn.Sequential, dataset: Dataset) -> None:
    made = distance(teacher, make(teacher))
    assert made < 0.75 * distance(teacher, make(teacher, NOISE))
    assert made < 0.25 * distance(teacher, make(teacher, replace(SETTINGS, statistics=0.0)))


def test_the_loss_is_the_papers(teacher: nn.Sequential) -> None:
    made = make(teacher, NOISE)
    inversion = Inversion(teacher, replace(SETTINGS, statistics=3.0, smoothness=0.5), CPU)
    pixels = made.images.float() / 255
    expected = surprise(teacher, made) + 3 * distance(teacher, made) + 0.5 * variation(pixels).item()
    for _ in range(2):  # nothing of a step is left for the next one
        loss = inversion.loss(pixels, made.labels, torch.zeros_like(made.labels))
        assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((1, 28, 28), [(28, 28), (14, 14), (7, 7), (3, 3)]), ((3, 4, 10), [(4, 10), (2, 5)]), ((1, 1, 5), [(1, 5)])],
)
def test_images_begin_as_a_pyramid_of_noise(shape: tuple[int, int, int], sizes: list[tuple[int, int]]) -> None:
    levels = noise(2, shape, torch.Generator())
    assert [tuple(level.shape) for level in levels] == [(2, shape[0], *size) for size in sizes]
    assert pixels_of(levels).std() > 0.05


def test_a_pyramid_is_the_sum_of_its_levels_kept_in_range_by_the_finest() -> None:
    levels = [torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]]), torch.tensor([[[[0.7]]]])]
    assert pixels_of(levels).flatten().tolist() == pytest.approx([0.8, 0.9, 1.0, 1.1])
    levels[0][0, 0, 0, 0] = -5
    clip(levels)
    assert pixels_of(levels).flatten().tolist() == pytest.approx([0.0, 0.9, 1.0, 1.0], abs=1e-6)
    assert levels[1].item() == pytest.approx(0.7)


def test_variation_by_hand() -> None:
    pixels = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]], [[[5.0, 5.0], [5.0, 5.0]]]])
    assert variation(pixels).item() == (9 + 4 + 1 + 0) / 2


def test_smoothness_makes_smooth(teacher: nn.Sequential) -> None:
    rough, smooth = (make(teacher, replace(SETTINGS, smoothness=w)).images.float() for w in (0.0, 1.0))
    assert variation(smooth) < 0.5 * variation(rough)


def test_the_teacher_looks_at_the_views(teacher: nn.Sequential) -> None:
    views = Views(shift=1, flip=True)
    made = make(teacher, NOISE)
    pixels, view = made.images.float() / 255, torch.arange(40) % len(views)
    inversion = Inversion(teacher, replace(SETTINGS, smoothness=0.0), CPU, views)
    expected = inversion.loss(views.apply(pixels, view), made.labels, torch.zeros_like(view))
    assert inversion.loss(pixels, made.labels, view).item() == pytest.approx(expected.item(), rel=1e-5)


def test_each_step_draws_other_views(teacher: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    apply = Views.apply

    def spy(self: Views, images: Tensor, view: Tensor) -> Tensor:
        seen.append(view)
        return apply(self, images, view)

    monkeypatch.setattr(Views, "apply", spy)
    synthesize(teacher, SHAPE, CLASSES, replace(SETTINGS, steps=3), 0, CPU, Views(shift=2, flip=True))
    assert len({tuple(view.tolist()) for view in seen}) == 3


def test_the_teacher_is_left_as_it_was(teacher: nn.Sequential) -> None:
    teacher.train()
    teacher[1].eval()
    teacher[-1].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes, random = [m.training for m in teacher.modules()], torch.get_rng_state()
    make(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()] == modes
    assert [name for name, p in teacher.named_parameters() if not p.requires_grad] == [f"{len(teacher) - 1}.bias"]
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in teacher.modules())
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    teacher[-1].bias.requires_grad_(True)
    teacher.eval()


def test_the_mode_of_the_teacher_does_not_matter(teacher: nn.Sequential) -> None:
    expected = make(teacher)
    teacher.train()
    made = make(teacher)
    teacher.eval()
    assert torch.equal(made.images, expected.images)


def test_the_same_seed_gives_the_same_bytes(teacher: nn.Sequential) -> None:
    first, again, other = make(teacher, seed=1), make(teacher, seed=1), make(teacher, seed=2)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(("images", "parts"), [(8, [8]), (26, [9, 9, 8]), (20, [10, 10])])
def test_whole_balanced_batches_of_pixels(
    teacher: nn.Sequential, monkeypatch: pytest.MonkeyPatch, images: int, parts: list[int]
) -> None:
    batches: list[Tensor] = []
    run = Inversion.run

    def spy(self: Inversion, labels: Tensor, *rest: object) -> Tensor:
        batches.append(labels)
        return run(self, labels, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "BATCH", 10)
    monkeypatch.setattr(Inversion, "run", spy)
    made = make(teacher, replace(SETTINGS, images=images, steps=2))
    assert made.images.dtype == torch.uint8
    assert made.images.shape == (images, *SHAPE)
    assert len({image.numpy().tobytes() for image in made.images}) == images
    assert [len(batch) for batch in batches] == parts
    for labels in (made.labels, *batches):
        counts = torch.bincount(labels, minlength=CLASSES)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("normalised", [False, True])
def test_a_teacher_that_remembers_no_statistics(normalised: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    own = [nn.BatchNorm2d(8, track_running_stats=False)] if normalised else []
    teacher = network(nn.Conv2d(1, 8, 3), *own).eval()
    with caplog.at_level(logging.INFO, "training"):
        made = make(teacher)
    assert "has no BatchNorm" in caplog.text
    assert surprise(teacher, made) < 0.8 * surprise(teacher, make(teacher, NOISE))


def test_an_ensemble_can_be_inverted(teacher: nn.Sequential) -> None:
    torch.manual_seed(0)
    mixture = Mixture([teacher, network(conv_bn(1, 8, 3), nn.ReLU())], [0.9, 0.1]).eval()
    inversion = Inversion(mixture, SETTINGS, CPU)
    noise = make(teacher, NOISE)
    inversion.loss(noise.images.float() / 255, noise.labels, torch.zeros_like(noise.labels))
    assert len(inversion.distances) == 3
    assert surprise(teacher, make(mixture)) < 0.5 * surprise(teacher, noise)


def test_reduced_precision_asks_for_the_same(teacher: nn.Sequential) -> None:
    made = synthesize(teacher, SHAPE, CLASSES, SETTINGS, 0, CPU, precision=torch.bfloat16)
    assert surprise(teacher, made) < 0.5 * surprise(teacher, make(teacher, NOISE))
    assert not torch.equal(made.images, make(teacher).images)


def test_images_that_are_not_finite_are_refused() -> None:
    teacher = network(conv_bn(1, 8, 3))
    next(teacher.parameters()).data.fill_(math.nan)
    with pytest.raises(DistilleryError, match="the images are not finite"):
        make(teacher)
