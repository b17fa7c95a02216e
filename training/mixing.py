"""Mixtures of images that no finite set of views holds: mixup, cutmix and random erasing.

They are made before teacher and student look, so that both see the same picture; only a live teacher can.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.config import TrainSettings


@dataclass(frozen=True)
class Mixing:
    """What chance decided for one batch.

    `partner`, int64 `[B]`, is who is mixed with whom (none: nobody) and `share`, 0..1, how much of itself each
    keeps; `box`, bool `[H, W]`, is where cutmix puts the partner (none: mixup blends). `holes`, bool
    `[B, 1, H, W]`, is what is erased (none: nothing).
    """

    partner: Tensor | None = None
    share: float = 1.0
    box: Tensor | None = None
    holes: Tensor | None = None

    def mixed(self, images: Tensor, other: Tensor) -> Tensor:
        """Images and those of their partners `[B, C, H, W]` as one: uint8 where cut, floats in 0..255 where blended."""
        if self.box is not None:
            return torch.where(self.box.to(images.device), other, images)
        return self.share * images.float() + (1 - self.share) * other.float()

    def shared(self, targets: Tensor, other: Tensor) -> Tensor:
        """Targets `[B, K]` in the shares of the images."""
        return self.share * targets + (1 - self.share) * other

    def erased(self, images: Tensor, rows: slice) -> Tensor:
        """The images of `rows` of the batch with their holes, which are black."""
        if self.holes is None:
            return images
        return images.masked_fill(self.holes[rows].to(images.device), 0)


def draw(settings: TrainSettings, generator: torch.Generator, count: int, size: tuple[int, ...]) -> Mixing:
    """What happens to a batch of `count` images of `size` (height, width); with both, mixup or cutmix by a coin.

    mixup: share from Beta(α, α) (Zhang et al. 2018, arXiv:1710.09412, eq. 1); cutmix: a box of area 1 − share
    (Yun et al. 2019, arXiv:1905.04899, eq. 1 and 2), the share then being what is really left; erasing: a box of
    2 to 33 % of the area and of aspect 0.3 to 3.3 (Zhong et al. 2017, arXiv:1708.04896, algorithm 1).
    """
    holes = _holes(settings.erasing, generator, count, size) if settings.erasing else None
    if not settings.mixup and not settings.cutmix:
        return Mixing(holes=holes)
    cut = not settings.mixup or (settings.cutmix > 0 and torch.rand((), generator=generator) < 0.5)
    share = _beta(settings.cutmix if cut else settings.mixup, generator)
    partner = torch.randperm(count, generator=generator)
    if not cut:
        return Mixing(partner, share, None, holes)
    side = math.sqrt(1 - share)
    box = _box(size, (side * size[0], side * size[1]), torch.rand(2, generator=generator).tolist())
    return Mixing(partner, 1 - box.float().mean().item(), box, holes)


def _holes(share: float, generator: torch.Generator, count: int, size: tuple[int, ...]) -> Tensor:
    holes = torch.zeros(count, 1, *size, dtype=torch.bool)
    for i in (torch.rand(count, generator=generator) < share).nonzero().flatten().tolist():
        area, aspect, y, x = torch.rand(4, generator=generator).tolist()
        pixels = (0.02 + 0.31 * area) * size[0] * size[1]
        ratio = math.exp(math.log(0.3) * (1 - 2 * aspect))
        holes[i, 0] = _box(size, (math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)), [y, x])
    return holes


def _box(size: tuple[int, ...], sides: tuple[float, float], centre: list[float]) -> Tensor:
    """A box of `sides` around `centre` (both as y, x; the latter 0..1), cut off at the edges: bool `size`."""
    box = torch.ones(*size, dtype=torch.bool)
    for axis in (0, 1):
        place = torch.arange(size[axis]) + 0.5
        inside = (place - centre[axis] * size[axis]).abs() <= sides[axis] / 2
        box &= inside.view(-1, 1) if axis == 0 else inside
    return box


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(α, α); torch's own takes no generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))
