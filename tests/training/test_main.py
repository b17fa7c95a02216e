"""The command line: exit status, one-line errors, interruption and resumption of the real process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.__main__ import main

SMALL = ["data.train_limit=1280", "data.test_limit=200", "student.network=seed_student", "teacher.network=seed_student"]


def command(tmp_path: Path, *more: str) -> list[str]:
    experiment = "training/experiments/quickstart.yaml"
    module = [sys.executable, "-m", "training", "run", experiment, "name=x", "--runs", str(tmp_path)]
    return [*module, *SMALL, *more]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "python -m training run training/experiments/quickstart.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "missing.yaml"], 2, "error: missing.yaml: cannot be read: No such file or directory\n"),
        (["run", "training/experiments/fast.yaml", "student.epoch=1"], 2, "did you mean 'student.epochs'?\n"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert error.endswith(message)
    assert error.count("\n") == 1


def test_a_wrong_stage_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["distil", "x.yaml"])
    assert exit_.value.code == 2


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


@pytest.mark.e2e
def test_stopped_and_killed_and_resumed_the_student_is_the_same(tmp_path: Path) -> None:
    """The real process gets SIGINT, then SIGKILL, while it trains: its files end as those of a run left alone."""
    more = ("teacher.epochs=1", "student.epochs=25", "--resume")
    whole = subprocess.run(command(tmp_path / "whole", *more), capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "parts" / "x"
    checkpoint = folder / "student.checkpoint.pt"
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command(tmp_path / "parts", *more), stderr=subprocess.PIPE, text=True)
        wait_for(checkpoint)
        age = checkpoint.stat().st_mtime_ns
        while number == signal.SIGKILL and checkpoint.stat().st_mtime_ns == age and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == status, error
        assert "Traceback" not in error
        assert not (folder / "student.pt").exists(), "it had finished before it was stopped"
    again = subprocess.run(command(tmp_path / "parts", *more, "--json"), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "teacher  done before" in again.stderr
    assert "student: resuming at epoch" in again.stderr
    assert json.loads(again.stdout)["models"]["student"]["parameters"] > 0
    states = [torch.load(tmp_path / name / "x" / "student.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_seeds_variables_reach_the_command(tmp_path: Path) -> None:
    environ = {**os.environ, "DIST_TEMP": "hot"}
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: objective.temperature: expected a number, got 'hot'\n"
