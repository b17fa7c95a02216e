"""Teachers and students: ours (handler/networks.py), torchvision's by name, one's own code or exported program.

`residual` and `resnet18` are names; `models/mine.py:make` is a function that makes a network; `teacher.pt2` is an
exported program, which can teach but not be trained. What they take and give is the same for all of them.
"""

import importlib.util
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from handler.engines import read_program
from handler.errors import DistilleryError, SettingsError, line, unknown
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


class Program(nn.Module):
    """A frozen exported program: uint8 `[B, C, H, W]` → logits `[B, K]`; floats in 0..255 are rounded for it."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.exported, self.device = exported, torch.device("cpu")
        self.program = exported.module().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Note the mode and change nothing: an exported program has one only."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, K]`."""
        logits: Tensor = self.program(images.round().to(torch.uint8) if images.is_floating_point() else images)
        return logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()` ends in: a program has its device written into its steps, so it is made anew for another."""
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self.exported, self.device = move_to_device_pass(self.exported, device), device
            self.program = self.exported.module().requires_grad_(False)
        return self


def build(
    name: str, *, channels: int, size: tuple[int, int], classes: int, mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """A network, uint8 `[B, channels, *size]` → logits `[B, classes]`; arguments as in handler/networks.py.

    `name` is one of ours or of torchvision's, `FILE.py:FUNCTION`, or `FILE.pt2`. All but the last are new, and
    begin with a layer `normalize`. A torchvision model that cannot take images this small gets them enlarged to
    224×224. Raises SettingsError for an unknown name, naming the nearest one, and for files that do not fit.
    """
    probe = torch.zeros(3, channels, *size, dtype=torch.uint8)
    if name.endswith(".pt2"):
        return _exported(name, probe, classes)
    if not len(mean) == len(std) == channels:
        raise SettingsError(f"mean, std: expected {channels} numbers, one for each channel, got {mean} and {std}")
    if name in NETWORKS:
        return build_ours(name, channels=channels, size=size, classes=classes, mean=mean, std=std)
    layers: dict[str, nn.Module] = {"normalize": Normalize(mean, std)}
    if ".py:" in name:
        layers["model"] = _own(name, channels, size, classes)
        network = nn.Sequential(OrderedDict(layers))
        _check(name, network, probe, classes)
        return network
    model = _torchvision(name, channels, classes)
    if not _takes(model, probe[:1].float()):
        layers["enlarge"] = Upsample(NATIVE)
    return nn.Sequential(OrderedDict({**layers, "model": model}))


def _own(name: str, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """What the function in `FILE.py:FUNCTION` makes."""
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise SettingsError(f"{file}: no such file; expected the Python file that defines {function}()")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and others look their module up
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        model = make(channels, size, classes) if callable(make) else None
    except Exception as error:  # whatever the user's code raises
        raise SettingsError(f"{name}: {line(error)}") from error
    if not callable(make):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise SettingsError(f"{file}: has no function '{function}'; it defines {known or 'none'}")
    if not isinstance(model, nn.Module):
        raise SettingsError(f"{name}: expected it to return a torch.nn.Module, got {type(model).__name__}")
    return model


def _exported(name: str, probe: Tensor, classes: int) -> Program:
    if not zipfile.is_zipfile(name):
        raise SettingsError(f"{name}: expected a file that torch.export.save wrote")
    try:
        network = Program(read_program(Path(name)))
    except Exception as error:  # torch raises whatever the unpickler met
        raise SettingsError(f"{name}: not an exported program that can be loaded: {line(error)}") from error
    for count in (1, 3):
        _check(name, network, probe[:count], classes)
    return network


def _check(name: str, network: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse a network that does not give logits `[B, classes]` for `images`."""
    shape = ", ".join(map(str, images.shape[1:]))
    network.eval()
    try:
        with torch.no_grad():
            logits = network(images)
    except Exception as error:  # whatever the user's code raises
        given = isinstance(network, Program)
        takes = f"uint8 [B, {shape}] of any B, a dynamic dimension" if given else f"floats [B, {shape}]"
        raise SettingsError(f"{name}: expected it to take {takes}; for B = {len(images)}: {line(error)}") from error
    finally:
        network.train()
    if not isinstance(logits, Tensor) or logits.shape != (len(images), classes) or not logits.is_floating_point():
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingsError(f"{name}: expected logits of shape [{len(images)}, {classes}], got {got}")


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


def load_weights(network: nn.Module, path: Path) -> None:
    """Give `network` the weights in `path`: all of them or, with a DistilleryError that says what differs, none.

    The file holds a state dict of the network as `build` makes it, or of the model inside, without normalisation
    (which then stays as it is). Either may be wrapped, as checkpoints are, and come from a parallel or compiled
    network.
    """
    state, own = _state(path), network.state_dict()
    # Old files count no batches; a bare model does not normalise.
    spare = {k: v for k, v in own.items() if k.startswith("normalize.") or k.endswith("num_batches_tracked")}
    readings = [{**spare, **state}, {**spare, **{f"model.{key}": value for key, value in state.items()}}]
    best = max(readings, key=lambda reading: len(own.keys() & reading.keys()) - len(reading.keys() - own.keys()))
    wrong = {
        "missing": [key for key in own if key not in best],
        "unexpected": [key for key in best if key not in own],
        "of another shape": [
            f"{key} {list(best[key].shape)} for {list(own[key].shape)}"
            for key in own
            if key in best and best[key].shape != own[key].shape
        ],
    }
    if any(wrong.values()):
        differences = "; ".join(f"{kind}: {_few(keys)}" for kind, keys in wrong.items() if keys)
        raise DistilleryError(f"{path}: not the weights of this network with its {len(own)} tensors: {differences}")
    network.load_state_dict(best)


def _state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, unwrapped, its keys without what parallel and compiled networks put before them."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DistilleryError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises whatever the unpickler met
        raise DistilleryError(f"{path}: expected what torch.save(network.state_dict(), …) wrote") from error
    for wrapper in ("network", "state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise DistilleryError(
            f"{path}: expected a state dict (names and tensors), or one under network, state_dict "
            f"or model; got {_few(list(found)) if isinstance(found, Mapping) else type(found)}"
        )
    state = dict(found)
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _few(keys: list[str]) -> str:
    return ", ".join(map(str, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") or "nothing"
