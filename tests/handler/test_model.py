"""Engines agree, and what cannot be served is refused by name."""

import builtins
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handler.bundle import FILES
from handler.contract import Contract, probabilities
from handler.engines import ENGINES, network_of
from handler.errors import BundleError
from handler.model import Student, load_model, replay
from handler.settings import HandlerSettings
from tests.bundles import EXPORTED
from tests.handler.payloads import Golden, Pixels

NAMES = ("eager", *EXPORTED)


def load(root: Path, contract: Contract, name: Any, **settings: Any) -> Student:
    return load_model(root, contract, HandlerSettings(engine=name, **settings), 1, None, 1)[0]


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest, root: Path, contract: Contract) -> Student:
    return load(root, contract, request.param)


@pytest.fixture
def some(golden: Golden) -> Pixels:
    """The golden images as a network takes them."""
    return np.ascontiguousarray(golden["images"].transpose(0, 3, 1, 2))


# The contract of an engine, for every one


def test_logits_are_those_that_training_wrote(engine: Student, some: Pixels, golden: Golden) -> None:
    logits = engine.predict(some)
    assert logits.dtype == np.float32 and logits.shape == (64, 10)
    own = golden["logits_onnx-int8" if engine.engine == "onnx-int8" else "logits"]
    np.testing.assert_allclose(logits, own, atol=1e-4)
    assert (logits.argmax(1) == golden["logits"].argmax(1)).mean() > 0.9


@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_an_image_gets_the_same_logits_in_any_batch(engine: Student, some: Pixels, size: int) -> None:
    np.testing.assert_allclose(engine.predict(some[5 : 5 + size]), engine.predict(some)[5 : 5 + size], atol=1e-4)


def test_logits_can_be_kept(engine: Student, some: Pixels) -> None:
    first = engine.predict(some[:1])
    copy = first.copy()
    engine.predict(some[2:3])
    np.testing.assert_array_equal(first, copy)


def test_threads_have_memory_of_their_own(engine: Student, some: Pixels) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.forward, [some[i : i + 1] for i in range(64)] * 10))
    np.testing.assert_allclose(np.concatenate(found), np.tile(engine.predict(some), (10, 1)), atol=1e-4)


def test_it_warms_up_at_the_sizes_asked(engine: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(engine, "predict", lambda images: seen.append(images.shape))
    engine.warm_up([1, 4])
    assert seen == [(1, 1, 28, 28), (4, 1, 28, 28)]


def test_it_knows_what_it_is(engine: Student, contract: Contract) -> None:
    assert engine.engine in NAMES and engine.device == "cpu" and engine.contract == contract


# How it is loaded and asked


def test_the_engine_sees_no_more_than_a_micro_batch(root: Path, contract: Contract, some: Pixels) -> None:
    model = load_model(root, contract, HandlerSettings(engine="onnx", micro_batch=5), 1, None, 64)[0]
    seen, real = [], model.forward

    def forward(images: Pixels) -> Any:
        seen.append(len(images))
        return real(images)

    whole = model.forward(some)
    model.forward = forward
    np.testing.assert_allclose(model.predict(some), whole, atol=1e-5)
    assert seen == [5] * 12 + [4]


# Memory


def cramped(model: Student, room: int, large: set[int]) -> list[int]:
    """Let its engine fail as on a GPU for more than `room` images, and for those that begin with one of `large`.

    Returns the sizes that it will have been given.
    """
    seen, real = [], model.forward

    def forward(images: Pixels) -> Any:
        seen.append(len(images))
        if len(images) > room or not large.isdisjoint(images[:, 0, 0, 0].tolist()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(images)

    model.forward = forward
    return seen


@given(
    room=st.integers(0, 20),
    batches=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    large=st.sets(st.integers(0, 39)),
)
def test_what_fits_into_memory_is_answered(root: Path, room: int, batches: list[int], large: set[int]) -> None:
    contract = Contract.read(root / FILES.contract)
    model = load(root, contract, "onnx", micro_batch=32)
    images = np.random.default_rng(0).integers(0, 256, (40, *contract.shape), np.uint8)
    images[:, 0, 0, 0] = np.arange(40)
    expected = model.predict(images)
    expected[[i for i in range(40) if room == 0 or i in large]] = np.nan
    cramped(model, room, large)
    for batch in batches:
        np.testing.assert_allclose(model.predict(images[:batch]), expected[:batch], atol=1e-5)


def test_a_size_that_fits_is_kept_and_the_log_says_so(
    root: Path, contract: Contract, some: Pixels, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(root, contract, "onnx", micro_batch=32)
    seen = cramped(model, 10, set())
    caplog.set_level("WARNING")
    model.predict(some[:20])
    assert seen == [20, 10, 10]
    assert len(caplog.messages) == 1 and "no memory for 20 images at a time on cpu: OutOf" in caplog.messages[0]
    model.predict(some[:20])
    assert seen[3:] == [10, 10]


def test_when_not_even_one_image_fits_the_size_stays(root: Path, contract: Contract, some: Pixels) -> None:
    """For then it is no matter of size, and may pass."""
    model = load(root, contract, "onnx", micro_batch=8)
    whole = model.predict(some)
    real = model.forward
    seen = cramped(model, 0, set())
    assert np.isnan(model.predict(some[:4])).all() and seen == [4, 2, 1, 1, 2, 1, 1]
    model.forward = real
    np.testing.assert_allclose(model.predict(some[:8]), whole[:8], atol=1e-5)
    assert model.micro_batch == 8


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_way_to_lack_memory_is_known(root: Path, contract: Contract, some: Pixels, error: Exception) -> None:
    model = load(root, contract, "onnx", micro_batch=32)
    real = model.forward

    def forward(images: Pixels) -> Any:
        if len(images) > 1:
            raise error
        return real(images)

    model.forward = forward
    assert np.isfinite(model.predict(some[:3])).all()


def test_an_error_of_another_kind_is_not_tried_again(root: Path, contract: Contract, some: Pixels) -> None:
    model = load(root, contract, "onnx")
    seen = []

    def forward(images: Pixels) -> Any:
        seen.append(len(images))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model.micro_batch, model.forward = 8, forward
    with pytest.raises(RuntimeError, match="illegal"):
        model.predict(some[:8])
    assert seen == [8]


def test_memory_that_runs_out_for_real(root: Path, contract: Contract, some: Pixels) -> None:
    """The process may take 40 MiB more than it has, of which a batch of 4096 images would want five times as many."""
    model = load(root, contract, "onnx", micro_batch=4096)
    images = np.resize(some, (4096, *contract.shape))
    expected = np.resize(model.predict(some), (4096, 10))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 40 * 2**20, before[1]))
    try:
        found = model.predict(images)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert 1 <= model.micro_batch < 4096


# Precision


@pytest.mark.parametrize(("precision", "least"), [("bf16", 1e-3), ("fp16", 1e-4)])
def test_a_short_format_answers_nearly_as_float32(
    root: Path, contract: Contract, some: Pixels, golden: Golden, precision: str, least: float
) -> None:
    model = load(root, contract, "eager", precision=precision)
    assert replay(model, root / FILES.golden, [1]) <= model.tolerance
    logits = model.predict(some)
    assert logits.dtype == np.float32
    assert np.abs(logits - golden["logits"]).max() > least, "it does compute in the short format"


@pytest.mark.parametrize(("precision", "shift"), [("fp32", 0.02), ("fp16", 0.2), ("bf16", 1.5)])
def test_a_short_format_has_a_tolerance_too(
    root: Path, broken: Path, contract: Contract, golden: Golden, precision: str, shift: float
) -> None:
    logits = golden["logits"].copy()
    sure = probabilities(logits).max(axis=1).argmin()  # the image whose scores move most
    logits[sure, logits[sure].argmax()] += shift
    np.savez(broken / FILES.golden, **{**golden, "logits": logits})
    with pytest.raises(BundleError, match="golden images differ by"):
        replay(load(root, contract, "eager", precision=precision), broken / FILES.golden, [1])


def test_the_pixels_are_normalised_in_float32(root: Path, contract: Contract, some: Pixels) -> None:
    """Pixels differ by 1/255 of their range, which the 8 bits of bf16 could not tell apart everywhere."""
    network = network_of(root / FILES.weights, contract)
    seen: list[torch.Tensor] = []
    network.get_submodule("normalize").register_forward_hook(lambda *found: seen.append(found[2]))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        network(torch.from_numpy(some))
    assert seen[0].dtype == torch.float32


def test_fp32_is_not_tf32(root: Path, contract: Contract) -> None:
    torch.backends.cudnn.allow_tf32 = True
    load(root, contract, "eager")
    assert not torch.backends.cudnn.allow_tf32


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(
    ("name", "precision"),
    [("eager", "fp32"), ("eager", "bf16"), ("eager", "fp16"), ("exported", "fp32"), ("torchscript", "fp32")],
)
def test_on_a_gpu_the_golden_images_are_answered(root: Path, contract: Contract, name: Any, precision: Any) -> None:
    settings = HandlerSettings(engine=name, precision=precision)
    model, _ = load_model(root, contract, settings, 1, torch.cuda.device_count() - 1, 64)
    assert model.device == f"cuda:{torch.cuda.device_count() - 1}"
    replay(model, root / FILES.golden, [1, 3, 64])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_what_fits_is_answered(root: Path, contract: Contract, some: Pixels) -> None:
    """The process may take 256 MiB of the GPU."""
    model = load_model(root, contract, HandlerSettings(engine="eager", micro_batch=2**16), 1, 0, 1)[0]
    images = np.resize(some, (2**16, *contract.shape))
    expected = np.resize(model.predict(some), (2**16, 10))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**28 / torch.cuda.get_device_properties(0).total_memory)
    try:
        np.testing.assert_allclose(model.predict(images), expected, atol=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= model.micro_batch < 2**16


# What is refused before it is loaded


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


def test_the_replay_passes_and_says_how_close(engine: Student, root: Path) -> None:
    assert 0 <= replay(engine, root / FILES.golden, [1, 100]) < 1e-5


@pytest.mark.parametrize(("shift", "passes"), [(0.0005, True), (50, False), (np.nan, False)])
def test_the_replay_compares_probabilities(
    engine: Student, broken: Path, golden: Golden, shift: float, passes: bool
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
    engine: Student, root: Path, monkeypatch: pytest.MonkeyPatch
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
    engine: Student, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "predict", lambda images: np.zeros((len(images), 7), np.float32))
    with pytest.raises(BundleError, match="fails on 1 golden images"):
        replay(engine, root / FILES.golden, [1])


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"PK\3\4", {"images": np.zeros((1, 28, 28, 1), np.uint8)}])
def test_golden_images_that_cannot_be_read(engine: Student, broken: Path, content: Any) -> None:
    path = broken / FILES.golden
    path.unlink()
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match="no golden images"):
        replay(engine, path, [1])
