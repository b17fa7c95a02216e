"""Closed loop: so many clients, each asking again as soon as it has its answer. wrk, on one thread.

wrk cannot tell which connection an answer came on, so its script cannot tell which image it belongs to, and looking at
every answer would take from the servers' time. It counts statuses; one more client, who asks ten times a second, has
its answers judged.
"""

import json
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.errors import DistilleryError
from serving import driver
from serving.driver import Drive

SCRIPT = Path(__file__).parent / "drive.lua"
PROBE_S = 0.1
WAIT_S = 10.0  # for an answer
SLACK_S = 30.0  # for wrk to read its bodies, and to end


def probe_times(seconds: int) -> NDArray[np.float64]:
    """When the client beside wrk asks."""
    return np.arange(PROBE_S, seconds, PROBE_S)


def measure(
    url: str,
    port: int,
    clients: int,
    seconds: int,
    arguments: Sequence[object],
    probes: Sequence[bytes],
    script: Path = SCRIPT,
) -> tuple[dict[str, Any], Drive]:
    """wrk's figures, and what became of the probes; `arguments` are those of the script."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", f"--timeout={WAIT_S:g}s", "-s", script, url, "--"]
    before = _cpu_s()
    words = [str(word) for word in (*command, *arguments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as wrk:
        try:
            judged = driver.drive(port, probes, probe_times(seconds), connections=1, wait_s=WAIT_S)
            out, error = wrk.communicate(timeout=seconds + SLACK_S)
        except subprocess.TimeoutExpired:
            raise DistilleryError(f"wrk did not end within {seconds + SLACK_S:g} s") from None
        finally:
            wrk.kill()
    if wrk.returncode:
        raise DistilleryError(f"wrk failed: {' '.join((error or out).split())[:200]}")
    figures: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    answered = figures["requests"] - figures["refused"]
    own = {"requests_per_s": answered / figures["seconds"], "client_cpu": (_cpu_s() - before) / seconds}
    return {**figures, **own}, judged


def _cpu_s() -> float:
    """What the children that have ended took of the processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
