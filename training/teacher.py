"""A teacher is one call: (images, index, view) → logits. The student never learns where they come from."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Teacher(Protocol):
    """What a student may ask: the teacher's logits `[B, K]` for views of training images.

    `images` are the views themselves, uint8 `[B, C, H, W]`; `index` and `view`, int64 `[B]`, name them.
    """

    def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Logits float32 `[B, K]`."""
        ...


class LiveTeacher:
    """A frozen network: in eval mode, without gradients, its parameters and statistics never touched."""

    def __init__(self, network: nn.Module, precision: torch.dtype) -> None:
        self.network = network.eval().requires_grad_(False)
        self.precision = precision

    def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Logits float32 `[B, K]` of uint8 `[B, C, H, W]`."""
        reduced = self.precision != torch.float32
        with torch.inference_mode(), torch.autocast(images.device.type, self.precision, enabled=reduced):
            logits: Tensor = self.network(images)
        # A copy outside inference mode may take part in autograd.
        return logits.float().clone()
