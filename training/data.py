"""Data sets by name as one uint8 tensor: found, verified, split; batches are taken by index.

    python -m training data training/experiments/quickstart.yaml

The published ones are looked for and fetched by training/sources.py and training/cifar.py, a folder of one's own
images is read by training/folders.py.
"""

import hashlib
from pathlib import Path

import torch

from training import cifar, folders, sources
from training.config import DataSettings
from training.splits import DataError, Dataset, Split, partially_labelled, stratified, thinned

__all__ = ["DataError", "Dataset", "Split", "load", "partially_labelled", "stratified", "thinned"]


def load(settings: DataSettings) -> Dataset:
    """The data set, verified and split; DataError when it is nowhere to be had or is damaged.

    `settings.labelled` changes nothing here: which labels are known is the student's affair.
    """
    if settings.name == "folder":
        return folders.read(settings)
    folder = Path(settings.root) / settings.name
    found = cifar.obtain(folder) if settings.name == "cifar10" else sources.obtain(settings.name, folder)
    held_out = stratified(found.train.labels, settings.validation, len(found.labels))
    kept = torch.ones(len(found.train), dtype=torch.bool)
    kept[held_out] = False
    limits = f"{settings.validation}/{settings.train_limit}/{settings.test_limit}"
    return Dataset(
        name=settings.name,
        labels=found.labels,
        train=_limited(found.train.take(kept.nonzero().squeeze(1)), settings.train_limit),
        validation=_limited(found.train.take(held_out), settings.train_limit),
        test=_limited(found.test, settings.test_limit),
        digest=hashlib.sha256("/".join([*found.digests, limits]).encode()).hexdigest(),
    )


def _limited(split: Split, limit: int) -> Split:
    """The first `limit` images: a mix of the classes, for the published sets come shuffled."""
    return split.take(torch.arange(min(limit, len(split)))) if limit else split
