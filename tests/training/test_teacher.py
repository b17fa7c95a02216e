"""Teachers: a live one that nothing touches, and mixtures of several in probability space."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from training.features import Output
from training.teacher import LiveTeacher, Mixture, PerSample, learned_shares, mix

IMAGES = torch.randint(0, 256, (5, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
INDEX = torch.arange(5)


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Pixels(), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )


class Fixed(nn.Module):
    """A network that says the same of every image."""

    def __init__(self, shares: Sequence[float], scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(shares).log() + math.log(scale))

    def forward(self, images: Tensor) -> Tensor:
        return self.get_buffer("logits").expand(len(images), -1)


class Says:
    """A teacher with a table of logits by index."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Output:
        return Output(self.logits[index])


# Live


def test_a_live_teacher_says_what_its_network_does_in_eval_mode() -> None:
    net = network()
    expected = net.eval()(IMAGES)
    teacher = LiveTeacher(net.train(), torch.float32, ["3"])
    output = teacher(IMAGES, INDEX, INDEX)
    assert torch.equal(output.logits, expected)
    assert output.features["3"].shape == (5, 4, 4, 4)
    assert torch.equal(teacher(IMAGES.float(), INDEX, INDEX).logits, expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_touches_a_live_teacher(precision: torch.dtype) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    teacher = LiveTeacher(net, precision, ["2"])
    seed = torch.get_rng_state()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            teacher(IMAGES, INDEX, INDEX)
            assert torch.is_grad_enabled() is enabled
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), seed)  # no dropout
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_what_it_says_may_take_part_in_autograd() -> None:
    output = LiveTeacher(network(), torch.float32, ["3"])(IMAGES, INDEX, INDEX)
    for said in (output.logits, output.features["3"]):
        assert not said.requires_grad
        assert not said.is_inference()
        ours = torch.ones_like(said, requires_grad=True)
        (gradient,) = torch.autograd.grad((ours * said).sum(), ours)
        assert torch.equal(gradient, said)


def test_no_gradient_goes_through_a_live_teacher() -> None:
    images = IMAGES.float().requires_grad_()
    output = LiveTeacher(network(), torch.float32, ["3"])(images, INDEX, INDEX)
    assert not output.logits.requires_grad
    assert not output.features["3"].requires_grad


def test_reduced_precision_is_of_the_network_alone() -> None:
    exact = LiveTeacher(network(), torch.float32, ["3"])(IMAGES, INDEX, INDEX)
    reduced = LiveTeacher(network(), torch.bfloat16, ["3"])(IMAGES, INDEX, INDEX)
    assert reduced.logits.dtype == reduced.features["3"].dtype == torch.float32
    assert not torch.equal(reduced.logits, exact.logits)
    torch.testing.assert_close(reduced.logits, exact.logits, rtol=0.05, atol=0.05)


# Mixtures


def test_a_mixture_by_hand() -> None:
    """Means of probabilities: (0.9 + 0.3)/2 and so on; logits have no say in how large they are."""
    networks = [Fixed([0.9, 0.08, 0.02]), Fixed([0.3, 0.3, 0.4], scale=1e3)]
    even = Mixture(networks, [1, 1])(IMAGES)
    torch.testing.assert_close(even.exp(), torch.tensor([[0.6, 0.19, 0.21]]).expand(5, 3))
    uneven = Mixture(networks, [3, 1])(IMAGES)  # shares of 3/4 and 1/4
    torch.testing.assert_close(uneven.exp(), torch.tensor([[0.75, 0.135, 0.115]]).expand(5, 3))
    alone = Mixture(networks, [0, 2])(IMAGES)
    torch.testing.assert_close(alone.exp(), torch.tensor([[0.3, 0.3, 0.4]]).expand(5, 3))


def test_a_mixture_is_a_network_whose_shares_travel_with_it() -> None:
    mixture = Mixture([network(), network()], [1, 3])
    other = Mixture([network(), network()], [1, 1])
    other.load_state_dict(mixture.state_dict())
    assert other.shares.tolist() == [0.25, 0.75]
    output = LiveTeacher(mixture, torch.float32)(IMAGES, INDEX, INDEX)
    torch.testing.assert_close(
        output.logits, LiveTeacher(network(), torch.float32)(IMAGES, INDEX, INDEX).logits.log_softmax(1)
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    shares=st.lists(st.floats(0, 10), min_size=1, max_size=4).filter(lambda shares: sum(shares) > 0.01),
    scale=st.sampled_from([0.0, 1.0, 80.0]),
)
def test_a_mixture_is_a_distribution_between_its_parts(seed: int, shares: list[float], scale: float) -> None:
    logits = scale * torch.randn(len(shares), 6, 4, generator=torch.Generator().manual_seed(seed))
    mixture = Mixture([nn.Identity()] * len(shares), shares)
    assert mixture.shares.sum().item() == pytest.approx(1)
    found = mix(logits, mixture.shares[:, None])
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6))
    p = logits.softmax(2)
    torch.testing.assert_close(found.exp(), (mixture.shares[:, None, None] * p).sum(0))
    assert (found.exp() <= p.amax(0) + 1e-5).all()


def test_one_confident_teacher_does_not_decide_alone() -> None:
    logits = torch.tensor([[[80.0, -80.0]], [[-1.0, 1.0]], [[-1.0, 1.0]]])
    found = mix(logits, torch.full((3, 1), 1 / 3)).exp()
    p = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(found, torch.tensor([[(1 + 2 * (1 - p)) / 3, 2 * p / 3]]))


# By sample


def test_shares_by_sample_by_hand() -> None:
    sure, unsure = torch.tensor([[0.8, 0.1, 0.1]] * 4), torch.tensor([[0.2, 0.3, 0.5]] * 4)
    teacher = PerSample([Says(sure.log()), Says(unsure.log() + 5)], torch.tensor([0, 1, -1, 2]))
    found = teacher(IMAGES[:3], torch.tensor([0, 1, 2]), INDEX[:3]).logits.exp()
    # label 0: shares 0.8 and 0.2 of 1; label 1: 0.1 and 0.3 of 0.4; no label: a half each
    expected = [[0.68, 0.14, 0.18], [0.35, 0.25, 0.4], [0.5, 0.2, 0.3]]
    torch.testing.assert_close(found, torch.tensor(expected))
    # the labels are those of the images that the index names: label 2 has shares of 1/6 and 5/6
    again = teacher(IMAGES[:2], torch.tensor([3, 0]), INDEX[:2]).logits.exp()
    torch.testing.assert_close(again, torch.tensor([[1.8 / 6, 1.6 / 6, 2.6 / 6], expected[0]]))


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0, 80.0]))
def test_the_label_is_at_least_as_likely_as_in_the_mean(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 5, 4, generator=generator)
    labels = torch.randint(-1, 4, (5,), generator=generator)
    found = PerSample([Says(z) for z in logits], labels)(IMAGES, INDEX, INDEX).logits
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5))
    mean = logits.softmax(2).mean(0)
    torch.testing.assert_close(found.exp()[labels < 0], mean[labels < 0])
    column = labels.clamp(min=0)[:, None]
    assert (found.exp().gather(1, column) >= mean.gather(1, column) - 1e-5).all()


# Learned


def likelihood(logits: Tensor, labels: Tensor, shares: Sequence[float]) -> float:
    found = mix(logits.double(), torch.tensor(shares, dtype=torch.float64)[:, None])
    return found.gather(1, labels[:, None]).mean().item()


def test_the_known_optimum_is_found() -> None:
    # One teacher gives 0.9 to the label of 7 images and 0.1 to that of 3, the other the reverse. The likelihood
    # 0.7·log(0.1 + 0.8·w) + 0.3·log(0.9 − 0.8·w) is largest at w = 3/4.
    labels = torch.zeros(10, dtype=torch.long)
    first = torch.tensor([[0.9, 0.1]] * 7 + [[0.1, 0.9]] * 3)
    logits = torch.stack([first.log(), (1 - first).log() + 3])
    assert learned_shares(logits, labels) == pytest.approx([0.75, 0.25], abs=1e-5)
    assert learned_shares(logits.flip(0), labels) == pytest.approx([0.25, 0.75], abs=1e-5)


def test_a_teacher_that_is_always_better_gets_it_all() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    good, bad = 4 * torch.eye(3)[labels], torch.zeros(4, 3)
    assert learned_shares(torch.stack([bad, good]), labels) == pytest.approx([0, 1], abs=1e-4)
    assert learned_shares(torch.stack([good, good]), labels) == [0.5, 0.5]


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), teachers=st.integers(1, 4), scale=st.sampled_from([0.3, 3.0, 80.0]))
def test_the_likelihood_never_falls_and_ends_at_its_maximum(seed: int, teachers: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(teachers, 20, 3, generator=generator)
    labels = torch.randint(0, 3, (20,), generator=generator)
    rounds = [learned_shares(logits, labels, n) for n in (0, 1, 2, 5, 20, 200)]
    for shares in rounds:
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert min(shares) >= 0
    values = [likelihood(logits, labels, shares) for shares in rounds]
    assert all(later >= earlier - 1e-4 for earlier, later in itertools.pairwise(values))
    for other in torch.rand(20, teachers, generator=generator).double():
        assert values[-1] >= likelihood(logits, labels, (other / other.sum()).tolist()) - 1e-3
