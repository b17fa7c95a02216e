"""The command with the least that it takes; its speeds are nobody's business."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_throughput
from handler.bundle import FILES


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gpu_throughput.py", *map(str, arguments)])
    return gpu_throughput.main()


@pytest.mark.usefixtures("threads")
def test_each_engine_in_each_precision_at_each_size(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "found.json"
    few = ["--repetitions", 5, "--seconds", 0.01]
    assert run(monkeypatch, "--bundle", bundle, "--batches", 2, 1, *few, "--out", out) == 0
    found = json.loads(out.read_text())
    on_cpu = [(row["engine"], row["precision"], row["batch"]) for row in found["rows"] if row["device"] == "cpu"]
    models = [("eager", "fp32"), ("eager", "bf16"), ("eager", "fp16")]
    models += [(name, "fp32") for name in ("onnx", "onnx-int8", "exported", "torchscript")]
    assert on_cpu == [(*model, batch) for batch in (1, 2) for model in models]
    for row in found["rows"]:
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["latency_ms"]["p50"], abs=0.1)
    if not torch.cuda.is_available():
        assert found["left_out"] == found["images_per_s_gpu_over_cpu"] == {} and found["machine"]["gpu"] is None
        assert "no GPU here: the CPU alone was measured" in capsys.readouterr().err


def test_the_best_of_the_gpu_is_compared_with_the_best_of_the_cpu() -> None:
    rows = [("cpu", 1, 50.0), ("cpu", 1, 100.0), ("cuda", 1, 80.0), ("cuda", 1, 40.0), ("cpu", 2, 9.0)]
    made = [{"device": device, "batch": batch, "images_per_s": speed} for device, batch, speed in rows]
    assert gpu_throughput.gains(made) == {"1": 0.8}


def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--bundle", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and FILES.passport in error and error.count("\n") == 1
