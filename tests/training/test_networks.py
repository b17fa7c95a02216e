"""Networks by name: raw uint8 in, logits out."""

import pytest
import torch

from handler.errors import SettingsError
from training.networks import build

STATISTICS = {"mean": [0.5], "std": [0.25]}


def make(name: str, channels: int = 1, size: tuple[int, int] = (28, 28), classes: int = 10) -> torch.nn.Sequential:
    return build(name, channels=channels, size=size, classes=classes, mean=[0.5] * channels, std=[0.25] * channels)


@pytest.mark.parametrize("name", ["residual", "separable", "seed_teacher", "seed_student"])
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 48))])
def test_ours_take_any_size_and_channels(name: str, channels: int, size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8)
    logits = make(name, channels, size, classes=7)(images)
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet"])
def test_torchvision_by_name_at_the_datas_size(name: str) -> None:
    network = make(name, classes=7)
    assert network(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 7)


@pytest.mark.parametrize("name", ["alexnet", "vit_b_32", "squeezenet1_1"])
def test_torchvision_models_for_large_images_get_them_enlarged(name: str) -> None:
    network = make(name, size=(16, 16), classes=3).eval()
    assert network(torch.zeros(1, 1, 16, 16, dtype=torch.uint8)).shape == (1, 3)


def test_normalisation_is_part_of_the_network() -> None:
    network = make("separable")
    image = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert network[0](image).flatten().tolist() == pytest.approx([-2.0, 2.0])
    assert {"0.mean", "0.std"} <= network.state_dict().keys()


def test_the_student_is_small() -> None:
    parameters = {name: sum(p.numel() for p in make(name).parameters()) for name in ("separable", "residual")}
    assert parameters["separable"] <= 60_000 < parameters["residual"]


@pytest.mark.parametrize(("name", "hint"), [("resnet19", "resnet1"), ("seperable", "separable"), ("zzz", "one of")])
def test_an_unknown_name_is_an_error_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(SettingsError, match=hint):
        make(name)


def test_an_image_too_small_for_the_seeds_is_an_error() -> None:
    with pytest.raises(SettingsError, match="2×2 pixels"):
        make("seed_teacher", size=(2, 2))
