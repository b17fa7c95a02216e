"""The command line: exit status, one-line errors, interruption and resumption of the real process."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from handler.bundle import file_digest
from training.__main__ import main

SMALL = ["data.train_limit=1280", "data.test_limit=200", "student.network=seed_student", "teacher.network=seed_student"]


def command(tmp_path: Path, *more: str, stage: str = "run") -> list[str]:
    experiment = "training/experiments/quickstart.yaml"
    module = [sys.executable, "-m", "training", stage, experiment, "name=x", "--runs", str(tmp_path)]
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


def test_a_wrong_stage_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distil", "training/experiments/fast.yaml", "--runs", str(tmp_path)]) == 2
    assert "error: distil: not a stage of this experiment: it has teacher, student, baseline" in capsys.readouterr().err


def is_newer(path: Path, age: int) -> bool:
    return path.exists() and path.stat().st_mtime_ns > age


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds()


@pytest.mark.e2e
def test_stopped_and_killed_at_five_moments_and_resumed_the_student_is_the_same_file(tmp_path: Path) -> None:
    """The real process gets SIGINT, then SIGKILL five times while it trains; the student's SHA-256 is that of a run
    left alone. Each killed process has come further than the one before, so that the run ends.
    """
    more = ("teacher.epochs=1", "student.epochs=30", "bank=true", "--resume")
    for stage in ("prepare", "student"):
        alone = command(tmp_path / "whole", *more, stage=stage)
        whole = subprocess.run(alone, capture_output=True, text=True, check=False)
        assert whole.returncode == 0, whole.stderr
    folder, chance = tmp_path / "parts" / "x", random.Random(0)
    checkpoint = folder / "student.checkpoint.pt"
    for number, status in [(signal.SIGINT, 130)] + [(signal.SIGKILL, -signal.SIGKILL)] * 5:
        age = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(command(tmp_path / "parts", *more), stderr=subprocess.PIPE, text=True)
        wait_until(functools.partial(is_newer, checkpoint, age))
        time.sleep(chance.uniform(0, 0.4))
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
    assert len({file_digest(tmp_path / name / "x" / "student.pt") for name in ("whole", "parts")}) == 1


PLAIN = """
from torch import nn

def build(channels, size, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], 32), nn.ReLU(), nn.Linear(32, classes))
"""


@pytest.mark.e2e
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """The same global batch, a network without batch statistics; an epoch of one step shows each step's loss."""
    (tmp_path / "plain.py").write_text(PLAIN)
    more = [
        *("student", "training/experiments/quickstart.yaml", "name=x", "data.train_limit=128"),
        *(f"student.network={tmp_path}/plain.py:build", "student.epochs=50", "student.accumulate=2"),
        *("bank=false", "student.mixup=0.2", "views.shift=1", "teacher.network=seed_teacher", "teacher.epochs=1"),
    ]
    alone = [sys.executable]
    torchrun = [*alone, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    losses = {}
    prepare = [*alone, "-m", "training", "prepare", *more[1:], "--runs", str(tmp_path / "one")]
    subprocess.run(prepare, capture_output=True, check=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for count, start in (("one", alone), ("two", torchrun)):
        arguments = [*more, "--runs", str(tmp_path / count)]
        process = subprocess.Popen([*start, "-m", "training", *arguments], stderr=subprocess.PIPE, text=True)
        try:
            _, error = process.communicate(timeout=240)
        finally:
            process.terminate()  # torchrun ends its children
        assert process.returncode == 0, error
        history = (tmp_path / count / "x" / "student.history.jsonl").read_text().splitlines()
        losses[count] = torch.tensor([json.loads(line)["loss"] for line in history])
    assert len(losses["one"]) == 50
    assert losses["one"][-1] < losses["one"][0]
    torch.testing.assert_close(losses["two"], losses["one"], rtol=0, atol=1e-4)


def test_the_seeds_variables_reach_the_command(tmp_path: Path) -> None:
    environ = {**os.environ, "DIST_TEMP": "hot"}
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: objective.temperature: expected a number, got 'hot'\n"
