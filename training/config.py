"""The experiment: a typed tree of settings. Flag > environment > experiment file > default.

    python -m training run training/experiments/quickstart.yaml student.epochs=20 baseline=true
    DISTILLERY__OBJECTIVE__TEMPERATURE=2 python -m training run …

The variables DIST_TEMP, DIST_ALPHA, DIST_EPOCHS and BATCH_SIZE are honoured too, below the DISTILLERY__ ones.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from handler.errors import SettingsError
from handler.settings import environment, load, nested, parse

SHORT_NAMES = {
    "DIST_TEMP": ("objective.temperature",),
    "DIST_ALPHA": ("objective.alpha",),
    "DIST_EPOCHS": ("student.epochs",),
    "BATCH_SIZE": ("teacher.batch_size", "student.batch_size"),
}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data set by name, where its files may lie, and how many images are held out for validation.

    `train_limit` and `test_limit` keep only that many images (0 keeps all), for smoke runs.
    """

    name: Literal["fashion_mnist", "mnist"] = "fashion_mnist"
    root: str = "data"
    validation: int = 5000
    train_limit: int = 0
    test_limit: int = 0


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """The finite set of views of an image (see training/views.py); `shift` is in pixels."""

    shift: int = 1
    flip: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One network and its budget; the baseline is trained with the student's.

    `learning_rate` is the peak of a one-cycle schedule whose first `warmup` part (0..1) rises.
    `precision` bfloat16 means autocast: it pays on large networks and costs on small ones.
    """

    network: str
    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    warmup: float = 0.2
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """loss = (1 − alpha)·cross-entropy + alpha·T²·KL(teacher ‖ student), T being `temperature`."""

    temperature: float = 4.0
    alpha: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that decides a run. `device` auto takes the first GPU if there is one."""

    name: str
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    baseline: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    teacher: TrainSettings = field(default_factory=lambda: TrainSettings(network="residual", epochs=6))
    student: TrainSettings = field(default_factory=lambda: TrainSettings(network="separable", epochs=6))
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)

    def to_dict(self) -> dict[str, Any]:
        """The effective tree as plain values, as it is written to `experiment.yaml` and into the passport."""
        return dataclasses.asdict(self)


def read_experiment(path: Path, flags: Sequence[str], environ: Mapping[str, str]) -> Experiment:
    """The experiment of a file, with `section.key=value` flags and the environment over it.

    Raises SettingsError for a file that cannot be read, an unknown key (naming the nearest) or a wrong value.
    """
    try:
        file = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(file, dict):
        raise SettingsError(f"{path}: expected a mapping of settings, got {type(file).__name__}")
    own = {key: value for key, value in environment(environ).items() if key != "handler"}
    default = Experiment(name=path.stem).to_dict()
    experiment = load(Experiment, default, file, *_short_names(environ), own, *map(_flag, flags))
    _check(experiment)
    return experiment


def _flag(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError(f"{text}: expected section.key=value")
    return nested(name.split("."), parse(name, value))


def _short_names(environ: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        nested(path.split("."), parse(name, environ[name]))
        for name, paths in SHORT_NAMES.items()
        if name in environ
        for path in paths
    ]


def _check(experiment: Experiment) -> None:
    """Ranges that types cannot say."""
    objective = experiment.objective
    rules = [
        (re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", experiment.name), "name", "letters, digits, '.', '_' and '-'"),
        (0 <= objective.alpha <= 1, "objective.alpha", "a number from 0 to 1"),
        (objective.temperature > 0, "objective.temperature", "a number above 0"),
        (experiment.data.validation > 0, "data.validation", "at least 1 image"),
        (experiment.views.shift >= 0, "views.shift", "0 pixels or more"),
    ]
    for role, settings in (("teacher", experiment.teacher), ("student", experiment.student)):
        rules += [
            (settings.epochs >= 1, f"{role}.epochs", "at least 1"),
            (settings.batch_size >= 2, f"{role}.batch_size", "at least 2 (BatchNorm needs two)"),
            (settings.learning_rate > 0, f"{role}.learning_rate", "a number above 0"),
            (0 < settings.warmup < 1, f"{role}.warmup", "a number between 0 and 1"),
        ]
    for holds, key, expected in rules:
        if not holds:
            value: Any = experiment.to_dict()
            for part in key.split("."):
                value = value[part]
            raise SettingsError(f"{key}: expected {expected}, got {value!r}")
