"""Teachers and students by name: ours (handler/networks.py) and torchvision's classification models."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.errors import SettingsError, unknown
from handler.networks import NETWORKS, Normalize
from handler.networks import build as build_ours

NATIVE = 224  # pixels; the side that torchvision's models are made for


class Upsample(nn.Module):
    """Bilinear enlargement of `[B, C, H, W]` to a square of `side` pixels, for models that need large images."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C, side, side]`."""
        return F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)


def build(
    name: str, *, channels: int, size: tuple[int, int], classes: int, mean: Sequence[float], std: Sequence[float]
) -> nn.Sequential:
    """A new network, uint8 `[B, channels, *size]` → logits `[B, classes]`; arguments as in handler/networks.py.

    A torchvision model that cannot take images this small gets them enlarged to 224×224.
    Raises SettingsError for an unknown name, naming the nearest one.
    """
    if name in NETWORKS:
        return build_ours(name, channels=channels, size=size, classes=classes, mean=mean, std=std)
    model = _torchvision(name, channels, classes)
    probe = torch.zeros(1, channels, *size)
    layers: dict[str, nn.Module] = {"normalize": Normalize(mean, std)}
    if not _takes(model, probe):
        layers["enlarge"] = Upsample(NATIVE)
    return nn.Sequential(OrderedDict({**layers, "model": model}))


def _torchvision(name: str, channels: int, classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise SettingsError(unknown("network", name, [*NETWORKS, *known]))
    # The two with auxiliary heads answer with a tuple in training unless these are left out.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **extra)
    _set_channels(model, channels)
    return model


def _set_channels(model: nn.Module, channels: int) -> None:
    """Put a convolution that reads `channels` channels where the model's first one is."""
    path, conv = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels == channels:
        return
    parent, _, leaf = path.rpartition(".")
    same = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]  # stored as tuple[int, ...]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    setattr(model.get_submodule(parent), leaf, same)


def _takes(model: nn.Module, images: Tensor) -> bool:
    model.eval()
    try:
        with torch.inference_mode():
            model(images)
    except (RuntimeError, AssertionError, ValueError):
        return False
    finally:
        model.train()
    return True
