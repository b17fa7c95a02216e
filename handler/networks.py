"""Architectures that can be served from a bare state dict: raw uint8 pixels in, logits out.

Shapes: B batch, C input channels, H and W pixels, K classes. Every network takes uint8 `[B, C, H, W]` and
returns float logits `[B, K]`; scaling and normalisation are buffers of its first layer, so they travel in
the state dict and in every export, and nobody normalises twice.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from handler.errors import SettingsError, unknown

Layers = dict[str, nn.Module]
"""The layers of a network in their order; their names are those by which hints and state dicts know them."""


class Normalize(nn.Module):
    """uint8 `[B, C, H, W]` → float32 `[B, C, H, W]`: `(x / 255 - mean) / std`, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() / 255.0 - self.mean) / self.std


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then BatchNorm: the size of the grid is kept, or divided by `stride`."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385, figure 2 left)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(cin, cout, 3, stride), nn.ReLU(), conv_bn(cout, cout, 3))
        same = cin == cout and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class SeparableBlock(nn.Module):
    """Depthwise 3×3, then pointwise 1×1 (Howard et al. 2017, arXiv:1704.04861), with a shortcut where shapes allow."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        depthwise = conv_bn(cin, cin, 3, stride, groups=cin)
        self.body = nn.Sequential(depthwise, nn.ReLU(), conv_bn(cin, cout, 1))
        self.same = cin == cout and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.relu(y + x if self.same else y)


def staged(
    block: Callable[[int, int, int], nn.Module], cin: int, stages: Sequence[tuple[int, int, int]]
) -> dict[str, nn.Module]:
    """`stage1`, `stage2` …, each of `(channels, blocks, stride of its first block)`."""
    layers: dict[str, nn.Module] = {}
    for number, (cout, blocks, stride) in enumerate(stages, 1):
        layers[f"stage{number}"] = nn.Sequential(
            block(cin, cout, stride), *(block(cout, cout, 1) for _ in range(1, blocks))
        )
        cin = cout
    return layers


def classifier(channels: int, first: int, stages: Mapping[str, nn.Module], last: int, classes: int) -> Layers:
    """A stem of `first` channels, the stages, global average pooling, and one linear layer from `last` channels."""
    stem = nn.Sequential(conv_bn(channels, first, 3), nn.ReLU())
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {"stem": stem, **stages, "pool": pool, "head": nn.Linear(last, classes)}


def residual(channels: int, size: tuple[int, int], classes: int) -> Layers:
    """Our teacher: seven residual blocks, the first at full resolution; 0.70 M parameters, 25 M MACs at 28×28."""
    stages = staged(ResidualBlock, 16, [(16, 1, 1), (32, 2, 2), (64, 2, 2), (128, 2, 2)])
    return classifier(channels, 16, stages, 128, classes)


def separable(channels: int, size: tuple[int, int], classes: int) -> Layers:
    """Our student: seven depthwise-separable blocks; 43 k parameters, 2.4 M MACs at 28×28."""
    stages = staged(SeparableBlock, 16, [(32, 2, 2), (64, 3, 2), (128, 2, 1)])
    return classifier(channels, 16, stages, 128, classes)


def separable_wide(channels: int, size: tuple[int, int], classes: int) -> Layers:
    """Twice as wide, to be pruned: 0.16 M parameters, 8.7 M MACs at 28×28."""
    stages = staged(SeparableBlock, 32, [(64, 2, 2), (128, 3, 2), (256, 2, 1)])
    return classifier(channels, 32, stages, 256, classes)


def _seed(channels: int, size: tuple[int, int], classes: int, widths: Sequence[int], hidden: int) -> Layers:
    """Convolution, ReLU and 2×2 pooling per width, then two linear layers; the first fits the grid that is left."""
    grid = (size[0] >> len(widths)) * (size[1] >> len(widths))
    if grid == 0:
        raise SettingsError(f"image of {size[0]}×{size[1]} pixels: the seed networks halve it {len(widths)} times")
    layers: dict[str, nn.Module] = {}
    for number, (cin, cout) in enumerate(zip([channels, *widths], widths, strict=False), 1):
        layers[f"stage{number}"] = nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    layers["hidden"] = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * grid, hidden), nn.ReLU(), nn.Dropout(0.5))
    return {**layers, "head": nn.Linear(hidden, classes)}


def seed_teacher(channels: int, size: tuple[int, int], classes: int) -> Layers:
    """The plain convolutional teacher that the project began with."""
    return _seed(channels, size, classes, (64, 128, 256), 512)


def seed_student(channels: int, size: tuple[int, int], classes: int) -> Layers:
    """The plain convolutional student that the project began with."""
    return _seed(channels, size, classes, (16, 32), 64)


NETWORKS = {f.__name__: f for f in (residual, separable, separable_wide, seed_teacher, seed_student)}


def build(
    name: str,
    *,
    channels: int,
    size: tuple[int, int],
    classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """A new network: uint8 `[B, channels, *size]` → logits `[B, classes]`; size is (height, width) in pixels.

    `mean` and `std` (per channel, of pixels scaled to 0..1) matter only to training: a state dict brings its own.
    Raises SettingsError for an unknown name.
    """
    if name not in NETWORKS:
        raise SettingsError(unknown("network", name, NETWORKS))
    first = Normalize(mean or [0.0] * channels, std or [1.0] * channels)
    return nn.Sequential(OrderedDict({"normalize": first, **NETWORKS[name](channels, size, classes)}))
