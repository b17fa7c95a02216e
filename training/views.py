"""Augmentation as a finite, replayable set of views: view v of an image is always the same picture.

Because the set is finite, teacher and student see the same view by sharing an index, and what a teacher says
of a view can be stored. View 0 is the image itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Views:
    """All shifts by up to `shift` pixels each way (zeros move in), each with and without a mirror image if `flip`."""

    shift: int
    flip: bool

    def __len__(self) -> int:
        return (2 * self.shift + 1) ** 2 * (2 if self.flip else 1)

    def apply(self, images: Tensor, view: Tensor) -> Tensor:
        """View `view[i]` of `images[i]`: uint8 `[B, C, H, W]`, int64 `[B]` in 0..len(self) → uint8 `[B, C, H, W]`."""
        side = 2 * self.shift + 1
        place, mirrored = view % side**2, view >= side**2
        # (place + centre) mod side²: place 0 is the centre, so that view 0 changes nothing.
        place = (place + side**2 // 2) % side**2
        if self.shift:
            images = self._shifted(images, place // side, place % side)
        if self.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images

    def _shifted(self, images: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        windows = F.pad(images, (self.shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(len(images), device=images.device), :, dy, dx]
