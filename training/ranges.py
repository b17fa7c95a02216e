"""Which numbers of an objective a search tries, and between which bounds."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from optuna.distributions import FloatDistribution

from handler.errors import SettingsError
from training.config import Experiment, TermSettings
from training.objectives import find


@dataclass(frozen=True)
class Range:
    """Where a number is looked for; `relative`: as multiples of the experiment's own."""

    low: float
    high: float
    log: bool = True
    relative: bool = False

    def around(self, own: float) -> FloatDistribution:
        """The range as a distribution, widened where the experiment's `own` value lies outside."""
        scale = own if self.relative else 1.0
        return FloatDistribution(min(self.low * scale, own), max(self.high * scale, own), log=self.log)


RANGES = {
    "temperature": Range(1.0, 10.0),
    "alpha": Range(0.0, 1.0, log=False),
    "weight": Range(0.1, 10.0, relative=True),
}


def own_values(experiment: Experiment) -> dict[str, float]:
    """The numbers that are searched, by path, as the experiment has them; schedules are left as they are.

    The temperature where a term takes it from the section; every weight that is above 0 (without one of its own, a
    term follows alpha). Raises SettingsError when there is nothing to search.
    """
    objective = experiment.objective
    warm = [t for t in objective.terms if t.temperature is None and "temperature" in find(t.objective).arguments]
    values = {
        **({"objective.temperature": objective.temperature} if warm else {}),
        **({"objective.alpha": objective.alpha} if objective.terms else {}),
        **{f"objective.terms[{i}].weight": term.weight for i, term in enumerate(objective.terms) if term.weight},
    }
    found = {path: float(value) for path, value in values.items() if isinstance(value, float | int)}
    if not found:
        raise SettingsError("objective: expected terms with numbers to search, got none")
    return found


def space(experiment: Experiment) -> dict[str, FloatDistribution]:
    """Where each of these numbers is looked for."""
    return {path: RANGES[path.rpartition(".")[2]].around(value) for path, value in own_values(experiment).items()}


def flags_of(experiment: Experiment, values: Mapping[str, float]) -> list[str]:
    """The flags that give the experiment these values; terms are a list, and come whole."""
    flags = [f"{path}={value!r}" for path, value in values.items() if "[" not in path]
    weights = {path: value for path, value in values.items() if "[" in path}
    if not weights:
        return flags
    terms = []
    for i, term in enumerate(experiment.to_dict()["objective"]["terms"]):
        default = dataclasses.asdict(TermSettings(objective=""))
        kept = {key: value for key, value in term.items() if value != default[key]}
        weight = weights.get(f"objective.terms[{i}].weight")
        terms.append(kept if weight is None else {**kept, "weight": weight})
    return [*flags, f"objective.terms={json.dumps(terms)}"]
