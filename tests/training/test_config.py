"""Experiments: precedence, names, and errors that name the key."""

from pathlib import Path

import pytest

from handler.errors import SettingsError
from training.config import Experiment
from training.reading import read_experiment

EXPERIMENTS = Path("training/experiments")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("student: {network: separable, epochs: 7}\nobjective: {temperature: 3}\n")
    return path


def test_the_file_wins_over_the_default_and_names_the_run(file: Path) -> None:
    experiment = read_experiment(file, [], {})
    assert (experiment.name, experiment.student.epochs, experiment.objective.temperature) == ("mine", 7, 3.0)
    assert experiment.objective.alpha == 0.9


def test_flag_over_environment_over_file(file: Path) -> None:
    environ = {"DISTILLERY__STUDENT__EPOCHS": "8", "DISTILLERY__OBJECTIVE__TEMPERATURE": "5"}
    experiment = read_experiment(file, ["student.epochs=9"], environ)
    assert (experiment.student.epochs, experiment.objective.temperature) == (9, 5.0)


def test_the_short_variables(file: Path) -> None:
    environ = {"DIST_TEMP": "2.5", "DIST_ALPHA": "0.3", "DIST_EPOCHS": "4", "BATCH_SIZE": "64"}
    experiment = read_experiment(file, [], environ)
    assert (experiment.objective.temperature, experiment.objective.alpha) == (2.5, 0.3)
    assert (experiment.student.epochs, experiment.student.batch_size, experiment.teacher.batch_size) == (4, 64, 64)


def test_the_long_variables_win_over_the_short_ones(file: Path) -> None:
    environ = {"DIST_EPOCHS": "4", "DISTILLERY__STUDENT__EPOCHS": "5"}
    assert read_experiment(file, [], environ).student.epochs == 5


def test_the_handlers_variables_are_not_the_experiments(file: Path) -> None:
    assert read_experiment(file, [], {"DISTILLERY__HANDLER__ENGINE": "eager"}).student.epochs == 7


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("student.epoch=3", "unknown setting 'student.epoch': did you mean 'student.epochs'?"),
        ("objectiv.alpha=1", "unknown setting 'objectiv': did you mean 'objective'?"),
        ("student.epochs=many", "student.epochs: expected int, got 'many'"),
        ("student.epochs=0", "student.epochs: expected at least 1, got 0"),
        ("objective.alpha=1.5", "objective.alpha: expected a number from 0 to 1, got 1.5"),
        ("objective.temperature=0", "objective.temperature: expected a number above 0, got 0.0"),
        ("student.batch_size=1", "student.batch_size: expected at least 2"),
        ("student.learning_rate=true", "student.learning_rate: expected a number, got True"),
        ("student.precision=half", "student.precision: expected one of float32, bfloat16, float16, got 'half'"),
        ("data.name=imagenet", "data.name: expected one of fashion_mnist, mnist, cifar10, folder, got 'imagenet'"),
        ("name=../escape", "name: expected letters"),
        ("student=3", "student: expected a mapping"),
        ("student", "student: expected section.key=value"),
        ("student.epochs={", "student.epochs: expected a YAML value"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(file: Path, flag: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_experiment(file, [flag], {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("a: [", "not YAML"), ("- 1\n", "expected a mapping")]
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=message) as caught:
        read_experiment(path, [], {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_experiment_is_valid_and_named_as_its_file(path: Path) -> None:
    assert read_experiment(path, [], {}).name == path.stem


def test_a_scientific_number_without_a_dot_is_a_number(file: Path) -> None:
    assert read_experiment(file, ["student.weight_decay=1e-4"], {}).student.weight_decay == 1e-4


def test_the_effective_tree_reads_back_as_itself(file: Path, tmp_path: Path) -> None:
    import yaml

    experiment = read_experiment(file, [], {})
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(experiment.to_dict()))
    assert read_experiment(copy, [], {}) == experiment
    assert isinstance(experiment, Experiment)
