"""The batches of an epoch. All that chance decides in them follows from the seed, the epoch and the step alone.

So student and baseline see the same batches, a resumed run goes on exactly where it was stopped, and several
processes, each taking its part of a batch, together see what one would.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from handler.errors import DistilleryError
from training.config import TrainSettings
from training.data import Split
from training.mixing import draw
from training.views import Views


@dataclass(frozen=True)
class Batch:
    """Views of training images `[B, C, H, W]`, uint8 or (mixed) floats in 0..255, and what is known of them.

    `labels`, int64 `[B]`: the class, that of the larger part where two are mixed; −1 where it is not known.
    `targets`, float32 `[B, K]`: its probabilities, smoothed and mixed; zeros where it is not known.
    `index` and `view`, int64 `[B]`, name the picture to a bank.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor
    index: Tensor
    view: Tensor


class Batches:
    """`steps` batches an epoch of `settings.batch_size` samples out of `split`, which has `classes` classes.

    `images` is how many make an epoch (none: as many as there are); with more, the split comes round again, so
    that a baseline with fewer images can have the student's budget. Raises DistilleryError when a batch is more.
    """

    def __init__(
        self, split: Split, views: Views, settings: TrainSettings, seed: int, classes: int, images: int | None = None
    ) -> None:
        self.split, self.views, self.settings, self.seed, self.classes = split, views, settings, seed, classes
        self.images = len(split) if images is None else images
        self.steps = self.images // settings.batch_size
        if self.steps == 0:
            raise DistilleryError(f"batch_size={settings.batch_size}: at most {self.images}, the training images")
        self.epoch = -1

    def take(self, epoch: int, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Part `part` of `parts` of the batch of that epoch and step, both counted from 0."""
        self._draw(epoch)
        size = self.settings.batch_size
        place = slice(step * size, (step + 1) * size)
        order, view = self.order[place], self.view[place]
        mixing = draw(self.settings, self._generator(f"{epoch}/{step}"), size, tuple(self.split.images.shape[2:]))
        rows = slice(part * size // parts, (part + 1) * size // parts)
        images, targets, labels = self._look_up(order[rows], view[rows])
        if mixing.partner is not None:
            partner = mixing.partner.to(order.device)[rows]
            other, other_targets, other_labels = self._look_up(order[partner], view[partner])
            images, targets = mixing.mixed(images, other), mixing.shared(targets, other_targets)
            labels = labels if mixing.share >= 0.5 else other_labels
        images = mixing.erased(images, rows)
        return Batch(images, labels, targets, order[rows], view[rows])

    def _look_up(self, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views, targets and labels of the images at `index`."""
        labels, held = self.split.labels[index], self.split.images
        images = self.views.apply(held[index.to(held.device)].to(index.device), view)
        known = (labels >= 0)[:, None]
        smoothing = self.settings.label_smoothing
        targets = F.one_hot(labels.clamp(min=0), self.classes) * (1 - smoothing) + smoothing / self.classes
        return images, targets * known, labels

    def _draw(self, epoch: int) -> None:
        """The epoch's order of the images and the view of each place in it."""
        if epoch == self.epoch:
            return
        generator, count = self._generator(str(epoch)), len(self.split)
        rounds = -(-self.images // count)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[: self.images]
        view = torch.randint(len(self.views), (self.images,), generator=generator)
        device = self.split.labels.device
        self.epoch, self.order, self.view = epoch, order.to(device), view.to(device)

    def _generator(self, place: str) -> torch.Generator:
        number = int.from_bytes(hashlib.blake2b(f"{self.seed}/{place}".encode(), digest_size=7).digest())
        return torch.Generator().manual_seed(number)
