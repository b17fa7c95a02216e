"""Does TorchServe load this archive, and does it answer what training saw? Asked without starting TorchServe."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from handler.errors import DistilleryError
from serving import archive as archives
from serving.logs import traceback_reason

WAIT_S = 300.0


@dataclass(frozen=True)
class Checked:
    """What the replay of the golden payloads found; the difference is that of probabilities."""

    name: str
    version: str
    digest: str
    payloads: int
    forms: tuple[str, ...]
    max_difference: float
    load_s: float
    replay_s: float


class CheckFailed(DistilleryError):
    """The archive cannot be served; `output` is all that the worker printed, its traceback included."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


def check(path: Path) -> Checked:
    """Load the archive as a worker does, in a process of its own, and replay its golden payloads.

    Raises BundleError for a touched archive, before any of its code runs, and CheckFailed for one that fails.
    """
    with archives.unpacked(path) as root, tempfile.TemporaryDirectory(prefix="distillery-check-") as folder:
        archive, result = archives.describe(root, path), Path(folder) / "result.json"
        try:
            done = subprocess.run(
                [sys.executable, "-P", replay_path(), root, result],
                cwd=root, env=clean(os.environ, root), stdin=subprocess.DEVNULL, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=WAIT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DistilleryError(f"{path}: neither loaded nor failed within {WAIT_S:g} s") from None
        if done.returncode != 0:
            lines = done.stdout.strip().splitlines() or [f"the worker ended with status {done.returncode}"]
            raise CheckFailed(f"{path}: {traceback_reason(lines) or lines[-1]}", done.stdout)
        figures = json.loads(result.read_text())
    return Checked(archive.name, archive.version, archive.digest, **{**figures, "forms": tuple(figures["forms"])})


def replay_path() -> Path:
    """The script that runs in the other process; it is found, not imported, for it needs the archive's folder first."""
    return Path(__file__).with_name("replay.py")


def clean(environ: Mapping[str, str], root: Path) -> dict[str, str]:
    """A worker's environment: on Python's path the archive, as TorchServe puts it, and nothing else."""
    return {**environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
