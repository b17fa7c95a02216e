"""Who is trained on what, and who teaches whom: ensembles, assistants, given teachers, partly labelled data."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import training.pipeline
from handler.bundle import file_digest
from handler.errors import DistilleryError, SettingsError
from tests.training.conftest import stages_run
from training import evaluate, report
from training.bank import Bank
from training.config import Experiment
from training.loop import Job, Trainer
from training.pipeline import DistillationPipeline
from training.reading import check
from training.teacher import LiveTeacher, PerSample

TINY = {"batch_size": 32, "epochs": 1, "network": "seed_student", "learning_rate": 0.05}


def changed(experiment: Experiment, **changes: Any) -> Experiment:
    """The experiment with nested settings replaced, as the reader builds them."""
    from handler.settings import load

    made = load(Experiment, experiment.to_dict(), changes)
    check(made)
    return made


def stage_names(pipeline: DistillationPipeline) -> list[str]:
    return [stage.name for stage in pipeline.stages()]


def run(experiment: Experiment, folder: Path, only: str | None = None) -> DistillationPipeline:
    pipeline = DistillationPipeline(experiment, folder)
    pipeline.run(only)
    return pipeline


def trained(experiment: Experiment, folder: Path) -> DistillationPipeline:
    """All that is trained; measuring it would take longer and say nothing more here."""
    pipeline = DistillationPipeline(experiment, folder)
    for name in itertools.takewhile(lambda name: name != "export", stage_names(pipeline)):
        pipeline.run(name)
    return pipeline


def test_assistants_stand_between_teacher_and_student(experiment: Experiment, tmp_path: Path) -> None:
    done = trained(changed(experiment, assistants=[TINY, TINY], baseline=True), tmp_path)
    assert stages_run(done)[:5] == ["teacher", "assistant1", "assistant2", "student", "baseline"]
    taught = {role: done.roles.teachers_of(role) for role in done.experiment.roles()}
    assert taught == {"teacher": [], "assistant1": ["teacher"], "assistant2": ["assistant1"], "student": ["assistant2"]}
    found = done.roles.teacher("student", done.dataset.train)
    assert isinstance(found, LiveTeacher)
    expected = done.load("assistant2").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.network.state_dict().items())


@pytest.mark.parametrize("weights", ["fixed", "learned"])
def test_an_ensemble_teaches_as_the_mean_of_its_predictions(
    experiment: Experiment, tmp_path: Path, weights: str
) -> None:
    ensemble = {"members": [TINY, {**TINY, "network": "seed_teacher"}], "weights": weights}
    done = trained(changed(experiment, ensemble=ensemble), tmp_path)
    assert stages_run(done) == ["teacher", "teacher2", "teacher3", "ensemble", "student"]
    shares = json.loads((done.folder / "ensemble.json").read_text())["shares"]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    images = done.dataset.test.images
    with torch.inference_mode():
        members = [done.roles._load_one(name).eval()(images).softmax(1) for name in ("teacher", "teacher2", "teacher3")]
        mixed = done.load("teacher")(images).softmax(1)
    torch.testing.assert_close(mixed, sum(w * p for w, p in zip(shares, members, strict=True)))


def test_the_report_counts_every_member_of_an_ensemble(experiment: Experiment, tmp_path: Path) -> None:
    """All of them as one teacher, and each alone."""
    done = run(changed(experiment, ensemble={"members": [{**TINY, "network": "seed_teacher"}]}), tmp_path)
    found = report.read(done.folder)
    jsonschema.validate(found, json.loads(Path("training/report.schema.json").read_text()))
    test, sizes = done.dataset.test, []
    members = (("teacher1", "teacher", experiment.teacher.network), ("teacher2", "teacher2", "seed_teacher"))
    for name, file, network in members:
        alone = evaluate.accuracy(evaluate.logits_of(done.roles._load_one(file), test.images), test.labels)
        assert (found["models"][name]["accuracy"], found["models"][name]["network"]) == (alone, network)
        assert found["models"][name]["size_bytes"] == (done.folder / f"{file}.pt").stat().st_size
        sizes.append(found["models"][name]["size_bytes"])
    assert found["models"]["teacher"]["size_bytes"] == sum(sizes)


def test_members_without_a_seed_have_one_of_their_own(experiment: Experiment) -> None:
    seeds = [settings.seed for settings in changed(experiment, ensemble={"members": [TINY, TINY]}).teachers().values()]
    assert seeds == [0, 1, 2]


@pytest.mark.parametrize("bank", [False, True])
def test_weights_per_sample_come_from_each_teacher_apart(experiment: Experiment, tmp_path: Path, bank: bool) -> None:
    wanted = changed(experiment, ensemble={"members": [TINY], "weights": "per_sample"}, bank=bank)
    done = run(wanted, tmp_path, "prepare")
    teacher = done.roles.teacher("student", done.dataset.train)
    assert isinstance(teacher, PerSample)
    assert all(isinstance(each, Bank if bank else LiveTeacher) for each in teacher.teachers)


def test_a_bank_is_shared_by_all_runs_with_the_same_teacher_and_views(experiment: Experiment, tmp_path: Path) -> None:
    first = run(changed(experiment, bank=True), tmp_path, "prepare")
    given = {"teacher": {"weights": str(first.folder / "teacher.pt")}}
    banks = list((tmp_path / "banks").glob("*.npy"))
    before = [path.stat().st_mtime_ns for path in banks]
    trained(changed(experiment, bank=True, name="second", objective={"temperature": 2.0}, **given), tmp_path)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "banks").glob("*.npy")] == before
    assert len(banks) == 1
    run(changed(experiment, bank=True, name="third", views={"shift": 1, "flip": False}, **given), tmp_path, "prepare")
    assert len(list((tmp_path / "banks").glob("*.npy"))) == 2


def test_a_student_of_a_bank_is_that_of_the_live_teacher(experiment: Experiment, tmp_path: Path) -> None:
    """But for the bank's half precision."""
    experiments = [changed(experiment, bank=bank, name=f"bank-{bank}") for bank in (False, True)]
    logits = []
    for each in experiments:
        done = run(each, tmp_path, "prepare")
        done.run("student")
        with torch.inference_mode():
            logits.append(done.load("student")(done.dataset.test.images))
    assert not torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=0.02, atol=0.02)


def test_a_teacher_with_weights_is_not_trained(experiment: Experiment, tmp_path: Path) -> None:
    first = run(experiment, tmp_path, "teacher")
    given = changed(experiment, name="second", teacher={"weights": str(first.folder / "teacher.pt")})
    second = run(given, tmp_path, "teacher")
    assert (second.folder / "teacher.pt").read_bytes() == (first.folder / "teacher.pt").read_bytes()
    assert not (second.folder / "teacher.history.jsonl").exists()


def test_a_given_file_that_changed_is_taken_anew(experiment: Experiment, tmp_path: Path) -> None:
    first = run(experiment, tmp_path, "teacher")
    file = tmp_path / "mine.pt"
    file.write_bytes((first.folder / "teacher.pt").read_bytes())
    given = changed(experiment, name="second", teacher={"weights": str(file)})
    run(given, tmp_path, "teacher")
    state = torch.load(file, weights_only=True)
    torch.save({name: value + 1 if value.is_floating_point() else value for name, value in state.items()}, file)
    again = run(given, tmp_path, "teacher")
    assert stages_run(again) == ["teacher", "teacher"]


def test_self_distillation_starts_from_an_earlier_student(experiment: Experiment, tmp_path: Path) -> None:
    """Born again: the teacher is the student of the run before, and that of a checkpoint too."""
    first = trained(experiment, tmp_path)
    for file in ("student.pt", "student.checkpoint.pt"):
        if file.endswith("checkpoint.pt"):
            torch.save({"network": first.load("student").state_dict(), "key": "k"}, first.folder / file)
        teacher = {"network": "seed_student", "weights": str(first.folder / file)}
        again = run(changed(experiment, name=f"again-{file}", teacher=teacher), tmp_path, "teacher")
        expected, found = first.load("student").state_dict(), again.load("teacher").state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_only_the_labels_that_it_may_know_reach_the_student(experiment: Experiment, tmp_path: Path) -> None:
    pipeline = DistillationPipeline(changed(experiment, data={"labelled": 40}, baseline=True), tmp_path)
    student, baseline, teacher = (pipeline.roles.split(role) for role in ("student", "baseline", "teacher"))
    assert (student.labels >= 0).sum() == 40
    assert len(student) == 256
    assert len(baseline) == 40
    assert bool((baseline.labels >= 0).all())
    assert bool((teacher.labels >= 0).all())


def test_a_student_without_labels_reads_none(experiment: Experiment, tmp_path: Path) -> None:
    """Given other labels, it ends as the same file."""
    wanted = changed(experiment, data={"labelled": 0}, objective={"alpha": 1.0})
    first = run(wanted, tmp_path, "teacher")
    first.run("student")
    second = DistillationPipeline(dataclasses.replace(wanted, name="second"), tmp_path)
    second.folder.mkdir()
    (second.folder / "teacher.pt").write_bytes((first.folder / "teacher.pt").read_bytes())
    train = second.dataset.train
    lying = dataclasses.replace(train, labels=(train.labels + 1) % 4)
    second.dataset = dataclasses.replace(second.dataset, train=lying)
    second.run("student")
    assert (second.folder / "student.pt").read_bytes() == (first.folder / "student.pt").read_bytes()


@pytest.mark.parametrize("change", [{"baseline": True}, {"objective": {"alpha": 0, "terms": []}}])
def test_labels_alone_have_the_budget_of_all_images(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Images without a label are made up for by seeing the others more often."""
    steps: dict[str, int] = {}

    class Noting(Trainer):
        def __init__(self, network: nn.Module, job: Job) -> None:
            steps[job.role] = job.batches.steps
            super().__init__(network, job)

    monkeypatch.setattr(training.pipeline, "Trainer", Noting)
    done = trained(changed(experiment, data={"labelled": 40}, **change), tmp_path)
    role = "baseline" if "baseline" in change else "student"
    assert len(done.roles.split(role)) == 40
    assert steps == dict.fromkeys(steps, 256 // 32) and role in steps
    lines = {name: (done.folder / f"{name}.history.jsonl").read_text().splitlines() for name in ("student", role)}
    assert [len(found) for found in lines.values()] == [3] * len(lines)


@pytest.mark.parametrize("change", [{"baseline": True}, {"objective": {"alpha": 0, "terms": []}}])
def test_neither_labels_nor_teacher_is_refused_before_any_training(
    experiment: Experiment, change: dict[str, Any]
) -> None:
    with pytest.raises(
        SettingsError, match=r"data\.labelled: expected 1 or more for who learns from labels alone, got 0"
    ):
        changed(experiment, data={"labelled": 0}, **change)


def test_features_reach_the_objective_through_the_pipeline(experiment: Experiment, tmp_path: Path) -> None:
    terms = [
        {"objective": "hint", "weight": 1.0, "layers": {"stage1": "stage1"}},
        {"objective": "similarity", "weight": 1.0, "layers": {"stage2": "stage2"}},
    ]
    done = trained(changed(experiment, objective={"terms": terms}), tmp_path)
    line = json.loads((done.folder / "student.history.jsonl").read_text().splitlines()[-1])
    assert {"hard", "hint", "similarity", "loss"} <= set(line)
    assert list(torch.load(done.folder / "student.pt", weights_only=True)) == list(
        done.roles.new("student").state_dict()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bank": True, "objective": {"terms": [{"objective": "hint", "layers": {"a": "b"}}]}}, "objective.terms"),
        ({"bank": True, "student": {"mixup": 0.2}}, "student.mixup: expected 0 with bank=true"),
        ({"student": {"network": "x.pt2"}}, "student.network: expected a network that can be trained"),
        ({"ensemble": {"members": [TINY], "shares": [1.0]}}, "ensemble.shares: expected one number for each of the 2"),
        ({"objective": {"terms": [{"objective": "kdd"}]}}, "unknown objective 'kdd': did you mean 'kd'?"),
        ({"objective": {"alpha": {"kind": "linear", "start": 0.3, "end": 1.7}}}, "objective.alpha: expected a number"),
        (
            {"objective": {"temperature": {"kind": "step", "end": 0.0}}},
            "objective.temperature: expected a number above",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    experiment: Experiment, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        changed(experiment, **changes)
    assert message in str(caught.value)


def test_the_ensembles_shares_must_have_been_found(experiment: Experiment, tmp_path: Path) -> None:
    pipeline = DistillationPipeline(changed(experiment, ensemble={"members": [TINY]}), tmp_path)
    with pytest.raises(DistilleryError, match="run the stage ensemble first"):
        pipeline.roles.shares()


def test_key_of_a_teacher_is_not_the_students(experiment: Experiment, tmp_path: Path) -> None:
    """So that the seeds of a comparison share their teacher."""
    stages = [
        {stage.name: stage.settings for stage in DistillationPipeline(made, tmp_path).stages()}
        for made in (experiment, changed(experiment, student={"seed": 5}, objective={"temperature": 2.0}))
    ]
    assert stages[0]["teacher"] == stages[1]["teacher"]
    assert stages[0]["student"] != stages[1]["student"]


def test_a_student_may_see_synthesized_images_alone(experiment: Experiment, tmp_path: Path) -> None:
    wanted = changed(experiment, synthesis={"images": 64, "steps": 2}, objective={"alpha": 1.0}, bank=True)
    done = trained(wanted, tmp_path)
    assert stages_run(done)[:3] == ["teacher", "synthesize", "student"]
    made = torch.load(done.folder / "synthetic.pt", weights_only=True)
    assert made["images"].shape == (64, 1, 8, 8)
    assert torch.equal(done.roles.split("student").images, made["images"])
    header = json.loads(next((tmp_path / "banks").glob("*.json")).read_text())
    assert header["source"]["data"] == file_digest(done.folder / "synthetic.pt")
