"""Inside the student: the features that its last layer reads, and which pixels an answer hangs on.

Both come from the archive's weights in PyTorch, whichever engine serves, loaded when they are first asked for.
B images, C channels, H and W pixels, F features; images are uint8 `[B, C, H, W]`.
"""

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from handler.bundle import FILES
from handler.contract import Contract, Pixels
from handler.engines import network_of, on_torch
from handler.errors import NotOffered
from handler.networks import NETWORKS


class Inside:
    """What can be seen in the student of `root`; NotOffered when its network is none of ours."""

    def __init__(self, root: Path, contract: Contract, device: str = "cpu") -> None:
        self.weights, self.contract, self.device = root / FILES.weights, contract, device
        self.open = contract.network in NETWORKS and self.weights.is_file()
        self.explains = self.open and find_spec("captum") is not None

    @functools.cached_property
    def network(self) -> nn.Module:
        """The eager network."""
        if not self.open:
            known = f"expected the weights of one of {', '.join(NETWORKS)}"
            raise NotOffered(f"network '{self.contract.network}' has no features and no explanations: {known}")
        return network_of(self.weights, self.contract).to(self.device)

    def features(self, images: Pixels) -> NDArray[np.float32]:
        """What the last layer reads, float32 `[B, F]`."""
        return on_torch(nn.Sequential(*list(self.network.children())[:-1]), self.device)(images)

    def saliency(self, images: Pixels, classes: Sequence[int]) -> NDArray[np.float32]:
        """Of each pixel how much it moves the logit of the image's class, `[B, H, W]`.

        That is the largest slope among its channels, without sign; the largest of an image is 1, unless all are 0.
        """
        network = self.network
        try:
            from captum.attr import Saliency
        except ImportError:
            raise NotOffered("an explanation needs captum where the server runs: pip install captum") from None
        pixels = torch.from_numpy(images).to(self.device).float().requires_grad_()
        slopes = Saliency(network).attribute(pixels, target=list(classes)).amax(dim=1)
        largest = slopes.amax(dim=(1, 2), keepdim=True)
        maps: NDArray[np.float32] = (slopes / largest.where(largest > 0, 1)).cpu().numpy()
        if not np.isfinite(maps).all():
            raise FloatingPointError("the slopes of the student are not finite")
        return maps
