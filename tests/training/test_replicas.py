"""Replicas as real processes: how they end, how they are ended, and what their folders share."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from handler.errors import SettingsError
from training.config import Experiment
from training.replicas import CORES, Replica, Replicas, cost, earlier_run, link, teacher_digest, validation_accuracy
from training.stages import Stage


@dataclass(frozen=True)
class Script(Replica):
    """A replica that runs a few lines of Python in place of a training."""

    code: str = ""

    def command(self, stage: str) -> list[str]:
        return [sys.executable, "-c", self.code]


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Script]:
    def make(name: str, code: str) -> Script:
        return Script(Path("x.yaml"), (), tmp_path, name, code)

    return make


def test_the_command_is_that_of_one_training() -> None:
    replica = Replica(Path("x.yaml"), ("student.seed=3",), Path("runs"), "x-seed3")
    expected = ["-m", "training", "student", "x.yaml", "student.seed=3", "name=x-seed3", "--runs", "runs", "--resume"]
    assert replica.command("student") == [sys.executable, *expected]
    assert replica.folder == Path("runs/x-seed3")


def test_a_failure_is_told_in_its_last_line_and_the_others_go_on(script: Callable[..., Script]) -> None:
    scripts = [
        script("good", "print('fine')"),
        script("bad", "import sys; print('one'); sys.stderr.write('error: the loss is not finite\\n\\n'); sys.exit(1)"),
        script("mute", "import sys; sys.exit(3)"),
        script("killed", "import os; print('last'); os.kill(os.getpid(), 9)"),
        script("late", ""),
    ]
    with Replicas(2) as replicas:
        found = {replica.name: error for replica, error in replicas.finished("student", scripts)}
    expected = {"bad": "the loss is not finite", "mute": "exit status 3", "killed": "ended by SIGKILL"}
    assert found == {"good": None, "late": None, **expected}


def test_the_cores_are_shared(script: Callable[..., Script]) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    for jobs, threads in ((1, CORES), (CORES, 1), (CORES + 1, 1)):
        with Replicas(jobs) as replicas:
            ((replica, error),) = replicas.finished("student", [script("x", code)])
        assert error is None
        assert int((replica.folder / "student.log").read_text()) == threads


def test_ctrl_c_reaches_it_through_us_alone(script: Callable[..., Script]) -> None:
    """A signal from the terminal goes to its whole session: twice would mean to end without saving."""
    with Replicas(1) as replicas:
        ((replica, _),) = replicas.finished("student", [script("x", "import os; print(os.getsid(0))")])
    assert int((replica.folder / "student.log").read_text()) != os.getsid(0)


def test_less_than_one_job_is_refused() -> None:
    with pytest.raises(SettingsError, match="jobs: expected at least 1, got 0"):
        Replicas(0)


def test_the_next_is_asked_for_when_there_is_room(script: Callable[..., Script]) -> None:
    asked: list[int] = []
    ended: list[str] = []

    def source() -> Iterator[Script]:
        for i in range(5):
            asked.append(len(ended))
            yield script(str(i), "")

    with Replicas(2) as replicas:
        for replica, _ in replicas.finished("student", source()):
            ended.append(replica.name)
    assert asked == sorted(asked)
    assert all(i - before < 2 for i, before in enumerate(asked)), "more than two at a time"
    assert sorted(ended) == list("01234")


SAVING = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path({folder!r}, "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
pathlib.Path({folder!r}, "ready").touch()
time.sleep(100)
"""
WAITING = "import pathlib, time\nwhile not pathlib.Path({folder!r}, 'ready').exists(): time.sleep(0.01)"


def test_leaving_ends_those_at_work_after_they_saved(script: Callable[..., Script], tmp_path: Path) -> None:
    folder = str(tmp_path)
    scripts = [
        script("long", SAVING.format(folder=folder)),
        script("short", WAITING.format(folder=folder)),
        script("never", ""),
    ]
    with pytest.raises(KeyboardInterrupt), Replicas(2) as replicas:
        for replica, _ in replicas.finished("student", scripts):
            assert replica.name == "short"
            raise KeyboardInterrupt
    assert (tmp_path / "saved").exists()
    assert not replicas.alive
    assert not (tmp_path / "never").exists()


def test_being_terminated_is_being_interrupted() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), Replicas(1):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def stage(name: str, *outputs: str) -> Stage:
    return Stage(name, None, (), outputs, lambda key: None)


STAGES = [stage("teacher", "teacher.pt"), stage("assistant1", "assistant1.pt"), stage("student", "student.pt")]


def done(folder: Path, *names: str) -> Path:
    """A folder in which these stages are done."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.pt").write_text(f"{folder.name}'s {name}")
    record = {name: {"key": f"{folder.name}/{name}", "outputs": {f"{name}.pt": "digest"}} for name in names}
    (folder / "stages.json").write_text(json.dumps(record))
    return folder


def test_what_is_before_the_student_is_linked(tmp_path: Path) -> None:
    source, target = done(tmp_path / "a", "teacher", "student"), done(tmp_path / "b", "teacher", "assistant1")
    link(STAGES, source, target)
    assert (target / "teacher.pt").samefile(source / "teacher.pt")
    assert (target / "assistant1.pt").read_text() == "b's assistant1", "the source has none"
    assert not (target / "student.pt").exists()
    record = json.loads((target / "stages.json").read_text())
    assert {name: line["key"] for name, line in record.items()} == {
        "teacher": "a/teacher",
        "assistant1": "b/assistant1",
    }
    link(STAGES, source, target)  # linked again, all is as it was
    assert sorted(path.name for path in target.iterdir()) == ["assistant1.pt", "stages.json", "teacher.pt"]


def test_a_file_that_is_gone_is_not_linked(tmp_path: Path) -> None:
    source = done(tmp_path / "a", "teacher", "assistant1")
    (source / "teacher.pt").unlink()
    link(STAGES, source, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "stages.json").read_text()).keys() == {"assistant1"}


def test_nothing_done_is_nothing_linked(tmp_path: Path) -> None:
    link(STAGES, tmp_path / "nowhere", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_without_hard_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    source = done(tmp_path / "a", "teacher")
    link(STAGES, source, tmp_path / "b")
    assert (tmp_path / "b" / "teacher.pt").read_text() == "a's teacher"
    assert not (tmp_path / "b" / "teacher.pt").samefile(source / "teacher.pt")


def test_what_decides_the_teacher(experiment: Experiment) -> None:
    digest = teacher_digest(experiment.to_dict())
    student = replace(experiment.student, epochs=9, seed=4)
    same = replace(experiment, student=student, name="y", bank=True, data=replace(experiment.data, labelled=8))
    assert teacher_digest(same.to_dict()) == digest
    others = [
        replace(experiment, seed=1),
        replace(experiment, views=replace(experiment.views, shift=2)),
        replace(experiment, teacher=replace(experiment.teacher, epochs=9)),
        replace(experiment, data=replace(experiment.data, validation=9)),
        replace(experiment, ensemble=replace(experiment.ensemble, members=(experiment.teacher,))),
    ]
    assert len({teacher_digest(other.to_dict()) for other in [experiment, *others]}) == 6


def test_an_earlier_run_serves_if_its_teacher_is_the_same(tmp_path: Path, experiment: Experiment) -> None:
    assert earlier_run(tmp_path, experiment.to_dict()) is None
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment.to_dict()))
    assert earlier_run(tmp_path, experiment.to_dict()) == tmp_path
    assert earlier_run(tmp_path, replace(experiment, seed=1).to_dict()) is None
    for broken in ("[1, 2", "- a", "data: 3", "data: {}"):
        file.write_text(broken)
        assert earlier_run(tmp_path, experiment.to_dict()) is None


def test_what_a_training_took_and_reached(tmp_path: Path) -> None:
    lines = [{"validation_accuracy": 0.5, "images_per_s": 100.0}, {"validation_accuracy": 0.75, "images_per_s": 50.0}]
    (tmp_path / "student.history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages = [
        {"stage": "teacher", "seconds": 9},
        {"stage": "student", "seconds": 4},
        {"stage": "student", "seconds": 5},
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stages))
    assert validation_accuracy(tmp_path) == 0.75
    assert cost(tmp_path, images=200) == {"seconds": 2 + 4, "wall_seconds": 5, "images_per_s": 75}
