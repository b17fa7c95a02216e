"""An experiment out of its file: flag > environment > experiment file > default, then the ranges.

    python -m training run training/experiments/quickstart.yaml student.epochs=20 baseline=true
    DISTILLERY__OBJECTIVE__TEMPERATURE=2 python -m training run …

The variables DIST_TEMP, DIST_ALPHA, DIST_EPOCHS and BATCH_SIZE are honoured too, below the DISTILLERY__ ones.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from handler.errors import SettingsError
from handler.settings import environment, load, nested, parse
from training.config import LEAST, EnsembleSettings, Experiment, ObjectiveSettings, SynthesisSettings, TrainSettings
from training.criterion import named
from training.schedule import Schedule, Value, extremes

SHORT_NAMES = {
    "DIST_TEMP": ("objective.temperature",),
    "DIST_ALPHA": ("objective.alpha",),
    "DIST_EPOCHS": ("student.epochs",),
    "BATCH_SIZE": ("teacher.batch_size", "student.batch_size"),
}
Rule = tuple[Any, str, str, Any]
"""Whether it holds, the key, what was expected, what was got."""


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
    check(experiment)
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


def check(experiment: Experiment) -> None:
    """Refuse values out of their range, which types cannot say, with a SettingsError that names the key."""
    named(experiment.objective.terms)
    for holds, key, expected, value in _rules(experiment):
        if not holds:
            raise SettingsError(f"{key}: expected {expected}, got {value!r}")


def _rules(experiment: Experiment) -> Iterator[Rule]:
    data, views = experiment.data, experiment.views
    name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", experiment.name)
    yield name, "name", "letters, digits, '.', '_' and '-'", experiment.name
    yield data.validation > 0, "data.validation", "at least 1 image", data.validation
    yield data.labelled is None or data.labelled >= 0, "data.labelled", "0 images or more", data.labelled
    taught = experiment.objective.terms and not experiment.baseline
    yield data.labelled != 0 or taught, "data.labelled", "1 or more for who learns from labels alone", data.labelled
    yield data.name != "folder" or data.path, "data.path", "the folder that holds train/ and test/", data.path
    yield data.channels in (1, 3), "data.channels", "1 (grey) or 3 (colour)", data.channels
    yield min(data.height, data.width) > 0, "data.height, data.width", "1 pixel or more", (data.height, data.width)
    yield views.shift >= 0, "views.shift", "0 pixels or more", views.shift
    yield from _ensemble_rules(experiment.ensemble)
    yield from _synthesis_rules(experiment.synthesis)
    yield from _compress_rules(experiment)
    teacher = experiment.teacher.network
    inverted = not experiment.synthesis.images or not teacher.endswith(".pt2")
    yield inverted, "teacher.network", "one with gradients, for synthesis; an exported program has none", teacher
    yield from _objective_rules(experiment.objective)
    for role, settings in experiment.roles().items():
        yield from _train_rules(role, settings)
        given = settings.network.endswith(".pt2") and role not in experiment.teachers()
        yield (
            not given,
            f"{role}.network",
            "a network that can be trained; an exported program can only teach",
            settings.network,
        )
    features = [term.objective for term in experiment.objective.terms if term.layers]
    single = not experiment.ensemble.members and not experiment.bank
    yield (
        single or not features,
        "objective.terms",
        "none with layers, which need one live teacher and no bank",
        features,
    )
    if experiment.bank:
        for key in ("mixup", "cutmix", "erasing"):
            value = getattr(experiment.student, key)
            yield value == 0, f"student.{key}", "0 with bank=true, which knows the views and no mixtures of them", value


def _ensemble_rules(ensemble: EnsembleSettings) -> Iterator[Rule]:
    shares, teachers = ensemble.shares, 1 + len(ensemble.members)
    right = len(shares) in (0, teachers) and all(share >= 0 for share in shares) and (not shares or sum(shares) > 0)
    yield right, "ensemble.shares", f"one number for each of the {teachers} teachers, or none", shares


def _compress_rules(experiment: Experiment) -> Iterator[Rule]:
    how = experiment.compress
    prune, sparsify, quantize = how.prune, how.sparsify, how.quantize
    yield 0 < prune.macs <= 1, "compress.prune.macs", "a share above 0, at most 1", prune.macs
    yield prune.rounds >= 1, "compress.prune.rounds", "at least 1", prune.rounds
    yield 0 <= sparsify.zeros < 1, "compress.sparsify.zeros", "a share from 0 up, below 1", sparsify.zeros
    for name, section in (("prune", prune), ("sparsify", sparsify), ("quantize", quantize)):
        least = 0 if name == "quantize" else 1
        yield section.epochs >= least, f"compress.{name}.epochs", f"{least} or more", section.epochs
        yield section.learning_rate > 0, f"compress.{name}.learning_rate", "a number above 0", section.learning_rate
    yield how.calibration >= LEAST, "compress.calibration", f"at least {LEAST} images", how.calibration
    yield 2 <= quantize.bits <= 8, "compress.quantize.bits", "2 to 8", quantize.bits
    made = how.exported()
    yield how.serve in made, "compress.serve", f"one that this experiment makes: {', '.join(made)}", how.serve
    yield len(set(how.formats)) == len(how.formats), "compress.formats", "each once", how.formats


def _synthesis_rules(synthesis: SynthesisSettings) -> Iterator[Rule]:
    rules = [
        ("images", synthesis.images >= 0, "0 or more"),
        ("steps", synthesis.steps >= 1, "at least 1"),
        ("learning_rate", synthesis.learning_rate > 0, "a number above 0"),
        ("statistics", synthesis.statistics >= 0, "a number from 0 up"),
        ("smoothness", synthesis.smoothness >= 0, "a number from 0 up"),
    ]
    for key, holds, expected in rules:
        yield holds, f"synthesis.{key}", expected, getattr(synthesis, key)


def _objective_rules(objective: ObjectiveSettings) -> Iterator[Rule]:
    low, high = extremes(objective.alpha)
    yield low >= 0 and high <= 1, "objective.alpha", "a number from 0 to 1", objective.alpha
    yield extremes(objective.temperature)[0] > 0, "objective.temperature", "a number above 0", objective.temperature
    sure = objective.confidence
    yield 0 <= sure < 1, "objective.confidence", "a number from 0 to below 1", sure
    values: dict[str, Value | None] = {
        "objective.alpha": objective.alpha,
        "objective.temperature": objective.temperature,
    }
    for i, term in enumerate(objective.terms):
        path = f"objective.terms[{i}]"
        if term.weight is not None:
            yield extremes(term.weight)[0] >= 0, f"{path}.weight", "a number from 0 up", term.weight
        if term.temperature is not None:
            yield extremes(term.temperature)[0] > 0, f"{path}.temperature", "a number above 0", term.temperature
        values |= {f"{path}.weight": term.weight, f"{path}.temperature": term.temperature}
    for path, value in values.items():
        if isinstance(value, Schedule):
            ordered = 0 <= value.begin <= 1 and (value.kind == "step" or value.begin < value.finish <= 1)
            yield ordered, path, "begin and finish from 0 to 1, begin first", (value.begin, value.finish)


def _train_rules(role: str, settings: TrainSettings) -> Iterator[Rule]:
    rules = [
        ("epochs", settings.epochs >= 1, "at least 1"),
        ("batch_size", settings.batch_size >= 2, "at least 2 (BatchNorm needs two)"),
        ("accumulate", settings.accumulate >= 1, "at least 1"),
        ("accumulate", settings.batch_size % settings.accumulate == 0, f"a divisor of {role}.batch_size"),
        ("learning_rate", settings.learning_rate > 0, "a number above 0"),
        ("weight_decay", settings.weight_decay >= 0, "a number from 0 up"),
        ("warmup", 0 <= settings.warmup < 1, "a number from 0 to below 1"),
        ("clip", settings.clip >= 0, "a number from 0 up"),
        ("ema", 0 <= settings.ema < 1, "a number from 0 to below 1"),
        ("label_smoothing", 0 <= settings.label_smoothing < 1, "a number from 0 to below 1"),
        ("mixup", settings.mixup >= 0, "a number from 0 up"),
        ("cutmix", settings.cutmix >= 0, "a number from 0 up"),
        ("erasing", 0 <= settings.erasing <= 1, "a number from 0 to 1"),
    ]
    for key, holds, expected in rules:
        yield holds, f"{role}.{key}", expected, getattr(settings, key)
