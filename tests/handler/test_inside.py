"""Features and saliency of every network of ours, beside the same by hand: its own layers, and autograd."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from handler.bundle import FILES
from handler.contract import Contract
from handler.errors import NotOffered
from handler.inside import Inside
from handler.networks import NETWORKS, build
from tests.bundles import blocks, settled

SIDE, LABELS = 12, ("a", "b", "c")


def contract_of(name: str, channels: int) -> Contract:
    return Contract(network=name, channels=channels, height=SIDE, width=SIDE, labels=LABELS)


def saved(folder: Path, name: str, channels: int) -> tuple[Inside, nn.Module]:
    """A network of random weights, and what opens them where they lie."""
    torch.manual_seed(0)
    network = build(name, channels=channels, size=(SIDE, SIDE), classes=len(LABELS))
    settled(network, blocks(32, channels, SIDE))
    torch.save(network.state_dict(), folder / FILES.weights)
    return Inside(folder, contract_of(name, channels)), network


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_what_the_last_layer_reads(tmp_path: Path, name: str, channels: int) -> None:
    inside, network = saved(tmp_path, name, channels)
    images = blocks(5, channels, SIDE)
    features = inside.features(images.numpy())
    assert features.dtype == np.float32 and features.ndim == 2
    head: nn.Module = network.get_submodule("head")
    with torch.no_grad():
        torch.testing.assert_close(head(torch.from_numpy(features)), network(images))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_saliency_is_the_slope_of_the_class(tmp_path: Path, name: str, channels: int) -> None:
    """Each image by itself, of whatever class is asked for."""
    inside, network = saved(tmp_path, name, channels)
    images, classes = blocks(4, channels, SIDE), [2, 0, 1, 2]
    maps = inside.saliency(images.numpy(), classes)
    assert maps.shape == (4, SIDE, SIDE) and (maps >= 0).all() and (maps.max(axis=(1, 2)) == 1).all()
    for image, found, k in zip(images, maps, classes, strict=True):
        pixels = image[None].float().requires_grad_()
        network(pixels)[0, k].backward()
        assert pixels.grad is not None
        slopes = pixels.grad[0].abs().amax(dim=0)
        np.testing.assert_allclose(found, (slopes / slopes.max()).numpy(), atol=1e-5)


def test_where_nothing_moves_the_answer_the_map_is_zero(tmp_path: Path) -> None:
    inside, network = saved(tmp_path, "separable", 1)
    head: nn.Linear = network.get_submodule("head")  # type: ignore[assignment]
    nn.init.zeros_(head.weight)
    torch.save(network.state_dict(), tmp_path / FILES.weights)
    assert inside.saliency(blocks(1, 1, SIDE).numpy(), [0]).tolist() == np.zeros((1, SIDE, SIDE)).tolist()


def test_slopes_beyond_all_numbers_are_a_fault_not_an_answer(tmp_path: Path) -> None:
    """JSON has no word for them."""
    inside, network = saved(tmp_path, "seed_student", 1)
    for path in ("stage1.0", "stage2.0", "hidden.1"):
        nn.init.constant_(network.get_submodule(path).weight, 1e20)  # type: ignore[arg-type]
    torch.save(network.state_dict(), tmp_path / FILES.weights)
    with pytest.raises(FloatingPointError, match="not finite"):
        inside.saliency(blocks(1, 1, SIDE).numpy(), [0])


def test_without_captum_there_are_features_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("captum", "captum.attr"):
        monkeypatch.setitem(sys.modules, name, None)
    inside, _ = saved(tmp_path, "separable", 1)
    images = blocks(1, 1, SIDE).numpy()
    assert inside.open and not inside.explains and inside.features(images).shape == (1, 128)
    with pytest.raises(NotOffered, match="pip install captum"):
        inside.saliency(images, [0])


def test_another_network_or_none_is_closed(tmp_path: Path) -> None:
    _, _ = saved(tmp_path, "separable", 1)
    for inside in (Inside(tmp_path, contract_of("theirs", 1)), Inside(tmp_path / "empty", contract_of("separable", 1))):
        assert not inside.open and not inside.explains
        images = blocks(1, 1, SIDE).numpy()
        with pytest.raises(NotOffered, match="no features and no explanations"):
            inside.features(images)
        with pytest.raises(NotOffered, match="no features and no explanations"):
            inside.saliency(images, [0])
