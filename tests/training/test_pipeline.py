"""The pipeline as files: what it writes, what it skips, what it refuses."""

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from handler.bundle import FILES, verify
from handler.contract import Contract
from handler.engines import ENGINES, Setup
from handler.errors import DistilleryError
from handler.networks import build
from tests.training.conftest import stages_run
from training import measure, report
from training.config import Experiment
from training.pipeline import DistillationPipeline
from training.processes import Processes
from training.stages import Runner


@pytest.fixture
def run(experiment: Experiment, tmp_path: Path, finished: Path) -> DistillationPipeline:
    """A finished run, each test's own copy."""
    wanted = dataclasses.replace(experiment, baseline=True)
    DistillationPipeline(wanted, finished).run()
    shutil.copytree(finished, tmp_path / "runs")
    return DistillationPipeline(wanted, tmp_path / "runs")


ALL = ["teacher", "student", "baseline", "export", "evaluate", "bundle"]


def test_the_whole_run(run: DistillationPipeline) -> None:
    assert stages_run(run) == ALL
    names = {path.name for path in run.folder.iterdir()}
    assert {"teacher.pt", "student.pt", "baseline.pt", "student.onnx", "report.json", "experiment.yaml"} <= names
    assert {"curves.png", "confusion.png", "reliability.png"} <= names
    assert not [name for name in names if name.startswith(".") or "checkpoint" in name], "half-made files are left"


def test_the_report_keeps_its_schema_and_its_arithmetic(run: DistillationPipeline) -> None:
    found = report.read(run.folder)
    jsonschema.validate(found, json.loads(Path("training/report.schema.json").read_text()))
    for model in found["models"].values():
        table = torch.tensor(model["confusion"])
        assert table.diagonal().sum().item() / table.sum().item() == pytest.approx(model["accuracy"])
        assert model["accuracy_interval_95"][0] <= model["accuracy"] <= model["accuracy_interval_95"][1]
    assert found["models"]["teacher"]["agreement"] == 1
    exported = found["engines"]["student"]["onnx"]
    assert exported["agreement_with_eager"] == 1
    assert exported["probability_difference_max"] < 1e-4
    assert exported["size_bytes"] == (run.folder / FILES.onnx).stat().st_size


def test_the_table_has_each_model_as_a_column(run: DistillationPipeline) -> None:
    found = report.read(run.folder)
    lines = report.table(found).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["teacher", "student", "same student, labels only"]
    assert f"{100 * found['models']['student']['accuracy']:.2f}" in lines[2]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_the_student_file_is_the_bare_student(run: DistillationPipeline) -> None:
    state = torch.load(run.folder / "student.pt", weights_only=True)
    bare = build("seed_student", channels=1, size=(8, 8), classes=4)
    assert list(state) == list(bare.state_dict())


def test_the_bundle_is_whole_and_sealed(run: DistillationPipeline) -> None:
    bundle = run.folder / "bundle"
    passport = verify(bundle)
    wanted = {FILES.weights, FILES.onnx, FILES.contract, FILES.report, FILES.golden, FILES.passport}
    assert {path.name for path in bundle.iterdir()} == wanted
    assert passport["evidence"]["experiment"] == run.experiment.to_dict()
    assert passport["evidence"]["metrics"]["accuracy"] == report.read(run.folder)["models"]["student"]["accuracy"]
    contract = Contract.read(bundle / FILES.contract)
    assert (contract.shape, contract.network) == ((1, 8, 8), "seed_student")


def test_the_golden_payloads_are_test_images_with_the_students_logits(run: DistillationPipeline) -> None:
    golden = np.load(run.folder / "bundle" / FILES.golden)
    assert golden["images"].shape == (64, 8, 8, 1)
    pixels = torch.from_numpy(golden["images"]).permute(0, 3, 1, 2)
    assert torch.equal(pixels, run.dataset.test.images[:64])
    with torch.inference_mode():
        expected = run.load("student")(pixels)
    torch.testing.assert_close(torch.from_numpy(golden["logits"]), expected)


def test_onnx_takes_any_batch(run: DistillationPipeline) -> None:
    forward = ENGINES["onnx"].load(run.folder / FILES.onnx, Setup(run.contract))
    student = run.load("student")
    for count in (1, 3, 100):
        images = run.dataset.test.images[:count]
        with torch.inference_mode():
            torch.testing.assert_close(measure.answers(forward, images), student(images), rtol=1e-4, atol=1e-4)


def test_a_second_run_does_nothing(run: DistillationPipeline) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.pt")}
    DistillationPipeline(run.experiment, run.folder.parent).run()
    assert stages_run(run) == ALL
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.pt")}


def test_a_change_reruns_what_stands_on_it_and_no_more(run: DistillationPipeline) -> None:
    objective = dataclasses.replace(run.experiment.objective, temperature=2.0)
    DistillationPipeline(dataclasses.replace(run.experiment, objective=objective), run.folder.parent).run()
    assert stages_run(run)[len(ALL) :] == ["student", "export", "evaluate", "bundle"]


def test_a_touched_or_lost_output_is_made_again(run: DistillationPipeline) -> None:
    (run.folder / "student.onnx").write_bytes(b"touched")
    (run.folder / "bundle" / "golden.npz").unlink()
    DistillationPipeline(run.experiment, run.folder.parent).run()
    assert stages_run(run)[len(ALL) :] == ["export", "bundle"]
    verify(run.folder / "bundle")


def test_a_single_stage_needs_its_inputs(experiment: Experiment, tmp_path: Path) -> None:
    pipeline = DistillationPipeline(experiment, tmp_path / "runs")
    with pytest.raises(DistilleryError, match=r"student: .*teacher.pt is missing; run the stages before it first"):
        pipeline.run("student")
    pipeline.run("teacher")
    assert stages_run(pipeline) == ["teacher"]


def test_the_baseline_is_only_there_when_asked_for(experiment: Experiment, tmp_path: Path) -> None:
    pipeline = DistillationPipeline(experiment, tmp_path / "runs")
    with pytest.raises(DistilleryError, match="baseline: not a stage of this experiment"):
        pipeline.run("baseline")


def test_weights_of_another_network_are_refused(run: DistillationPipeline) -> None:
    (run.folder / "teacher.pt").write_bytes((run.folder / "student.pt").read_bytes()[:-100])
    with pytest.raises(DistilleryError, match="not the teacher of this experiment"):
        run.load("teacher")


def test_two_at_once_take_turns(experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second waits for the first, and then finds its work done."""
    first, second = (DistillationPipeline(experiment, tmp_path / "runs") for _ in range(2))
    first.folder.mkdir(parents=True)
    runner = Runner(first.folder, first.dataset.digest, Processes())
    with caplog.at_level("INFO", "training"):
        waiting = threading.Thread(target=second.run, args=("teacher",))
        with runner.alone():
            waiting.start()
            deadline = time.monotonic() + 10
            while "another process is at work" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stages_run(first) == []
            runner.run(first.stages()[0])
        waiting.join(30)
    assert stages_run(first) == ["teacher"]
    assert "another process is at work" in caplog.text
