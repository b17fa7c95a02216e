"""A data set in three splits, and how images are chosen for one: the same way for ever, on every machine."""

from dataclasses import dataclass

import torch
from torch import Tensor

from handler.errors import DistilleryError

WHOLE = 2**26
"""Pixels that `statistics` takes at once, and as float32: 256 MiB."""


class DataError(DistilleryError):
    """Data that cannot be found, is not what its checksum says, or is too little for what was asked."""


RESIDENT = 8 * 10**9
"""Bytes of images that a device is given to hold."""


@dataclass(frozen=True)
class Split:
    """Images uint8 `[N, C, H, W]` and their labels int64 `[N]`; −1 where the label is not known."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        """The images at `index`, int64 `[M]`."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        """The same split, held by `device`; images of more than 8 GB stay where they are, to be taken in parts."""
        near = self.images.to(device) if self.images.numel() <= RESIDENT else self.images
        return Split(near, self.labels.to(device))


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set in three splits; `digest` identifies its bytes and how they were split."""

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    digest: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the training pixels, scaled to 0..1."""
        images = self.train.images
        if images.numel() > WHOLE:
            return _counted(images)
        pixels = images.transpose(0, 1).flatten(1).float() / 255
        return pixels.mean(1).tolist(), pixels.std(1).tolist()


def _counted(images: Tensor) -> tuple[list[float], list[float]]:
    """The same two from how often each channel has each value 0..255, counted part by part: exact, at any size."""
    count = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in torch.split(images, max(1, WHOLE // images[0].numel())):
        for channel in range(len(count)):
            count[channel] += torch.bincount(part[:, channel].flatten(), minlength=256)
    value, total = torch.arange(256) / 255.0, count.sum(1)
    mean = (count * value.double()).sum(1) / total
    squares = (count * (value.double() - mean[:, None]) ** 2).sum(1)
    return mean.tolist(), (squares / (total - 1)).sqrt().tolist()


def stratified(labels: Tensor, count: int, classes: int) -> Tensor:
    """`count` indices, equally many of each class, sorted; always the same ones for the same labels.

    DataError when that would leave a class with no image outside.
    """
    sizes = torch.bincount(labels, minlength=classes)
    smallest = int(sizes.min())
    share, rest = divmod(count, classes)
    for k, size in enumerate(sizes.tolist()):
        if size <= share + (k < rest):
            most = classes * (smallest - 1)
            remedy = f"set data.validation={most} or less" if most > 0 else "every class needs at least 2"
            raise DataError(f"data.validation={count}: class {k} has only {size} images; {remedy}")
    return _in_turns(labels, classes)[:count].sort().values


def partially_labelled(split: Split, count: int, classes: int) -> Split:
    """The same images with the labels of `count` of them, as many of each class as there are; −1 elsewhere."""
    known = _in_turns(split.labels, classes)[:count]
    labels = torch.full_like(split.labels, -1)
    labels[known] = split.labels[known]
    return Split(split.images, labels)


def thinned(count: int, limit: int) -> Tensor:
    """`limit` of the indices 0..count − 1 in even steps, so that files sorted by class keep their mix; 0: all."""
    kept = min(limit, count) if limit else count
    return torch.arange(kept) * count // max(kept, 1)


def _in_turns(labels: Tensor, classes: int) -> Tensor:
    """All indices: one of each class in turn, for as long as it has any left.

    Within a class the order is that of a multiplicative hash of the index (Knuth, TAOCP 3, section 6.4), so
    it depends on no library's random generator.
    """
    order = torch.argsort(torch.arange(len(labels)) * 2654435761 % 2**32)
    order = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels, minlength=classes)
    turn = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order[torch.argsort(turn, stable=True)]
