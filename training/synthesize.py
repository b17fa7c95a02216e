"""Images made from the teacher alone, for a student that may see no others (data-free distillation).

DeepInversion (Yin et al. 2020, CVPR, arXiv:1912.08795): noise is moved by Adam until the teacher sees the wanted
class in it and the statistics inside the teacher are those of its training images, which its BatchNorms remember.
"""

import copy
import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from handler.errors import DistilleryError
from training.config import SynthesisSettings
from training.data import Split
from training.progress import bar
from training.schedule import one_cycle
from training.views import Views

log = logging.getLogger(__name__)
BATCH = 250  # images optimised together: enough for the statistics of a batch to mean something
JITTER = Views(shift=1, flip=False)


class Inversion:
    """What is asked of a batch of images: a frozen copy of the teacher, and the loss that the images lower.

    `views` are those under which the teacher must see the same: one is drawn for each image and step. `precision`
    below float32 means autocast. The teacher itself is never touched: not its mode, hooks or device either.
    """

    def __init__(
        self,
        teacher: nn.Module,
        settings: SynthesisSettings,
        device: torch.device,
        views: Views = JITTER,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.network = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings, self.device, self.views, self.precision = settings, device, views, precision
        self.distances: list[Tensor] = []
        remembering = [m for m in self.network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        for module in remembering:
            module.register_forward_pre_hook(self._compare)
        if not remembering:
            log.info("synthesize: the teacher has no BatchNorm whose statistics could be matched; without that term")

    def run(
        self, labels: Tensor, shape: tuple[int, int, int], generator: torch.Generator, advance: Callable[[], None]
    ) -> Tensor:
        """An image uint8 `[B, *shape]` for each of `labels`, int64 `[B]`; `advance` is called after each step.

        Raises DistilleryError when they are not finite.
        """
        labels = labels.to(self.device)
        levels = [level.to(self.device).requires_grad_() for level in noise(len(labels), shape, generator)]
        optimizer = torch.optim.Adam(levels)
        for step in range(self.settings.steps):
            optimizer.param_groups[0]["lr"] = self.settings.learning_rate * one_cycle(step / self.settings.steps, 0)
            view = torch.randint(len(self.views), (len(labels),), generator=generator).to(self.device)
            optimizer.zero_grad()
            self.loss(pixels_of(levels), labels, view).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            clip(levels)
            advance()
        pixels = pixels_of(levels).detach()
        if not pixels.isfinite().all():
            raise DistilleryError(
                "synthesize: the images are not finite, as the teacher's gradients are not; "
                "expected a teacher with finite weights, or one that is asked in float32"
            )
        return pixels.mul(255).round().byte().cpu()

    def loss(self, pixels: Tensor, labels: Tensor, view: Tensor) -> Tensor:
        """Of pixels in 0..1, `[B, C, H, W]`: cross-entropy + R_feature + R_TV, each with its weight (eq. 2 to 4)."""
        self.distances.clear()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.network(255 * self.views.apply(pixels, view))
        matched = self.settings.statistics * sum(self.distances, torch.zeros((), device=self.device))
        return F.cross_entropy(logits.float(), labels) + matched + self.settings.smoothness * variation(pixels)

    def _compare(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        """‖mean − running mean‖ + ‖variance − running variance‖ of a BatchNorm's input (eq. 4)."""
        assert isinstance(module, _BatchNorm)
        assert module.running_mean is not None
        assert module.running_var is not None
        channels = inputs[0].float().transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(channels, dim=1)
        self.distances.append((mean - module.running_mean).norm() + (variance - module.running_var).norm())


def noise(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
    """Grey noise as a pyramid: levels `[count, C, h, w]`, the first of full size, each next one of half the sides.

    Adam moves every number by about as much, so that single pixels hide the shapes; in a pyramid what is coarse
    moves as easily as what is fine (Olah et al. 2017, doi:10.23915/distill.00007, section on preconditioning).
    """
    channels, height, width = shape
    sizes = [(height >> k, width >> k) for k in range(min(height, width).bit_length() - 1)] or [(height, width)]
    levels = [0.1 * torch.randn(count, channels, *size, generator=generator) for size in sizes]
    levels[0] += 0.5
    clip(levels)
    return levels


def pixels_of(levels: list[Tensor]) -> Tensor:
    """The images that a pyramid stands for: the sum of its levels, enlarged to the first one's size."""
    size = levels[0].shape[2:]
    larger = [F.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in levels[1:]]
    return torch.stack([levels[0], *larger]).sum(0)


@torch.no_grad()
def clip(levels: list[Tensor]) -> None:
    """Bring the images into 0..1, by their finest level alone."""
    pixels = pixels_of(levels)
    levels[0] += pixels.clamp(0, 1) - pixels


def variation(pixels: Tensor) -> Tensor:
    """Mean over `[B, C, H, W]` of an image's sum of squared differences between neighbours.

    Total variation with β = 2: Mahendran and Vedaldi 2015, arXiv:1412.0035, section 2.
    """
    down, right = pixels.diff(dim=2), pixels.diff(dim=3)
    return (down.square().sum() + right.square().sum()) / len(pixels)


def synthesize(
    teacher: nn.Module,
    shape: tuple[int, int, int],
    classes: int,
    settings: SynthesisSettings,
    seed: int,
    device: torch.device,
    views: Views = JITTER,
    precision: torch.dtype = torch.float32,
) -> Split:
    """`settings.images` images uint8 `[N, *shape]`, and the class 0..classes−1 that each was made for, int64 `[N]`.

    As many of each class as of any other, give or take one, in every batch too. `teacher` is a network, uint8 or
    floats in 0..255 → logits. The same for the same seed on a CPU. Raises DistilleryError when an image is not finite.
    """
    inversion = Inversion(teacher, settings, device, views, precision)
    labels = torch.arange(settings.images) % classes
    parts = labels.tensor_split(math.ceil(settings.images / BATCH))  # none much smaller than the others
    generator = torch.Generator().manual_seed(seed)
    with bar("synthesize", len(parts) * settings.steps) as advance:
        images = [inversion.run(part, shape, generator, advance) for part in parts]
    return Split(torch.cat(images), labels)
