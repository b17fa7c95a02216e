"""The whole path as a newcomer walks it: ./scripts/quickstart --fast in a fresh copy of the tree, on free ports."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import free_ports

pytestmark = pytest.mark.e2e


class Newcomer:
    """A fresh copy of what git would give a newcomer, with this suite's environment as its .venv."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_ports()
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
            if Path(name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(name, folder / name)
        (folder / ".venv").symlink_to(sys.prefix)
        wanted = subprocess.run(["cksum", "requirements.txt"], capture_output=True, text=True, check=True).stdout
        if not (folder / ".venv" / "installed").exists():
            (folder / ".venv" / "installed").write_text(wanted)
        if Path("data").is_dir():
            (folder / "data").symlink_to(Path("data").resolve())

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            command, cwd=self.folder, env=environ, capture_output=True, text=True, check=False, timeout=560
        )

    def serving(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(".venv/bin/python", "-m", "serving", *arguments, "--port", str(self.port))


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    folder = Path("/tmp") / f"q{os.getpid()}"  # short: a worker's socket lies in it
    folder.mkdir()
    one = Newcomer(folder)
    yield one
    one.serving("stop")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def first(newcomer: Newcomer) -> subprocess.CompletedProcess[str]:
    done = newcomer.run("./scripts/quickstart", "--fast", "--port", str(newcomer.port))
    assert done.returncode == 0, done.stderr
    return done


def test_it_ends_with_a_report_and_predictions(newcomer: Newcomer, first: subprocess.CompletedProcess[str]) -> None:
    assert "| accuracy" in first.stdout
    assert "teacher" in first.stdout and "student" in first.stdout
    assert f"http://127.0.0.1:{newcomer.port}" in first.stdout
    assert "test image 0" in first.stdout
    assert "Traceback" not in first.stderr


def test_it_leaves_the_server_answering(newcomer: Newcomer, first: subprocess.CompletedProcess[str]) -> None:
    status = newcomer.serving("status", "--json")
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["ready"]


def test_over_http_it_is_as_right_as_the_report_says(
    newcomer: Newcomer, first: subprocess.CompletedProcess[str]
) -> None:
    script = [".venv/bin/python", "benchmarks/accuracy_over_http.py", "--run", "runs/fast", "--flight", "32"]
    done = newcomer.run(*script, "--port", str(newcomer.port))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["images"] == 1000


def test_a_second_run_reuses_everything(newcomer: Newcomer, first: subprocess.CompletedProcess[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in (newcomer.folder / "runs").rglob("*.pt")}
    archive = (newcomer.folder / "model_store" / "student.mar").read_bytes()
    began = time.time_ns()
    again = newcomer.run("./scripts/quickstart", "--fast", "--port", str(newcomer.port))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == 6
    assert files == {path: path.stat().st_mtime_ns for path in (newcomer.folder / "runs").rglob("*.pt")}
    assert all(stamp < began for stamp in files.values())
    assert archive == (newcomer.folder / "model_store" / "student.mar").read_bytes()
    assert "already running" in again.stdout
