"""What a network says, inside too: any module's output by its path, without editing the model's `forward`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from handler.errors import SettingsError, unknown


@dataclass(frozen=True)
class Output:
    """Logits `[B, K]` and the features `[B, …]` that were asked for, by module path; all float32."""

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


class Features:
    """A context in which the outputs of named modules are gathered; its hooks are gone afterwards.

    Hook the bare network, not one wrapped for several processes. A module that is called more than once gives
    its last output. Raises SettingsError for a path that the network lacks, naming the nearest.
    """

    def __init__(self, network: nn.Module, paths: Iterable[str]) -> None:
        self.network, self.paths = network, tuple(paths)
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        modules = dict(self.network.named_modules())
        for path in self.paths:
            if path not in modules:
                raise SettingsError(unknown("layer", path, [name for name in modules if name]))
        self.handles = [modules[path].register_forward_hook(_gather(found, path)) for path in self.paths]
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()


def forward(network: nn.Module, images: Tensor, paths: Iterable[str] = ()) -> Output:
    """What `network` says of uint8 or float `[B, C, H, W]`, with the outputs of the modules at `paths`.

    Raises SettingsError for a path that Features refuses, and for a module that the network has but never calls.
    """
    paths = tuple(paths)
    with Features(network, paths) as found:
        logits = network(images)
    for path in paths:
        if path not in found:
            raise SettingsError(f"layer {path}: expected one that the network calls, but it never does")
    return Output(logits.float(), {path: feature.float() for path, feature in found.items()})


def _gather(found: dict[str, Tensor], path: str) -> Callable[[nn.Module, object, object], None]:
    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        if not isinstance(output, Tensor):
            raise SettingsError(f"layer {path}: expected one that returns a tensor, got {type(output).__name__}")
        # A copy: what follows may work in place, as torchvision's ReLU does.
        found[path] = output.clone()

    return hook
