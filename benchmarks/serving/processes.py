"""Servers as processes: begun in a session of their own, ended by pid with all their children, on free ports."""

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from handler.errors import DistilleryError
from serving import driver

READY_S = 90.0
STOP_S = 8.0
LOOK_S = 0.1
Alive = Callable[[], bool]


@contextmanager
def running(command: Sequence[str | Path], *, folder: Path, environ: Mapping[str, str], log: Path) -> Iterator[Alive]:
    """The command as a process; what is yielded tells whether it still runs. What it prints goes to `log`."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=folder, env=dict(environ), stdin=subprocess.DEVNULL,
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        yield lambda: process.poll() is None
    finally:
        _end(process)


def await_ready(port: int, request: bytes, alive: Alive, log: Path) -> None:
    """Return as soon as `request` is answered with 200; DistilleryError when the server ended, or takes too long."""
    end, answer = time.monotonic() + READY_S, ""
    while alive() and time.monotonic() < end:
        try:
            found = driver.drive(port, [request], np.zeros(1), connections=1, wait_s=READY_S)
            if found.status[0] == 200:
                return
            answer = f"it answers {found.status[0]} {found.bodies[0][:150].decode(errors='replace')}"
        except OSError:
            pass
        time.sleep(LOOK_S)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    last = answer or (lines[-1].strip()[:200] if lines else "it said nothing")
    raise DistilleryError(f"not ready within {READY_S:g} s: {last}" if alive() else f"ended while starting: {last}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait, insist; workers that outlive their parent are of its session, and known before it ends."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=1.0)
    for one in left:
        one.kill()
    psutil.wait_procs(left, timeout=STOP_S)
