"""Networks by name, from a file of one's own, or exported: raw uint8 in, logits out; and weights for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handler.errors import DistilleryError, SettingsError
from training.networks import build, load_weights
from training.reading import read_experiment

PAIRS = ("resnet101_resnet18", "resnet50_mobilenet_v2", "resnet50_resnet18")


def make(name: str, channels: int = 1, size: tuple[int, int] = (28, 28), classes: int = 10) -> nn.Sequential:
    network = build(name, channels=channels, size=size, classes=classes, mean=[0.5] * channels, std=[0.25] * channels)
    assert isinstance(network, nn.Sequential)
    return network


def inner(network: nn.Module) -> nn.Module:
    """The model without its normalisation."""
    return network.get_submodule("model")


def one_line(error: pytest.ExceptionInfo[DistilleryError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


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


@pytest.mark.parametrize("pair", PAIRS)
def test_the_pairs_that_are_shipped_take_their_data_as_it_is(pair: str) -> None:
    """What the experiment files say: nothing is enlarged, not even CIFAR-10's 32×32 pixels."""
    experiment = read_experiment(Path(f"training/experiments/{pair}.yaml"), [], {})
    side = 32 if experiment.data.name == "cifar10" else experiment.data.height
    for role in experiment.roles().values():
        assert role.network in pair
        assert [name for name, _ in make(role.network, 3, (side, side)).named_children()] == ["normalize", "model"]


def test_normalisation_is_part_of_the_network() -> None:
    network = make("separable")
    image = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert network[0](image).flatten().tolist() == pytest.approx([-2.0, 2.0])
    assert {"normalize.mean", "normalize.std"} <= network.state_dict().keys()


def test_normalisation_of_other_channels_is_an_error() -> None:
    with pytest.raises(SettingsError, match="mean, std: expected 3 numbers, one for each channel"):
        build("separable", channels=3, size=(8, 8), classes=2, mean=[0.5], std=[0.5])


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


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Width:
    number: int = 4

def good(channels, size, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], Width().number), nn.Linear(4, classes))

def no_module(channels, size, classes):
    return 3

def raises(channels, size, classes):
    raise ValueError("two\\nlines")

def too_many_classes(channels, size, classes):
    return good(channels, size, classes + 1)

def too_few_channels(channels, size, classes):
    return nn.Sequential(nn.Conv2d(channels + 1, classes, size), nn.Flatten())

number = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_ones_own_function_gets_normalised_floats(own: Path) -> None:
    network = make(f"{own}:good", 3, (4, 5), 6)
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    assert network.training
    assert network(images).equal(inner(network)((images.float() / 255 - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("goood", r"own.py: has no function 'goood'; it defines .*good"),
        ("number", r"own.py: has no function 'number'"),
        ("no_module", r"own.py:no_module: expected it to return a torch.nn.Module, got int"),
        ("raises", r"own.py:raises: ValueError: two lines"),
        ("too_many_classes", r"expected logits of shape \[3, 10\], got \[3, 11\]"),
        ("too_few_channels", r"expected it to take floats \[B, 1, 28, 28\]; for B = 3: RuntimeError"),
    ],
)
def test_what_is_wrong_with_ones_own_function_is_one_line(own: Path, function: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        make(f"{own}:{function}")
    one_line(caught)


def test_a_file_that_is_not_there_or_not_python_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.py: no such file; expected .* make\(\)"):
        make(f"{tmp_path}/nowhere.py:make")
    (tmp_path / "bad.py").write_text("def (:\n")
    with pytest.raises(SettingsError, match=r"bad.py:make: SyntaxError") as caught:
        make(f"{tmp_path}/bad.py:make")
    one_line(caught)


def exported(path: Path, network: nn.Module, example: Tensor, fixed: bool = False) -> str:
    shapes = None if fixed else ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(network.eval(), (example,), dynamic_shapes=shapes), path)
    return str(path)


IMAGES = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def program(name: str, size: tuple[int, int] = (8, 8), classes: int = 4) -> nn.Module:
    return build(name, channels=1, size=size, classes=classes, mean=[0.5], std=[0.5])


def test_an_exported_program_is_a_frozen_network(tmp_path: Path) -> None:
    network = make("seed_student", 1, (8, 8), 4).eval()  # dropout tells the modes apart
    teacher = program(exported(tmp_path / "teacher.pt2", network, IMAGES))
    assert not any(p.requires_grad for p in teacher.parameters())
    batch = IMAGES.repeat(3, 1, 1, 1)[:5]
    with torch.no_grad():
        expected = network(batch)
        for frozen in (teacher.eval(), teacher.train(), teacher.requires_grad_(False), teacher.to("cpu")):
            torch.testing.assert_close(frozen(batch), expected)
        torch.testing.assert_close(teacher(batch.float() + 0.3), expected)  # mixed pixels are rounded
    assert sum(p.numel() for p in teacher.parameters()) == sum(p.numel() for p in network.parameters())


class Ramp(nn.Module):
    """Makes a tensor on the way, whose device the exported program then has written down."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1, 8, 8]` → `[B, 4]`."""
        return x.float().mean((1, 2, 3))[:, None] * torch.arange(4.0, device=x.device)


def test_an_exported_program_moves_to_another_device_inside_a_network_too(tmp_path: Path) -> None:
    teacher = program(exported(tmp_path / "teacher.pt2", Ramp(), IMAGES))
    moved = nn.Sequential(teacher).to("meta", memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert moved(IMAGES.to("meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 5}, r"expected logits of shape \[1, 5\], got \[1, 4\]"),
        ({"size": (9, 8)}, r"expected it to take uint8 \[B, 1, 9, 8\] of any B.*; for B = 1:"),
    ],
)
def test_an_exported_program_that_does_not_fit_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    name = exported(tmp_path / "teacher.pt2", make("seed_student", 1, (8, 8), 4), IMAGES)
    with pytest.raises(SettingsError, match=message) as caught:
        program(name, **changes)
    one_line(caught)


def test_an_exported_program_for_one_batch_size_is_refused(tmp_path: Path) -> None:
    name = exported(tmp_path / "teacher.pt2", make("seed_student", 1, (8, 8), 4), IMAGES[:1], fixed=True)
    with pytest.raises(SettingsError, match=r"uint8 \[B, 1, 8, 8\] of any B, a dynamic dimension; for B = 3") as caught:
        program(name)
    one_line(caught)


def test_an_exported_program_that_wants_floats_is_refused(tmp_path: Path) -> None:
    network = make("seed_student", 1, (8, 8), 4)
    name = exported(tmp_path / "teacher.pt2", network, IMAGES.float())
    with pytest.raises(SettingsError, match="expected it to take uint8"):
        program(name)


def test_a_file_that_is_no_exported_program_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt2")
    with pytest.raises(SettingsError, match="not an exported program that can be loaded"):
        program(str(tmp_path / "weights.pt2"))
    with pytest.raises(SettingsError, match=r"nowhere.pt2: expected a file that torch.export.save wrote"):
        program(str(tmp_path / "nowhere.pt2"))
    assert "Traceback" not in capfd.readouterr().err


def mobile(seed: int, mean: float = 0.5) -> nn.Sequential:
    torch.manual_seed(seed)
    network = build("shufflenet_v2_x0_5", channels=1, size=(32, 32), classes=3, mean=[mean], std=[0.25])
    assert isinstance(network, nn.Sequential)
    return network


def state(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value for name, value in network.state_dict().items()}


WRAPPERS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "ours": state,
    "of our checkpoint": lambda n: {"key": "x", "network": state(n), "progress": [1, 2]},
    "bare": lambda n: state(inner(n)),
    "under state_dict": lambda n: {"epoch": 3, "state_dict": state(inner(n))},
    "under model": lambda n: {"model": state(inner(n)), "args": {"lr": 0.1}},
    "parallel": lambda n: state(inner(n), "module."),
    "parallel, under state_dict": lambda n: {"state_dict": state(inner(n), "module."), "best": 0.5},
    "compiled": lambda n: state(n, "_orig_mod."),
    "old": lambda n: {k: v for k, v in state(inner(n)).items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", WRAPPERS)
def test_weights_in_every_form_that_people_keep_them(form: str, tmp_path: Path) -> None:
    """The model inside is the other's; its normalisation, too, where the file has one."""
    source, network = mobile(0, mean=0.1), mobile(1)
    torch.save(WRAPPERS[form](source), tmp_path / "weights.pt")
    load_weights(network, tmp_path / "weights.pt")
    assert all(a.equal(b) for a, b in zip(inner(network).parameters(), inner(source).parameters(), strict=True))
    normalises = form in ("ours", "of our checkpoint", "compiled")
    assert network.state_dict()["normalize.mean"].item() == pytest.approx(0.1 if normalises else 0.5)


def test_weights_of_our_own_networks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, network = make("separable"), make("separable")
    torch.save(source.state_dict(), tmp_path / "student.pt")
    load_weights(network, tmp_path / "student.pt")
    assert all(a.equal(b) for a, b in zip(network.parameters(), source.parameters(), strict=True))


def test_weights_that_do_not_fit_change_nothing_and_name_what_differs(tmp_path: Path) -> None:
    network = mobile(0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    wrong = state(inner(mobile(1))) | {"fc.weight": torch.zeros(1000, 1024), "extra": torch.zeros(1)}
    del wrong["conv1.0.weight"]
    torch.save(wrong, tmp_path / "weights.pt")
    with pytest.raises(DistilleryError, match=r"weights.pt: not the weights of this network") as caught:
        load_weights(network, tmp_path / "weights.pt")
    text = one_line(caught)
    assert "missing: model.conv1.0.weight;" in text
    assert "unexpected: model.extra;" in text
    assert "of another shape: model.fc.weight [1000, 1024] for [3, 1024]" in text
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_few_of_many_differences_are_named(tmp_path: Path) -> None:
    torch.save(make("separable").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(DistilleryError, match=r"missing: [^;,]+, [^;,]+, [^;,]+ and \d+ more") as caught:
        load_weights(mobile(0), tmp_path / "weights.pt")
    assert len(one_line(caught)) < 1000


class Attack:
    """What a whole pickled model may do on loading."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Attack(), "expected what torch.save"),
        ([1, 2], "expected a state dict"),
        ({}, "expected a state dict"),
        ({"epoch": 3}, "expected a state dict .* got epoch"),
    ],
)
def test_what_is_no_state_dict_is_one_line(
    content: object, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(DistilleryError, match=message) as caught:
        load_weights(make("separable"), tmp_path / "weights.pt")
    one_line(caught)
    assert "executed" not in capfd.readouterr().out


def test_a_weights_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DistilleryError, match=r"nowhere.pt: cannot be read: No such file or directory$"):
        load_weights(make("separable"), tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(DistilleryError, match=r"text.pt: expected what torch.save"):
        load_weights(make("separable"), tmp_path / "text.pt")
