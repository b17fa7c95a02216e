"""Which engine, on which device, in how large batches: pure functions of the settings and of what was measured."""

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.choice import choose, device_of
from handler.engines import ENGINES
from handler.errors import BundleError, SettingsError
from handler.settings import HandlerSettings


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
NOTHING = {name: measured({}) for name in ("onnx", "exported", "eager", "onnx-int8")}


@pytest.mark.parametrize(
    ("settings", "device", "batch", "expected"),
    [
        ({}, "cpu", 1, ("onnx", "cpu")),
        ({}, "cpu", 31, ("onnx", "cpu")),
        ({}, "cpu", 64, ("exported", "cpu")),
        ({"accuracy_loss": 0.01}, "cpu", 1, ("onnx-int8", "cpu")),
        ({}, "cuda:1", 1, ("exported", "cuda:1")),
        ({}, "cuda:1", 32, ("eager", "cuda:1")),
        ({"precision": "fp16"}, "cuda:1", 1, ("eager", "cuda:1")),
        ({"engine": "eager"}, "cpu", 1, ("eager", "cpu")),
        ({"engine": "eager"}, "cuda:0", 1, ("eager", "cuda:0")),
        ({"engine": "onnx"}, "cuda:0", 1, ("onnx", "cpu")),
        ({"engine": "onnx-int8"}, "cpu", 1, ("onnx-int8", "cpu")),
    ],
)
def test_engine_and_device(settings: dict[str, Any], device: str, batch: int, expected: tuple[str, str]) -> None:
    """Auto is the fastest that was measured on this kind of device, an image, of those that are accurate enough."""
    found = choose(HandlerSettings(**settings), EVIDENCE, "separable", device, batch)
    assert (found.engine, found.device) == expected
    assert ("it cannot use cuda:0" in found.why) == (found.device != device)


@pytest.mark.parametrize(
    ("network", "device", "expected"),
    [
        ("separable", "cpu", ("onnx", "cpu")),
        ("separable", "cuda:0", ("exported", "cuda:0")),
        ("resnet18", "cuda:0", ("exported", "cuda:0")),
    ],
)
def test_where_nothing_was_measured_it_is_the_first_that_can_use_the_device(
    network: str, device: str, expected: tuple[str, str]
) -> None:
    found = choose(HandlerSettings(), NOTHING, network, device, 1)
    assert (found.engine, found.device) == expected
    assert choose(HandlerSettings(), {}, network, device, 1).engine == "eager"


def test_a_gpu_is_given_up_only_where_no_engine_can_use_it() -> None:
    found = choose(HandlerSettings(), {"eager": measured({}), "onnx": measured({})}, "resnet18", "cuda:0", 1)
    assert (found.engine, found.device) == ("onnx", "cpu")
    assert found.why == "auto: no engine was measured on cuda; it cannot use cuda:0"


def test_eager_is_not_chosen_for_a_network_that_it_cannot_build() -> None:
    slow = {"eager": measured({1: 1.0}), "onnx": measured({1: 2.0})}
    assert choose(HandlerSettings(), slow, "separable", "cpu", 1).engine == "eager"
    assert choose(HandlerSettings(), slow, "resnet18", "cpu", 1).engine == "onnx"


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
    assert choose(HandlerSettings(**settings), EVIDENCE, "separable", "cpu", batch).micro_batch == expected


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "eager"])
def test_a_precision_that_an_engine_does_not_have_is_refused(engine: Any) -> None:
    with pytest.raises(SettingsError, match=rf"^handler.precision bf16: expected fp32 with engine {engine}, or eager"):
        choose(HandlerSettings(engine=engine, precision="bf16"), EVIDENCE, "separable", "cpu", 1)


# Which device


@given(gpu_id=st.none() | st.integers(-1, 9), gpus=st.integers(0, 8))
def test_a_worker_gets_its_gpu_or_the_cpu_or_a_reason(gpu_id: int | None, gpus: int) -> None:
    if gpu_id is None or gpus == 0:
        assert device_of(gpu_id, gpus) == "cpu"
    elif 0 <= gpu_id < gpus:
        assert device_of(gpu_id, gpus) == f"cuda:{gpu_id}"
    else:
        with pytest.raises(BundleError, match=rf"^GPU {gpu_id}: torch sees {gpus}, counted from 0; check deviceIds"):
            device_of(gpu_id, gpus)


def test_a_gpu_that_torch_does_not_see_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert device_of(None, 0) == "cpu" and not caplog.messages
    assert device_of(1, 0) == "cpu"
    assert caplog.messages == ["the server gave this worker GPU 1, but torch sees none: it runs on the CPU"]
