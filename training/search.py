"""A search for the objective's numbers: temperature, alpha and the terms' weights, within a budget of minutes.

    python -m training search training/experiments/quickstart.yaml --minutes 30

Optuna's TPE sampler proposes, a training of the student as a process of its own answers with its validation
accuracy after the last epoch; the test images are never looked at. The first trial is the experiment as it is. The
study is kept in RUNS/NAME-search, so that a second start carries on, and finishes what was interrupted.
"""

import dataclasses
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from handler.bundle import text_digest
from handler.errors import DistilleryError, SettingsError
from training.artifact import save_json, versions
from training.config import Experiment
from training.pipeline import DistillationPipeline
from training.ranges import flags_of, own_values, space
from training.reading import read_experiment
from training.replicas import CORES, STUDENT, Replica, Replicas, earlier_run, link, prepare, validation_accuracy
from training.report import processor
from training.tables import markdown

log = logging.getLogger(__name__)
VERSION = 1


def fits(elapsed: float, budget: float, durations: Sequence[float]) -> bool:
    """Whether one more trial, as long as the median one, ends within `budget` (all in seconds)."""
    return elapsed < budget and elapsed + (median(durations) if durations else 0.0) <= budget


class Search:
    """The trials of one experiment, in `folder`."""

    def __init__(self, file: Path, experiment: Experiment, flags: Sequence[str], runs: Path) -> None:
        self.file, self.experiment, self.flags, self.runs = file, experiment, tuple(flags), runs
        self.folder = runs / f"{experiment.name}-search"
        self.pipeline = DistillationPipeline(dataclasses.replace(experiment, name="prepared"), self.folder)
        self.stages = self.pipeline.stages()
        self.own, self.space = own_values(experiment), space(experiment)
        self.study = self._open()
        self.started: dict[str, float] = {}
        self.durations: list[float] = []
        self.reasons: list[str] = []

    @property
    def finished(self) -> list[FrozenTrial]:
        """The trials that have a value."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _open(self) -> optuna.Study:
        """The study of just these settings, data and ranges; others may lie beside it in the same file."""
        ranges = {path: [d.low, d.high, d.log] for path, d in self.space.items()}
        tree = {**self.experiment.to_dict(), "name": ""}
        name = text_digest([tree, self.pipeline.dataset.digest, ranges])
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(self.folder / "study.journal")))
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        # Another seed after each start, or a second one would propose what the first has tried.
        study.sampler = optuna.samplers.TPESampler(seed=self.experiment.seed + len(study.trials))
        if all(trial.state == TrialState.FAIL for trial in study.trials):
            study.enqueue_trial(self.own)
        return study

    def prepare(self) -> None:
        """Make what all trials share; DistilleryError when that fails."""
        banks = self.folder / "banks"
        if not banks.is_symlink():  # named by what is in them, they are everybody's
            (self.runs / "banks").mkdir(exist_ok=True)
            banks.symlink_to(Path("..") / "banks", target_is_directory=True)
        like = None
        if not self.pipeline.folder.exists():
            like = earlier_run(self.runs / self.experiment.name, self.experiment.to_dict())
        error = prepare(Replica(self.file, self.flags, self.folder, "prepared"), self.stages, like)
        if error:
            raise DistilleryError(f"{self.experiment.name}: {error}")

    def proposals(self, start: float, budget: float) -> Iterator[Replica]:
        """Trials to run while they fit: first those that an earlier start left unfinished, then new ones.

        One is run in any case. Until one has ended well, a failure ends the search: more would fail alike.
        """
        unfinished = self.study.get_trials(states=(TrialState.RUNNING,))
        while not (self.started or self.finished) or fits(time.monotonic() - start, budget, self.durations):
            if self.reasons and not self.finished:
                return
            trial = unfinished.pop(0) if unfinished else self.study.ask(dict(self.space))
            if trial.params.keys() == self.space.keys():
                yield self.replica(trial.number, trial.params)
            else:  # killed while it was being proposed
                self.study.tell(trial.number, state=TrialState.FAIL)

    def replica(self, number: int, values: Mapping[str, float]) -> Replica:
        """The training of a trial, with what was prepared linked into its folder."""
        name, flags = f"trial-{number}", flags_of(self.experiment, values)
        replica = Replica(self.file, (*self.flags, *flags), self.folder, name)
        link(self.stages, self.pipeline.folder, replica.folder)
        self.started[name] = time.monotonic()
        return replica

    def note(self, replica: Replica, error: str | None) -> None:
        """Tell the study how a trial ended."""
        number = int(replica.name.removeprefix("trial-"))
        if error:
            self.study.tell(number, state=TrialState.FAIL)
            self.reasons.append(f"{replica.name}: {error}")
            log.info("%s: %s", replica.name, error)
            return
        self.durations.append(time.monotonic() - self.started[replica.name])
        accuracy = validation_accuracy(replica.folder)
        self.study.tell(number, accuracy)
        log.info("%s: %.2f %%, %s", replica.name, 100 * accuracy, shlex.join(replica.flags[len(self.flags) :]))

    def result(self) -> dict[str, Any]:
        """All trials and the best one; DistilleryError when none has ended well."""
        if not self.finished:
            raise DistilleryError(f"no trial has ended well: {'; '.join(self.reasons)}")
        best = self.study.best_trial
        trials = [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "values": trial.params,
                "validation_accuracy": trial.value,
            }
            for trial in self.study.get_trials(deepcopy=False)
        ]
        return {
            "own": self.own,
            "trials": trials,
            "best": {
                "number": best.number,
                "values": best.params,
                "validation_accuracy": best.value,
                "flags": flags_of(self.experiment, best.params),
            },
        }


def run(file: Path, flags: Sequence[str], runs: Path, minutes: float, jobs: int, output: Path | None) -> dict[str, Any]:
    """Search for about `minutes`, `jobs` trials at a time; returns the result and writes it to `output`.

    The default is RUNS/search-NAME.json. At least one trial is run. Raises SettingsError when there is nothing to
    search, DistilleryError when no trial ends well.
    """
    if minutes <= 0:
        raise SettingsError(f"minutes: expected more than 0, got {minutes}")
    start = time.monotonic()
    experiment = read_experiment(file, flags, os.environ)
    with Replicas(jobs) as replicas:
        search = Search(file, experiment, flags, runs)
        search.prepare()
        for replica, error in replicas.finished(STUDENT, search.proposals(start, 60 * minutes)):
            search.note(replica, error)
    result = {
        "version": VERSION,
        "command": shlex.join(["python", "-m", "training", "search", str(file), "--minutes", f"{minutes:g}", *flags]),
        "machine": {"processor": processor(), "cores": CORES, "jobs": jobs, "versions": versions()},
        "data_digest": search.pipeline.dataset.digest,
        "experiment": experiment.to_dict(),
        **search.result(),
    }
    save_json(result, output or runs / f"search-{experiment.name}.json")
    return result


def table(result: dict[str, Any]) -> str:
    """The trials as a Markdown table, the best first, and the flags that reproduce the best."""
    trials = [trial for trial in result["trials"] if trial["validation_accuracy"] is not None]
    trials.sort(key=lambda trial: -trial["validation_accuracy"])
    paths = list(trials[0]["values"])
    rows = [
        [
            f"{trial['number']}{' (as it is)' if trial['values'] == result['own'] else ''}",
            f"{100 * trial['validation_accuracy']:.2f}",
            *(f"{trial['values'][path]:.4g}" for path in paths),
        ]
        for trial in trials
    ]
    head = ["trial", "validation accuracy, %", *(path.removeprefix("objective.") for path in paths)]
    return "\n".join([markdown([head, *rows]), "", f"the best again: {shlex.join(result['best']['flags'])}"])
