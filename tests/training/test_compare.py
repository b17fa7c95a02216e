"""A comparison: what may be compared, its table and plot, and the whole command on real trainings."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from handler.errors import DistilleryError, SettingsError
from tests.training import pictures
from training import compare, data, plots
from training.config import DataSettings, Experiment
from training.contenders import contenders
from training.data import Dataset
from training.evaluate import accuracy, logits_of
from training.pipeline import DistillationPipeline
from training.reading import read_experiment
from training.statistics import paired, summary


@pytest.fixture
def write(tmp_path: Path, experiment: Experiment) -> Any:
    """Writes the toy experiment with other settings under another name."""

    def variant(name: str, **sections: dict[str, Any]) -> Path:
        tree = experiment.to_dict() | {"name": name}
        for section, settings in sections.items():
            tree[section] |= settings
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return variant


def test_contenders_have_a_replica_a_seed(tmp_path: Path, write: Any) -> None:
    a, b = contenders([write("a"), write("b", objective={"alpha": 0.5})], 2, ["student.ema=0.9"], tmp_path / "runs")
    assert [replica.name for replica in b.replicas] == ["b-seed0", "b-seed1"]
    assert b.replicas[1].flags == ("student.ema=0.9", "student.seed=1")
    assert b.experiment.student.ema == 0.9
    assert a.teacher == b.teacher
    assert a.budget == b.budget == {"epochs": 3, "batch_size": 32, "images_per_epoch": 256}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {"epochs": 4}}, "a and b: expected equal budgets, got epochs 3 and 4"),
        ({"student": {"batch_size": 64}}, "a and b: expected equal budgets, got batch_size 32 and 64"),
        ({"synthesis": {"images": 40}}, "a and b: expected equal budgets, got images_per_epoch 256 and 32"),
    ],
)
def test_another_budget_is_refused(tmp_path: Path, write: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        contenders([write("a"), write("b", **change)], 1, [], tmp_path)
    assert str(error.value) == message


@pytest.mark.parametrize("change", [{}, {"objective": {"terms": []}}])
def test_few_labels_keep_the_budget(tmp_path: Path, write: Any, change: dict[str, Any]) -> None:
    a, b = contenders([write("a"), write("b", data={"labelled": 100}, **change)], 1, [], tmp_path)
    assert a.teacher == b.teacher
    assert a.budget == b.budget


def test_other_data_is_refused(tmp_path: Path, write: Any, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(settings: DataSettings) -> Dataset:
        return dataclasses.replace(dataset, name=settings.name, digest=settings.name)

    monkeypatch.setattr(data, "load", load)
    with pytest.raises(SettingsError, match="a and b: expected the same data, got fashion_mnist and mnist"):
        contenders([write("a"), write("b", data={"name": "mnist"})], 1, [], tmp_path)


def test_a_name_twice_no_seed_and_no_file_are_refused(tmp_path: Path, write: Any) -> None:
    with pytest.raises(SettingsError, match="name: expected another one for each experiment, got a twice"):
        contenders([write("a"), write("b")], 1, ["name=a"], tmp_path)
    with pytest.raises(SettingsError, match="seeds: expected at least 1, got 0"):
        contenders([write("a")], 0, [], tmp_path)
    with pytest.raises(SettingsError, match="compare: expected experiment files, the baseline's first, got none"):
        contenders([], 1, [], tmp_path)


def test_a_file_named_twice_counts_once(tmp_path: Path, write: Any) -> None:
    a, b = write("a"), write("b")
    found = contenders([b, a, b], 1, [], tmp_path)
    assert [contender.experiment.name for contender in found] == ["b", "a"]


def row(name: str, accuracies: list[float], baseline: list[float] | None) -> dict[str, Any]:
    figures = {key: summary(accuracies) for key in compare.FIGURES}
    difference = {"accuracy": paired(accuracies, baseline)} if baseline else None
    rest = {"seconds": 61.6, "images_per_s": 2345.6, "teacher": {"accuracy": 0.95}, "difference": difference}
    return {"name": name, "summary": figures, "seeds": [{}] * len(accuracies), **rest}


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "experiments": list(rows),
        "baseline": rows[0]["name"],
        "budget": {"epochs": 10, "images_per_epoch": 54912},
        "data": {"name": "Fashion-MNIST", "test_images": 10000},
        "machine": {"jobs": 2, "cores": 2, "processor": "A CPU"},
    }


def test_the_table_by_hand() -> None:
    lines = compare.table(result(row("plain", [0.90, 0.92], None), row("kd", [0.92, 0.95], [0.90, 0.92]))).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][1:3] == ["accuracy, %", "difference to plain, points (95 % interval)"]
    assert cells[2] == ["plain", "91.00 ± 1.41", "–", "91.00", "91.00", "0.9100", "62", "2,346"]
    # Differences 2 and 3 points: sd √½, t(0.975, 1) = 12.706, so 2.5 ± 12.706 · √½ / √2 = 2.5 ± 6.353.
    assert cells[3][:3] == ["kd", "93.50 ± 2.12", "+2.50 (-3.85 to +8.85)"]
    assert lines[-1].startswith("2 seeds, 10 epochs of 54,912 images; 10,000 test images of Fashion-MNIST, last epoch;")
    assert "teacher: 95.00 %;" in lines[-1]


def test_one_seed_has_no_interval() -> None:
    lines = compare.table(result(row("plain", [0.90], None), row("kd", [0.92], [0.90]))).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:4]] == ["kd", "92.00", "+2.00"]


@pytest.mark.parametrize("names", [[], ["kd"], list("abcdefghijk")])
def test_differences_are_drawn_with_and_without_interval(tmp_path: Path, names: list[str]) -> None:
    found = {name: paired([0.9] * (1 + i % 2), [0.8] * (1 + i % 2)) for i, name in enumerate(names)}
    plots.differences(found, "plain", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (605, 495)


def test_the_standing_comparison_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    """All of training/experiments/compare: one teacher, one budget, every objective's name and layers known."""
    monkeypatch.setattr(data, "load", lambda settings: dataset)
    files = sorted(Path("training/experiments/compare").glob("*.yaml"))
    found = contenders(files, 1, ["student.batch_size=32"], tmp_path)
    assert len({contender.teacher for contender in found}) == 1
    assert [contender.experiment.name for contender in found] == [file.stem for file in files]
    networks = {
        role: DistillationPipeline(found[0].experiment, tmp_path).roles.new(role) for role in ("teacher", "student")
    }
    for contender in found:
        for term in contender.experiment.objective.terms:
            for student, teacher in term.layers.items():
                networks["student"].get_submodule(student)
                networks["teacher"].get_submodule(teacher)


@pytest.mark.parametrize("folder", ["best", "few_labels"])
def test_both_halves_of_a_claim_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Dataset, folder: str
) -> None:
    """The distilled student and the one on labels alone: one teacher, one budget."""
    monkeypatch.setattr(data, "load", lambda settings: dataset)
    files = [Path("training/experiments") / folder / name for name in ("labels.yaml", "distilled.yaml")]
    flags = ["student.batch_size=32", *(["data.labelled=100"] if folder == "few_labels" else [])]
    labels, distilled = contenders(files, 1, flags, tmp_path)
    assert labels.teacher == distilled.teacher
    assert not labels.experiment.objective.terms and distilled.experiment.objective.terms


@pytest.mark.e2e
def test_trained_compared_and_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real trainings: failures are named and stop nobody, the teacher is trained once, a second start only finishes."""
    folder, runs = pictures.draw(tmp_path / "pictures"), tmp_path / "runs"
    plain = pictures.write(tmp_path / "plain.yaml", folder, objective={"alpha": 0, "terms": []})
    kd = pictures.write(tmp_path / "kd.yaml", folder, bank=True)
    hot = pictures.write(tmp_path / "hot.yaml", folder, student={**pictures.SMALL, "learning_rate": 1e30})
    lost = pictures.write(tmp_path / "lost.yaml", folder, teacher={**pictures.SMALL, "weights": "nowhere.pt"})
    with pytest.raises(DistilleryError) as error:
        compare.run([hot, lost, plain], 1, [], runs, 2, None)
    assert "hot-seed0: student: the loss is not finite" in str(error.value)
    assert "lost: nowhere.pt" in str(error.value)
    assert "plain" not in str(error.value)
    assert not list(runs.glob("compare-*"))
    (kept,) = runs.glob("*/student.pt")
    assert kept.parent.name == "plain-seed0"
    before = kept.stat()

    found = compare.run([plain, kd], 2, [], runs, 2, None)
    assert kept.stat() == before
    assert [path.parent.name for path in runs.glob("*/teacher.history.jsonl")] == ["hot-seed0"]
    assert found == json.loads((runs / "compare-plain-kd.json").read_text())
    assert (runs / "compare-plain-kd.md").read_text() == compare.table(found) + "\n"
    assert (runs / "compare-plain-kd.png").read_bytes().startswith(b"\x89PNG")
    assert found["command"] == f"python -m training compare {plain} {kd} --seeds 2"
    assert found["equal_budget"] is True
    assert found["budget"] == {"epochs": 2, "batch_size": 32, "images_per_epoch": 96}
    _check_figures(found, read_experiment(kd, [], {}), runs)


def _check_figures(found: dict[str, Any], experiment: Experiment, runs: Path) -> None:
    """The second row's figures against the files, and the differences against the seeds' own figures."""
    first, second = found["experiments"]
    assert first["difference"] is None
    for key in compare.FIGURES:
        ours, baseline = ([line[key] for line in row["seeds"]] for row in (second, first))
        assert second["difference"][key] == paired(ours, baseline)
        assert second["summary"][key] == summary(ours)
    test = data.load(experiment.data).test
    for seed, line in enumerate(second["seeds"]):
        pipeline = DistillationPipeline(dataclasses.replace(experiment, name=f"kd-seed{seed}"), runs)
        logits, teacher = (logits_of(pipeline.load(role), test.images) for role in ("student", "teacher"))
        assert line["seed"] == seed
        assert line["accuracy"] == accuracy(logits, test.labels)
        assert line["agreement"] == accuracy(logits, teacher.argmax(1))
        assert line["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, test.labels).item())
        lines = (runs / f"kd-seed{seed}" / "student.history.jsonl").read_text().splitlines()
        rates = [json.loads(text)["images_per_s"] for text in lines]
        assert line["seconds"] == pytest.approx(sum(96 / rate for rate in rates), abs=1e-3)
    states = [torch.load(runs / f"kd-seed{seed}" / "student.pt", weights_only=True) for seed in (0, 1)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0]), "the seeds differ"
    assert second["parameters"] == sum(p.numel() for p in pipeline.load("student").parameters())
