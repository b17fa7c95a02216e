"""Engines agree, and what cannot be served is refused by name."""

import builtins
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from handler.bundle import FILES
from handler.contract import Contract
from handler.engines import ENGINES
from handler.errors import BundleError
from handler.model import ModelInterface, Student, choose, load_model, replay
from handler.settings import HandlerSettings
from tests.bundles import EXPORTED
from tests.handler.payloads import Golden, Pixels

NAMES = ("eager", *EXPORTED)


def load(root: Path, contract: Contract, name: Any, **settings: Any) -> ModelInterface:
    return load_model(root, contract, HandlerSettings(engine=name, **settings), 1, None, 1)[0]


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest, root: Path, contract: Contract) -> ModelInterface:
    return load(root, contract, request.param)


@pytest.fixture
def some(golden: Golden) -> Pixels:
    """The golden images as a network takes them."""
    return np.ascontiguousarray(golden["images"].transpose(0, 3, 1, 2))


# The contract of an engine, for every one


def test_logits_are_those_that_training_wrote(engine: ModelInterface, some: Pixels, golden: Golden) -> None:
    logits = engine.predict(some)
    assert logits.dtype == np.float32 and logits.shape == (64, 10)
    own = golden["logits_onnx-int8" if engine.engine == "onnx-int8" else "logits"]
    np.testing.assert_allclose(logits, own, atol=1e-4)
    assert (logits.argmax(1) == golden["logits"].argmax(1)).mean() > 0.9


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
    assert engine.engine in NAMES and engine.device == "cpu" and engine.contract == contract


# Which engine


def measured(cpu: dict[int, float], cuda: dict[int, float] | None = None, accuracy: float = 0.9) -> dict[str, Any]:
    by_kind = {"cpu": cpu, "cuda": cuda or {}}
    milliseconds = {kind: {str(n): {"p50": ms} for n, ms in found.items()} for kind, found in by_kind.items()}
    return {"accuracy": accuracy, "latency_ms": milliseconds}


EVIDENCE = {
    "eager": measured({1: 2.0, 32: 6.0}, {1: 0.5, 32: 0.6}),
    "onnx": measured({1: 0.1, 32: 3.2}),
    "onnx-int8": measured({1: 0.05, 32: 1.0}, accuracy=0.896),
    "exported": measured({1: 1.0, 32: 3.0}, {1: 0.4, 32: 0.7}),
}


@pytest.mark.parametrize(
    ("settings", "gpu_id", "batch", "expected"),
    [
        ({}, None, 1, ("onnx", "cpu")),
        ({}, None, 31, ("onnx", "cpu")),
        ({}, None, 64, ("exported", "cpu")),
        ({"accuracy_loss": 0.01}, None, 1, ("onnx-int8", "cpu")),
        ({}, 1, 1, ("exported", "cuda:1")),
        ({}, 1, 32, ("eager", "cuda:1")),
        ({"engine": "eager"}, None, 1, ("eager", "cpu")),
        ({"engine": "eager"}, 0, 1, ("eager", "cuda:0")),
        ({"engine": "onnx"}, 0, 1, ("onnx", "cpu")),
        ({"engine": "onnx-int8"}, None, 1, ("onnx-int8", "cpu")),
    ],
)
def test_engine_and_device(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    gpu_id: int | None,
    batch: int,
    expected: tuple[str, str],
) -> None:
    """Auto is the fastest that was measured on this kind of device, an image, of those that are accurate enough."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = choose(HandlerSettings(**settings), EVIDENCE, "separable", gpu_id, batch)
    assert (found.engine, found.device) == expected


def test_a_gpu_that_torch_cannot_use_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(HandlerSettings(), EVIDENCE, "separable", 0, 1).device == "cpu"


def test_what_was_not_measured_is_not_chosen() -> None:
    nothing = {"eager": measured({}), "onnx": measured({})}
    for evidence, network, expected in (({}, "separable", "eager"), (nothing, "separable", "eager")):
        assert choose(HandlerSettings(), evidence, network, None, 1).engine == expected


def test_eager_is_not_chosen_for_a_network_that_it_cannot_build() -> None:
    slow = {"eager": measured({1: 1.0}), "onnx": measured({1: 2.0})}
    assert choose(HandlerSettings(), slow, "separable", None, 1).engine == "eager"
    assert choose(HandlerSettings(), slow, "resnet18", None, 1).engine == "onnx"
    nothing = {"eager": measured({}), "onnx": measured({})}
    assert choose(HandlerSettings(), nothing, "resnet18", None, 1).engine == "onnx"


@pytest.mark.parametrize(
    ("settings", "batch", "expected"),
    [
        ({}, 1, 1),
        ({}, 64, 32),  # of exported, which is the fastest there
        ({"engine": "onnx"}, 64, 1),
        ({"engine": "torchscript"}, 64, 64),  # not measured: what the server hands over
        ({"micro_batch": 5}, 64, 5),
    ],
)
def test_the_micro_batch_is_the_size_that_was_measured_best(
    settings: dict[str, Any], batch: int, expected: int
) -> None:
    assert choose(HandlerSettings(**settings), EVIDENCE, "separable", None, batch).micro_batch == expected


def test_the_engine_sees_no_more_than_a_micro_batch(root: Path, contract: Contract, some: Pixels) -> None:
    model = load_model(root, contract, HandlerSettings(engine="onnx", micro_batch=5), 1, None, 64)[0]
    assert isinstance(model, Student)
    seen, real = [], model.forward

    def forward(images: Pixels) -> Any:
        seen.append(len(images))
        return real(images)

    whole = model.forward(some)
    model.forward = forward
    np.testing.assert_allclose(model.predict(some), whole, atol=1e-5)
    assert seen == [5] * 12 + [4]


def test_a_bundle_without_evidence_is_refused(broken: Path, contract: Contract) -> None:
    (broken / FILES.report).unlink()
    with pytest.raises(BundleError, match=r"report\.json: no report of the engines in it"):
        load(broken, contract, "auto")


def test_threads_are_those_asked_for(root: Path, contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = onnxruntime.InferenceSession

    def session(model: bytes, options: Any, **rest: Any) -> Any:
        seen.append(options.intra_op_num_threads)
        return real(model, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    before = torch.get_num_threads()
    try:
        load_model(root, contract, HandlerSettings(engine="onnx"), 2, None, 1)
        assert torch.get_num_threads() == 2 and seen == [2]
    finally:
        torch.set_num_threads(before)


def test_falls_back_only_when_told_to(root: Path, broken: Path, contract: Contract, caplog: Any) -> None:
    (broken / FILES.onnx).write_bytes(b"garbage")
    shutil.copy(root / FILES.report, broken)
    with pytest.raises(BundleError):
        load(broken, contract, "onnx")
    assert load(broken, contract, "onnx", fallback=True).engine == "eager"
    assert "falling back to eager" in caplog.text


def test_an_engine_that_is_not_in_the_bundle_is_named(root: Path, contract: Contract) -> None:
    with pytest.raises(BundleError, match=r"engine compiled: .*student\.aoti\.pt2 is not there; the engines in it are"):
        load(root, contract, "compiled")


# What is refused


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    for name in (FILES.golden, FILES.report, *(ENGINES[name].file for name in NAMES)):
        shutil.copy(root / name, tmp_path)
    return tmp_path


def test_a_network_that_only_training_knows_needs_the_export(root: Path, contract: Contract) -> None:
    other = replace(contract, network="resnet18")
    with pytest.raises(BundleError, match=r"engine eager: unknown network 'resnet18'.*the exported engines can serve"):
        load(root, other, "eager")
    load(root, other, "onnx")


@pytest.mark.parametrize("engine_name", NAMES)
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_weights_that_cannot_be_read(broken: Path, contract: Contract, engine_name: Any, content: bytes | None) -> None:
    path = broken / ENGINES[engine_name].file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BundleError, match=path.name) as caught:
        load(broken, contract, engine_name)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(root: Path, contract: Contract) -> None:
    with pytest.raises(BundleError, match="not the weights of 'residual'"):
        load(root, replace(contract, network="residual"), "eager")


class Touches:
    """Pickled code: whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_weights_with_code_in_them_are_refused_before_it_runs(broken: Path, contract: Contract) -> None:
    torch.save({"a": Touches(broken / "ran")}, broken / FILES.weights)
    with pytest.raises(BundleError, match=r"student\.pt: not the weights"):
        load(broken, contract, "eager")
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
        load(root, contract, "onnx")


@pytest.mark.skipif("TensorrtExecutionProvider" in onnxruntime.get_available_providers(), reason="it is here")
def test_tensorrt_where_there_is_none_says_what_to_install(root: Path, contract: Contract) -> None:
    with pytest.raises(
        BundleError, match="TensorrtExecutionProvider: not in this onnxruntime; install onnxruntime-gpu"
    ):
        load(root, contract, "tensorrt")


# The golden images


def test_the_replay_passes_and_says_how_close(engine: ModelInterface, root: Path) -> None:
    assert 0 <= replay(engine, root / FILES.golden, [1, 100]) < 1e-5


@pytest.mark.parametrize(("shift", "passes"), [(0.0005, True), (50, False), (np.nan, False)])
def test_the_replay_compares_probabilities(
    engine: ModelInterface, broken: Path, golden: Golden, shift: float, passes: bool
) -> None:
    of = "logits_onnx-int8" if engine.engine == "onnx-int8" else "logits"
    logits = golden[of].astype(np.float32)
    logits[63, 1] += shift
    np.savez(broken / FILES.golden, **{**golden, of: logits})
    if passes:
        replay(engine, broken / FILES.golden, [1])
    else:
        with pytest.raises(BundleError, match=r"golden images differ by .* at most .* is allowed"):
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
