"""What goes in and what comes out: the one description that training obeys and the worker serves by."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from handler.errors import BundleError, SettingsError
from handler.settings import load

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Input: uint8 pixels `[channels, height, width]`. Output: logits, one per label.

    `resize` bilinear: an image of another size is resampled to height × width by Pillow's antialiased
    bilinear filter, without keeping its aspect ratio. `network` names the architecture of the state dict.
    """

    version: Literal[1] = 1
    kind: Literal["image"] = "image"
    network: str
    channels: int
    height: int
    width: int
    dtype: Literal["uint8"] = "uint8"
    resize: Literal["bilinear"] = "bilinear"
    labels: tuple[str, ...]
    output: Literal["logits"] = "logits"

    @cached_property
    def size(self) -> int:
        """Numbers (and, being uint8, bytes) in one item: height · width · channels."""
        return self.height * self.width * self.channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """One item as the network takes it: (channels, height, width)."""
        return self.channels, self.height, self.width

    def to_json(self) -> str:
        """The text of contract.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Contract":
        """The contract in a file; BundleError when it is missing or not a contract."""
        try:
            return load(cls, json.loads(path.read_text()))
        except (OSError, ValueError, SettingsError) as error:
            raise BundleError(f"{path}: not a contract: {error}") from None


def probabilities(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Softmax of finite logits `[N, K]`, in float64: no overflow, and each row sums to 1 within 1e-12."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
