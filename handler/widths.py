"""A state dict with fewer channels than its architecture has: what structured pruning leaves."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Which dimensions of a weight count channels that structured pruning may have taken away.
CHANNELS: dict[type[nn.Module], tuple[int, ...]] = {nn.Conv2d: (0, 1), nn.BatchNorm2d: (0,), nn.Linear: (0, 1)}


def fit(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict; where its layers have fewer channels than those of `network`, the rest is cut off.

    So a student whose channels were pruned needs no architecture of its own. Raises RuntimeError, as
    `load_state_dict` does, for the state of another network, or of other classes, which the last layer puts out.
    """
    layers = [(path, module) for path, module in network.named_modules() if type(module) in CHANNELS]
    for place, (path, module) in enumerate(layers, 1):
        shapes = {name: state[f"{path}.{name}"].shape for name in module.state_dict() if f"{path}.{name}" in state}
        _narrow(module, shapes, (1,) if place == len(layers) else CHANNELS[type(module)])
    network.load_state_dict(state)


def _narrow(module: nn.Module, shapes: Mapping[str, torch.Size], dimensions: tuple[int, ...]) -> None:
    for name, shape in shapes.items():
        old = getattr(module, name)
        pairs = list(enumerate(zip(shape, old.shape, strict=False)))
        fewer = all(n == m or (n < m and d in dimensions) for d, (n, m) in pairs)
        if shape == old.shape or len(shape) != old.ndim or not fewer:
            continue
        new = old.new_empty(shape)
        setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        if isinstance(module, nn.Conv2d) and name == "weight":
            depthwise = module.groups == module.in_channels == module.out_channels > 1
            module.groups = shape[0] if depthwise else module.groups
            module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
        elif isinstance(module, nn.Linear) and name == "weight":
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = shape[0]
