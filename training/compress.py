"""Smaller students: channels taken away, weights set to zero, weights put on a grid; each is then distilled again.

None of these needs an architecture of its own. `fit` (handler/widths.py) reads a state dict with fewer channels,
zeros are numbers, and a weight on the grid of int8 is a float until it is exported.
"""

import copy

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.utils import parametrize

from handler.errors import DistilleryError, line
from training.evaluate import macs

WIDTH = 8  # channels are left in multiples of what a vector of the processor holds
HALVINGS = 8  # of the interval in which the share of channels is searched


def prune(network: nn.Module, shape: tuple[int, int, int], target: int) -> None:
    """Take whole channels away, the weakest of each layer, until an image of `shape` costs at most `target` MACs.

    Every layer keeps the same share of its channels, the largest that will do. A channel's strength is the norm of
    all weights that go with it, in every layer it passes through (Fang et al. 2023, arXiv:2301.12900, eq. 4). Raises
    DistilleryError where so much cannot be taken, and then the network is as before.
    """
    if macs(network, shape) <= target:
        return
    low, high = 0.0, 1.0
    left = macs(_narrowed(network, shape, low), shape)
    if left > target:
        raise DistilleryError(f"pruning: {target:,} multiply-accumulates: cannot be reached; {left:,} would be left")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(_narrowed(network, shape, middle), shape) <= target else (low, middle)
    _narrow(network, shape, low)


def _narrowed(network: nn.Module, shape: tuple[int, int, int], share: float) -> nn.Module:
    narrow = copy.deepcopy(network)
    _narrow(narrow, shape, share)
    return narrow


def _narrow(network: nn.Module, shape: tuple[int, int, int], share: float) -> None:
    *inner, classifier = _weighty(network)
    ratios = {}
    for module in inner:
        channels = len(module.weight)
        kept = min(channels, max(WIDTH, round(share * channels / WIDTH) * WIDTH))
        ratios[module] = max(0.0, 1 - (kept + 0.5) / channels)  # the pruner rounds what is kept down
    try:
        torch_pruning.pruner.BasePruner(
            network.eval(),
            torch.zeros(2, *shape, dtype=torch.uint8),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            ignored_layers=[classifier],
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
        ).step()
        network(torch.zeros(2, *shape, dtype=torch.uint8))
    except Exception as error:  # the tracer's and the network's own, of any class
        raise DistilleryError(f"pruning: this network's channels cannot be taken apart: {line(error)}") from error


class Masked(nn.Module):
    """A weight of which some elements stay zero."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight `[O, …]` with zeros where the mask has them."""
        return weight * self.mask


class OnGrid(nn.Module):
    """A weight rounded to the multiples of one step per output channel that `bits` can count.

    The largest weight of a channel, or a share of it, is the last on the grid, as the exporter will have it. The
    gradient passes as if nothing had been rounded, but not to what lies beyond the grid (Jacob et al. 2018,
    arXiv:1712.05877, section 3; Esser et al. 2020, arXiv:1902.08153, eq. 1 and 2). BatchNorm, folded in at export,
    scales the channels and so leaves each one on a grid.
    """

    share: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.largest = 2 ** (bits - 1) - 1
        self.register_buffer("zero", torch.zeros(len(weight), dtype=torch.int32))
        self.register_buffer("share", _best_share(weight.detach().flatten(1), self.largest))

    def step(self, weight: Tensor) -> Tensor:
        """The step of each channel `[O]` of the weight `[O, …]`."""
        largest = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-8)
        step: Tensor = largest * self.share / self.largest
        return step

    def forward(self, weight: Tensor) -> Tensor:
        """The weight `[O, …]`, rounded."""
        step = self.step(weight)
        return torch.fake_quantize_per_channel_affine(weight, step, self.zero, 0, -self.largest, self.largest)


class FeaturesOnGrid(nn.Module):
    """What a layer reads, rounded to 255 steps between the least and the largest that it has read, in the mean of late.

    In training the range follows the batches; the gradient passes as in `OnGrid` (Jacob et al. 2018, section 3.1).
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("low", "high", "batches"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """The features `[B, …]`, rounded; zero stays zero."""
        plain = features.float()  # autocast may have made them shorter
        if self.training:
            low, high = plain.detach().aminmax()
            self.batches += 1
            share = (1 / self.batches).clamp(min=0.01)
            self.low.lerp_(low.clamp(max=0), share)
            self.high.lerp_(high.clamp(min=0), share)
        step = (self.high - self.low).clamp(min=1e-8) / 255
        zero = (-self.low / step).round().to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(plain, step, zero, 0, 255).to(features.dtype)


class Rounded(nn.Sequential):
    """A layer behind the rounding of what it reads."""


def sparsify(network: nn.Module, zeros: float) -> None:
    """Keep the share `zeros` of all weights, those nearest to zero, at zero (Han et al. 2015, arXiv:1506.02626)."""
    weighty = _weighty(network)
    sizes = torch.cat([module.weight.detach().abs().flatten() for module in weighty])
    threshold = sizes.sort().values[int(zeros * (len(sizes) - 1))]
    for module in weighty:
        parametrize.register_parametrization(
            module, "weight", Masked((module.weight.detach().abs() > threshold).float())
        )


def put_on_grid(network: nn.Module, bits: int) -> None:
    """Round every weight to what `bits` can count, and what layers read to 8 bits, now and in all training to come."""
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", OnGrid(module.weight, bits))
            network.set_submodule(path, Rounded(FeaturesOnGrid(), module))


def settle(network: nn.Module) -> None:
    """Make masked and rounded weights plain ones, as they are; what layers read is no longer rounded."""
    for path, module in list(network.named_modules()):
        if isinstance(module, Rounded):
            network.set_submodule(path, module[1])
        elif parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _weighty(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _best_share(rows: Tensor, largest: int) -> Tensor:
    """How much of the largest of each of `rows` `[O, I]` the grid should reach: with few bits, cutting it off pays."""
    shares = torch.linspace(0.3, 1, 29)[:, None, None]
    steps = shares * rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / largest
    error = ((rows / steps).round().clamp(-largest, largest) * steps - rows).square().sum(2)
    return shares.flatten()[error.argmin(0)]
