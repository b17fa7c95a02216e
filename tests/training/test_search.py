"""A search: what is searched and where, the flags that reproduce it, the trials' bookkeeping, and the whole command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import DistilleryError, SettingsError
from tests.training import pictures
from training import search
from training.config import Experiment, ObjectiveSettings, TermSettings
from training.ranges import flags_of, own_values, space
from training.reading import read_experiment
from training.replicas import Replica
from training.schedule import Schedule
from training.search import Search, fits

FALLING = Schedule(kind="linear", start=5.0, end=1.0)
KD, HINT = TermSettings(objective="kd"), TermSettings(objective="hint", weight=2.0, layers={"a": "b"})


def of(*terms: TermSettings, **settings: Any) -> Experiment:
    return Experiment(name="x", objective=ObjectiveSettings(terms=terms, **settings))


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        (of(KD), {"objective.temperature": 4.0, "objective.alpha": 0.9}),
        (of(KD, temperature=FALLING), {"objective.alpha": 0.9}),
        (of(dataclasses.replace(KD, temperature=2.0)), {"objective.alpha": 0.9}),
        (of(TermSettings(objective="logit_regression")), {"objective.alpha": 0.9}),
        (of(HINT, alpha=0), {"objective.alpha": 0.0, "objective.terms[0].weight": 2.0}),
        (
            of(KD, HINT, dataclasses.replace(HINT, weight=0.0), dataclasses.replace(HINT, weight=FALLING)),
            {"objective.temperature": 4.0, "objective.alpha": 0.9, "objective.terms[1].weight": 2.0},
        ),
    ],
)
def test_what_is_searched(experiment: Experiment, expected: dict[str, float]) -> None:
    assert own_values(experiment) == expected


@pytest.mark.parametrize("experiment", [of(), of(KD, temperature=FALLING, alpha=FALLING)])
def test_nothing_to_search_is_refused(experiment: Experiment) -> None:
    with pytest.raises(SettingsError, match="objective: expected terms with numbers to search, got none"):
        own_values(experiment)


def test_where_it_is_searched() -> None:
    found = space(of(KD, HINT))
    assert {path: (d.low, d.high, d.log) for path, d in found.items()} == {
        "objective.temperature": (1.0, 10.0, True),
        "objective.alpha": (0.0, 1.0, False),
        "objective.terms[1].weight": (0.2, 20.0, True),
    }
    assert space(of(KD, temperature=20.0))["objective.temperature"].high == 20
    assert space(of(KD, temperature=0.5))["objective.temperature"].low == 0.5


positive = st.floats(1e-6, 1e6)


@given(temperature=positive, alpha=st.floats(0, 1), weights=st.lists(positive, min_size=2, max_size=2))
def test_the_flags_give_the_experiment_its_values_and_change_nothing_else(
    temperature: float, alpha: float, weights: list[float]
) -> None:
    file = Path("training/experiments/compare/attention.yaml")
    terms = (
        TermSettings(objective="dist", weight=3.0, temperature=FALLING, standardize=True, options={"inter": 0.5}),
        TermSettings(objective="kd"),
        TermSettings(objective="similarity", weight=1.0, layers={"stage3": "stage4"}),
    )
    experiment = read_experiment(file, [], {})
    experiment = dataclasses.replace(experiment, objective=dataclasses.replace(experiment.objective, terms=terms))
    paths = ("objective.terms[0].weight", "objective.terms[2].weight")
    values = {"objective.temperature": temperature, "objective.alpha": alpha, **dict(zip(paths, weights, strict=True))}
    found = read_experiment(file, flags_of(experiment, values), {})
    assert own_values(found) == values
    back = read_experiment(file, flags_of(found, own_values(experiment)), {})
    assert back == experiment


@pytest.mark.parametrize(
    ("elapsed", "durations", "expected"),
    [(0, [], True), (100, [], False), (50, [49, 1, 50], True), (52, [49, 1, 50], False), (60, [30, 90], False)],
)
def test_a_trial_is_started_only_if_the_median_one_fits(elapsed: float, durations: list[float], expected: bool) -> None:
    assert fits(elapsed, 100, durations) is expected


def begin(experiment: Experiment, tmp_path: Path, *flags: str) -> Search:
    file = tmp_path / "toy.yaml"
    return Search(file, read_experiment(file, flags, {}), flags, tmp_path / "runs")


def end(found: Search, replica: Replica, accuracy: float) -> None:
    """Leave what a training leaves, and tell the search."""
    replica.folder.mkdir(parents=True, exist_ok=True)
    (replica.folder / "student.history.jsonl").write_text(json.dumps({"validation_accuracy": accuracy}) + "\n")
    found.note(replica, None)


def take(found: Search, count: int) -> list[Replica]:
    return [replica for _, replica in zip(range(count), found.proposals(0.0, float("inf")), strict=False)]


def test_the_first_trial_is_the_experiment_as_it_is(experiment: Experiment, tmp_path: Path) -> None:
    found = begin(experiment, tmp_path, "objective.alpha=0.25")
    (first,) = take(found, 1)
    assert first.folder == tmp_path / "runs" / "toy-search" / "trial-0"
    assert first.flags == ("objective.alpha=0.25", "objective.temperature=4.0", "objective.alpha=0.25")


def test_a_second_start_carries_on(experiment: Experiment, tmp_path: Path) -> None:
    first = begin(experiment, tmp_path)
    trials = take(first, 3)
    for replica, accuracy in zip(trials[:2], (0.5, 0.75), strict=True):
        end(first, replica, accuracy)
    second = begin(experiment, tmp_path)
    again = take(second, 2)
    assert again[0] == trials[2], "what was interrupted comes first"
    assert again[1].name == "trial-3"
    assert again[1].flags not in [replica.flags for replica in trials], "another seed proposes other values"
    found = second.result()
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete", "running", "running"]
    assert found["best"]["number"] == 1
    assert found["best"]["validation_accuracy"] == 0.75
    assert tuple(found["best"]["flags"]) == trials[1].flags


def test_the_same_seed_proposes_the_same(experiment: Experiment, tmp_path: Path) -> None:
    flags = []
    for name in ("a", "b"):
        file = tmp_path / "toy.yaml"
        found = Search(file, experiment, (), tmp_path / name)
        flags.append([replica.flags for replica in take(found, 3)])
    assert flags[0] == flags[1]


def test_other_settings_are_another_study(experiment: Experiment, tmp_path: Path) -> None:
    first = begin(experiment, tmp_path)
    end(first, take(first, 1)[0], 0.5)
    assert len(begin(experiment, tmp_path).finished) == 1
    assert begin(experiment, tmp_path, "student.epochs=7").finished == []


def test_one_is_run_in_any_case_and_no_more_without_time(experiment: Experiment, tmp_path: Path) -> None:
    found = begin(experiment, tmp_path)
    assert [replica.name for replica in found.proposals(0.0, 0.0)] == ["trial-0"]


def test_a_trial_killed_while_it_was_proposed_is_given_up(experiment: Experiment, tmp_path: Path) -> None:
    first = begin(experiment, tmp_path)
    first.study.ask()
    second = begin(experiment, tmp_path)
    assert [replica.name for replica in take(second, 1)] == ["trial-1"]


def test_a_failure_before_any_success_ends_the_search(experiment: Experiment, tmp_path: Path) -> None:
    found = begin(experiment, tmp_path)
    for replica in found.proposals(0.0, float("inf")):
        found.note(replica, "the loss is not finite")
    assert len(found.study.trials) == 1
    with pytest.raises(DistilleryError, match=r"^no trial has ended well: trial-0: the loss is not finite$"):
        found.result()
    again = begin(experiment, tmp_path)
    (own,) = take(again, 1)
    assert own.flags == replica.flags, "the experiment as it is gets another chance"


def test_a_failure_after_a_success_does_not(experiment: Experiment, tmp_path: Path) -> None:
    found = begin(experiment, tmp_path)
    for count, replica in enumerate(found.proposals(0.0, float("inf"))):
        if count == 2:
            break
        if count == 1:
            found.note(replica, "out of memory")
        else:
            end(found, replica, 0.5)
    assert [trial["state"] for trial in found.result()["trials"]] == ["complete", "fail", "running"]


def test_the_table_has_the_best_first() -> None:
    trial = {"state": "complete", "values": {"objective.alpha": 0.9}, "validation_accuracy": 0.5, "number": 0}
    better = {**trial, "values": {"objective.alpha": 0.12345}, "validation_accuracy": 0.75, "number": 1}
    failed = {**trial, "number": 2, "validation_accuracy": None}
    flags = ["objective.alpha=0.12345", 'objective.terms=[{"objective": "kd"}]']
    result = {"trials": [trial, better, failed], "own": trial["values"], "best": {"flags": flags}}
    lines = search.table(result).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["trial", "validation accuracy, %", "alpha"]
    assert cells[2:4] == [["1", "75.00", "0.1235"], ["0 (as it is)", "50.00", "0.9"]]
    assert lines[4:] == ["", 'the best again: objective.alpha=0.12345 \'objective.terms=[{"objective": "kd"}]\'']


def test_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="minutes: expected more than 0, got 0"):
        search.run(tmp_path / "x.yaml", [], tmp_path, 0, 1, None)


@pytest.mark.e2e
def test_searched_and_carried_on(tmp_path: Path) -> None:
    """Real trainings: one trial in any case, judged as its history says; a second start trains nothing again."""
    runs, output = tmp_path / "runs", tmp_path / "found.json"
    file = pictures.write(tmp_path / "toy.yaml", pictures.draw(tmp_path / "pictures"), bank=True)
    first = search.run(file, ["student.epochs=1"], runs, 1e-3, 2, output)
    trial = runs / "toy-search" / "trial-0"
    history = [json.loads(line) for line in (trial / "student.history.jsonl").read_text().splitlines()]
    assert first["best"]["validation_accuracy"] == history[-1]["validation_accuracy"]
    assert [trial["number"] for trial in first["trials"]] == [0]
    assert first == json.loads(output.read_text())
    assert (trial / "teacher.pt").samefile(runs / "toy-search" / "prepared" / "teacher.pt")
    assert len(list((runs / "banks").glob("*.npy"))) == 1, "the bank lies where all runs find it"
    trained = (trial / "student.pt").stat()
    second = search.run(file, ["student.epochs=1"], runs, 1e-3, 2, output)
    assert second["trials"] == first["trials"]
    assert (trial / "student.pt").stat() == trained


@pytest.mark.e2e
def test_what_cannot_be_prepared_is_said_in_one_line(tmp_path: Path) -> None:
    teacher = {**pictures.SMALL, "weights": "nowhere.pt"}
    file = pictures.write(tmp_path / "toy.yaml", pictures.draw(tmp_path / "pictures"), teacher=teacher)
    with pytest.raises(DistilleryError, match=r"^toy: nowhere\.pt"):
        search.run(file, [], tmp_path / "runs", 1, 1, None)
