"""Stages: functions of files. One whose settings, inputs and outputs are unchanged is not run again.

Its key is the digest of its settings, the data and its input files. What was done is kept in `stages.json`, and
each stage that ran adds a line to `history.jsonl`.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.bundle import file_digest, text_digest
from handler.errors import DistilleryError
from training.artifact import save_json
from training.processes import Processes, turn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step: the settings and files it is a function of, the files it writes, and how (given its key).

    `shared`: all processes take part in it; else the first one does it alone.
    """

    name: str
    settings: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[str], None]
    shared: bool = False


class Runner:
    """Runs stages in `folder`, over data of `digest`."""

    def __init__(self, folder: Path, digest: str, processes: Processes) -> None:
        self.folder, self.digest, self.processes = folder, digest, processes

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run's lock: a killed script may have left its pipeline at work, and two would undo each other."""
        with turn(self.folder / "lock") if self.processes.first else contextlib.nullcontext():
            yield

    def run(self, stage: Stage) -> None:
        """Run the stage unless it is done; DistilleryError when an input is missing."""
        self.processes.wait()
        for name in stage.inputs:
            if not (self.folder / name).is_file():
                raise DistilleryError(f"{stage.name}: {self.folder / name} is missing; run the stages before it first")
        inputs = {name: file_digest(self.folder / name) for name in stage.inputs}
        made = {name: digest for line in self._record().values() for name, digest in line["outputs"].items()}
        for name, digest in inputs.items():
            if made.get(name, digest) != digest:
                what = "not what this run made"
                raise DistilleryError(f"{stage.name}: {self.folder / name}: {what}; run the stages before it again")
        key = text_digest([stage.name, stage.settings, self.digest, inputs])
        done = self._is_done(stage, key)
        self.processes.wait()
        if done:
            log.info("%-8s done before", stage.name)
            return
        start = time.perf_counter()
        if stage.shared or self.processes.first:
            stage.run(key)
        self.processes.wait()
        if self.processes.first:
            self._note(stage, key, round(time.perf_counter() - start, 1))

    def _note(self, stage: Stage, key: str, seconds: float) -> None:
        line = {"key": key, "outputs": {name: file_digest(self.folder / name) for name in stage.outputs}}
        save_json({**self._record(), stage.name: line}, self.folder / "stages.json")
        with (self.folder / "history.jsonl").open("a") as stream:
            stream.write(json.dumps({"stage": stage.name, "seconds": seconds, "time": time.time(), **line}) + "\n")
        (self.folder / f"{stage.name}.checkpoint.pt").unlink(missing_ok=True)
        log.info("%-8s done in %s s", stage.name, seconds)

    def _is_done(self, stage: Stage, key: str) -> bool:
        line = self._record().get(stage.name, {})
        paths = {name: self.folder / name for name in stage.outputs}
        present = {name: file_digest(path) for name, path in paths.items() if path.is_file()}
        return bool(line.get("key") == key and line.get("outputs") == present)

    def _record(self) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads((self.folder / "stages.json").read_text())
        except (OSError, ValueError):
            return {}
        return record
