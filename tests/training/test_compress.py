"""What is taken away stays away, costs what was asked for, and leaves a network that learns."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from handler.errors import DistilleryError
from handler.networks import Normalize, build
from handler.widths import fit
from training import compress, networks
from training.evaluate import logits_of, macs

SHAPE = (1, 28, 28)


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return build("separable", channels=1, size=(28, 28), classes=10)


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (16, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def images() -> torch.Tensor:
    return pictures()


def trained(network: nn.Module, images: torch.Tensor) -> None:
    """Two steps that move every weight, decay among them."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    optimizer = torch.optim.SGD(network.parameters(), 0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network.train()(images).square().mean().backward()
        optimizer.step()
    network.eval()


# Structured pruning


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_pruning_reaches_its_target_with_classes_and_input_whole(network: nn.Module, share: float) -> None:
    whole = macs(network, SHAPE)
    compress.prune(network, SHAPE, int(share * whole))
    assert 0.6 * share * whole < macs(network, SHAPE) <= share * whole
    assert network(torch.zeros(3, *SHAPE, dtype=torch.uint8)).shape == (3, 10)
    assert all(
        width % compress.WIDTH == 0 for width in (m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d))
    )


def test_the_weakest_channels_go() -> None:
    """Every other channel has weights of zero; without them the network is cheaper and answers the same."""
    torch.manual_seed(0)
    first, second, head = nn.Conv2d(1, 32, 3, bias=False), nn.Conv2d(32, 32, 3, bias=False), nn.Linear(32, 10)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = nn.Sequential(Normalize([0.3], [0.2]), first, nn.ReLU(), second, nn.ReLU(), pool, head).eval()
    strong = second.weight.data[1::2, 1::2].clone()
    first.weight.data[::2] = 0
    second.weight.data[::2] = 0
    second.weight.data[:, ::2] = 0
    head.weight.data[:, ::2] = 0
    before, answers = macs(plain, SHAPE), logits_of(plain, images := pictures())
    compress.prune(plain, SHAPE, before // 2)
    assert (first.out_channels, second.out_channels, head.in_features) == (16, 16, 16)
    torch.testing.assert_close(second.weight.data, strong, rtol=0, atol=0)
    torch.testing.assert_close(logits_of(plain, images), answers)


@pytest.mark.parametrize("name", ["separable_wide", "residual", "seed_student"])
def test_a_pruned_state_dict_brings_its_own_widths(name: str, images: torch.Tensor) -> None:
    network = build(name, channels=1, size=(28, 28), classes=10)
    compress.prune(network, SHAPE, int(0.5 * macs(network, SHAPE)))
    other = build(name, channels=1, size=(28, 28), classes=10)
    fit(other, network.state_dict())
    torch.testing.assert_close(logits_of(other, images), logits_of(network, images), rtol=0, atol=0)
    assert str(other) == str(network), "its layers say what they are"


def test_the_state_of_another_network_or_of_fewer_classes_is_refused(network: nn.Module) -> None:
    for name, classes in (("residual", 10), ("separable", 12), ("separable", 9)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            fit(build(name, channels=1, size=(28, 28), classes=classes), network.state_dict())


def test_more_than_there_is_cannot_be_taken(network: nn.Module) -> None:
    with pytest.raises(DistilleryError, match=r"10 multiply-accumulates: cannot be reached; .* would be left"):
        compress.prune(network, SHAPE, 10)


def test_a_torchvision_network_is_pruned_too() -> None:
    network = networks.build("resnet18", channels=3, size=(32, 32), classes=5, mean=[0.5] * 3, std=[0.2] * 3)
    whole = macs(network, (3, 32, 32))
    compress.prune(network, (3, 32, 32), whole // 2)
    assert macs(network, (3, 32, 32)) <= whole // 2
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 5)


# Zeros


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_the_smallest_weights_of_all_are_zero_and_stay_so(network: nn.Module, images: torch.Tensor) -> None:
    before = torch.cat([w.flatten() for w in weights(network)]).abs()
    compress.sparsify(network, 0.7)
    after = torch.cat([w.flatten() for w in weights(network)])
    assert (after == 0).float().mean().item() == pytest.approx(0.7, abs=1e-3)
    assert before[after == 0].max() <= before[after != 0].min()
    trained(network, images)
    masked = logits_of(network, images)
    compress.settle(network)
    torch.testing.assert_close(logits_of(network, images), masked, rtol=0, atol=0)
    assert torch.equal(torch.cat([w.flatten() for w in weights(network)]) == 0, after == 0)
    plain = build("separable", channels=1, size=(28, 28), classes=10)
    assert network.state_dict().keys() == plain.state_dict().keys()


# The grid


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_multiples_of_one_step_per_channel(network: nn.Module, images: torch.Tensor, bits: int) -> None:
    names = network.state_dict().keys()
    compress.put_on_grid(network, bits)
    trained(network, images)
    before = weights(network)
    steps = [
        grid.step(held.original)
        for held in network.modules()
        if isinstance(held, ParametrizationList) and isinstance(grid := held[0], compress.OnGrid)
    ]
    compress.settle(network)
    assert network.state_dict().keys() == names
    assert all(map(torch.equal, before, weights(network)))
    for weight, step in zip(weights(network), steps, strict=True):
        counts = weight.flatten(1) / step[:, None]
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
        assert counts.abs().max() <= 2 ** (bits - 1) - 1 + 1e-3


def test_what_layers_read_is_rounded_too(network: nn.Module, images: torch.Tensor) -> None:
    compress.put_on_grid(network, 8)
    trained(network, images)
    read = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    rounded = logits_of(network, images)
    assert len(read) == 16 and all(len(features.unique()) <= 256 for features in read)
    compress.settle(network)
    plain = logits_of(network, images)
    assert 0 < (plain - rounded).abs().max() < 0.1 * plain.std()


def test_features_by_hand() -> None:
    """The range is the mean of the first batches: from -0.5 to 2.05, in steps of 0.01; nothing beyond it is left."""
    grid = compress.FeaturesOnGrid()
    grid(torch.tensor([-1.0, 0.0, 3.0]))
    grid(torch.tensor([0.2, 1.1]))
    features = torch.tensor([-0.7, -0.003, 0.0, 0.512, 1.0049, 9.0], requires_grad=True)
    found = grid.eval()(features)
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.0, 0.0, 0.51, 1.0, 2.05]))
    found.sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0]))


def test_the_step_is_the_best_of_those_tried_by_hand() -> None:
    """Two bits are -1, 0, 1: for weights 1, 1, 1, 2 a step of 2 makes three of them 0 and wastes 3.

    3 (1 - s)² + (2 - s)² has its minimum, 3/4, at s = 5/4.
    """
    weight = torch.tensor([[1.0, 1.0, 1.0, 2.0], [2.0, -2.0, 2.0, 0.0]])
    rounded = compress.OnGrid(weight, 2)(weight)
    torch.testing.assert_close(rounded[0], torch.full((4,), 1.25))
    torch.testing.assert_close(rounded[1], torch.tensor([2.0, -2.0, 2.0, 0.0]))


def test_the_gradient_passes_inside_the_grid_and_not_beyond() -> None:
    """For 1, 1, 1, 2 the grid ends at 5/4; what is rounded to its end from within gets a gradient."""
    weight = torch.tensor([[1.0, 1.0, 1.0, 2.0]], requires_grad=True)
    (compress.OnGrid(weight, 2)(weight) * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0, 2.0, 3.0, 0.0]]))


def test_eight_bits_end_where_the_exporters_do(network: nn.Module, images: torch.Tensor) -> None:
    """So that int8 rounds nothing a second time: the largest weight of each channel is 127 steps."""
    compress.put_on_grid(network, 8)
    trained(network, images)
    compress.settle(network)
    for weight in weights(network):
        rows = weight.flatten(1)
        counts = 127 * rows / rows.abs().amax(1, keepdim=True)
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
