"""Engines agree, and what cannot be served is refused by name."""

import builtins
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from handler import model as models
from handler.bundle import FILES
from handler.contract import Contract
from handler.errors import BundleError
from handler.model import ModelInterface, choose, load_model, replay
from handler.settings import HandlerSettings
from tests.handler.payloads import Golden, Pixels

ENGINES = ("eager", "onnx")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, root: Path, contract: Contract) -> ModelInterface:
    return load_model(root, contract, HandlerSettings(engine=request.param), 1, None)


@pytest.fixture
def some(golden: Golden) -> Pixels:
    """The golden images as a network takes them."""
    return np.ascontiguousarray(golden["images"].transpose(0, 3, 1, 2))


# The contract of an engine, for every one


def test_logits_are_those_that_training_wrote(engine: ModelInterface, some: Pixels, golden: Golden) -> None:
    logits = engine.predict(some)
    assert logits.dtype == np.float32 and logits.shape == (64, 10)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_an_image_gets_the_same_logits_in_any_batch(engine: ModelInterface, some: Pixels, size: int) -> None:
    np.testing.assert_allclose(engine.predict(some[5 : 5 + size]), engine.predict(some)[5 : 5 + size], atol=1e-4)


def test_logits_can_be_kept(engine: ModelInterface, some: Pixels) -> None:
    first = engine.predict(some[:2])
    copy = first.copy()
    engine.predict(some[2:4])
    np.testing.assert_array_equal(first, copy)


def test_it_warms_up_at_the_sizes_asked(engine: ModelInterface, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(engine, "predict", lambda images: seen.append(images.shape))
    engine.warm_up([1, 4])
    assert seen == [(1, 1, 28, 28), (4, 1, 28, 28)]


def test_it_knows_what_it_is(engine: ModelInterface, contract: Contract) -> None:
    assert engine.engine in ENGINES and engine.device == "cpu" and engine.contract == contract


# Which engine


@pytest.mark.parametrize(
    ("setting", "gpu_id", "cuda", "expected"),
    [
        ("auto", None, False, ("onnx", "cpu")),
        ("auto", None, True, ("onnx", "cpu")),
        ("auto", 1, True, ("eager", "cuda:1")),
        ("auto", 0, False, ("onnx", "cpu")),
        ("eager", None, False, ("eager", "cpu")),
        ("eager", 0, True, ("eager", "cuda:0")),
        ("onnx", 0, True, ("onnx", "cpu")),
    ],
)
def test_engine_and_device(
    monkeypatch: pytest.MonkeyPatch, setting: Any, gpu_id: int | None, cuda: bool, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert choose(HandlerSettings(engine=setting), gpu_id)[:2] == expected


def test_threads_are_those_asked_for(root: Path, contract: Contract) -> None:
    before = torch.get_num_threads()
    try:
        found = load_model(root, contract, HandlerSettings(engine="onnx"), 2, None)
        assert torch.get_num_threads() == 2
        assert isinstance(found, models.Onnx)
        assert found.session.get_session_options().intra_op_num_threads == 2
    finally:
        torch.set_num_threads(before)


# What is refused


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    for name in (FILES.weights, FILES.onnx, FILES.golden):
        shutil.copy(root / name, tmp_path)
    return tmp_path


def test_a_network_that_only_training_knows_needs_the_export(root: Path, contract: Contract) -> None:
    other = replace(contract, network="resnet18")
    with pytest.raises(BundleError, match=r"engine eager: unknown network 'resnet18'.*only engine onnx"):
        load_model(root, other, HandlerSettings(engine="eager"), 1, None)
    load_model(root, other, HandlerSettings(engine="onnx"), 1, None)


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_weights_that_cannot_be_read(broken: Path, contract: Contract, engine_name: Any, content: bytes | None) -> None:
    path = broken / (FILES.weights if engine_name == "eager" else FILES.onnx)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BundleError, match=path.name) as caught:
        load_model(broken, contract, HandlerSettings(engine=engine_name), 1, None)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(root: Path, contract: Contract) -> None:
    with pytest.raises(BundleError, match="not the weights of 'residual'"):
        load_model(root, replace(contract, network="residual"), HandlerSettings(engine="eager"), 1, None)


class Touches:
    """Pickled code: whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_weights_with_code_in_them_are_refused_before_it_runs(broken: Path, contract: Contract) -> None:
    torch.save({"a": Touches(broken / "ran")}, broken / FILES.weights)
    with pytest.raises(BundleError, match=r"student\.pt: not the weights"):
        load_model(broken, contract, HandlerSettings(engine="eager"), 1, None)
    assert not (broken / "ran").exists()


def test_a_machine_without_onnxruntime_is_told_what_to_do(
    root: Path, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BundleError, match="install it, or set engine: eager"):
        load_model(root, contract, HandlerSettings(), 1, None)


# The golden images


def test_the_replay_passes_and_says_how_close(engine: ModelInterface, root: Path) -> None:
    assert 0 <= replay(engine, root / FILES.golden, [1, 100]) < 1e-5


@pytest.mark.parametrize(("shift", "passes"), [(0.0005, True), (5, False), (np.nan, False)])
def test_the_replay_compares_probabilities(
    engine: ModelInterface, broken: Path, golden: Golden, shift: float, passes: bool
) -> None:
    logits = golden["logits"].astype(np.float32)
    logits[63, 1] += shift
    np.savez(broken / FILES.golden, images=golden["images"], logits=logits)
    if passes:
        replay(engine, broken / FILES.golden, [1])
    else:
        with pytest.raises(BundleError, match=r"golden images differ by .* at most 0\.001 is allowed"):
            replay(engine, broken / FILES.golden, [1])


def test_an_engine_that_fails_at_a_size_is_refused(
    engine: ModelInterface, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = engine.predict

    def fragile(images: Pixels) -> Any:
        if len(images) == 4:
            raise RuntimeError("told so")
        return predict(images)

    monkeypatch.setattr(engine, "predict", fragile)
    with pytest.raises(BundleError, match="fails on 4 golden images: RuntimeError: told so"):
        replay(engine, root / FILES.golden, [1, 2, 4])


def test_an_engine_with_another_number_of_classes_is_refused(
    engine: ModelInterface, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "predict", lambda images: np.zeros((len(images), 7), np.float32))
    with pytest.raises(BundleError, match="fails on 1 golden images"):
        replay(engine, root / FILES.golden, [1])


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"PK\3\4", {"images": np.zeros((1, 28, 28, 1), np.uint8)}])
def test_golden_images_that_cannot_be_read(engine: ModelInterface, broken: Path, content: Any) -> None:
    path = broken / FILES.golden
    path.unlink()
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match="no golden images"):
        replay(engine, path, [1])
