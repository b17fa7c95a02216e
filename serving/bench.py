"""How fast an archive answers on this machine: a TorchServe of its own, and clients who ask without a pause.

Client and server share the cores. The client is one thread of Python: where it takes a whole core (`client_cpu` near
1), it is what was measured.
"""

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from handler.errors import DistilleryError
from serving import archive as archives
from serving import driver, server
from serving.archive import Archive
from serving.driver import Drive
from serving.instance import beside, free_port, java

RATE = 50_000  # requests a second, more than any TorchServe answers
OK = 200


@dataclass(frozen=True)
class Load:
    """So many `clients`, each of whom asks again as soon as it has its answer, for so many `seconds`."""

    clients: int
    seconds: int


@dataclass(frozen=True)
class Figures:
    """One measurement; `client_cpu` is what the clients took of a core."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    client_cpu: float


class Unique:
    """Requests that are all different: an archive's test images as raw pixels, a number in the last four bytes.

    So no cache knows the answer. `Cache-Control` would achieve that, too, but spare the worker what unique traffic
    costs it: a look-up in vain, and an answer to keep.
    """

    def __init__(self, archive: Archive) -> None:
        with archives.unpacked(archive.path) as root:
            images = archives.golden(root).images
        path, content_type = f"/predictions/{archive.name}", "application/octet-stream"
        self._requests = [driver.request(path, content_type, image.tobytes())[:-4] for image in images]
        self._first = random.getrandbits(32)

    def __getitem__(self, place: int, /) -> bytes:
        number = (self._first + place) & 0xFFFFFFFF
        return self._requests[place % len(self._requests)] + number.to_bytes(4, "little")


def visit(archive: Archive, load: Load, config: Path) -> Figures:
    """Start the archive, warm it up for as long as it is measured, measure, and leave nothing behind.

    DistilleryError when it cannot be started, or any answer is not a 200.
    """
    with running(archive, config) as port:
        for _ in ("warm up", "measure"):
            found = _ask(port, Unique(archive), load)
        return figures(found, load)


@contextmanager
def running(archive: Archive, config: Path) -> Iterator[int]:
    """The archive behind a TorchServe of its own, on free ports, without tokens; its first port."""
    with tempfile.TemporaryDirectory(prefix="bench", ignore_cleanup_errors=True) as folder:
        instance = beside(config, free_port(), Path(folder).resolve())
        try:
            server.start(instance, archive.path, config=config, tokens=False)
            yield instance.ports()[0]
        finally:
            process = java(instance.pid_folder)  # also one that was interrupted before it listened
            if process:
                server.end(process)


def figures(found: Drive, load: Load) -> Figures:
    """What a closed loop came to; the last request of each client, cut off by the end, does not count."""
    answered = found.status != driver.LOST
    refused = np.flatnonzero(answered & (found.status != OK))
    if len(refused):
        status, body = found.status[refused[0]], found.bodies[refused[0]][:150].decode(errors="replace")
        raise DistilleryError(f"{len(refused)} of {answered.sum()} answers were no 200, the first: {status} {body}")
    lost = int((~np.isnan(found.sent)).sum() - answered.sum())
    if lost > load.clients or not answered.any():
        raise DistilleryError(f"{lost} of {lost + answered.sum()} requests got no answer within {load.seconds} s")
    p50, p99 = 1000 * np.percentile((found.done - found.sent)[answered], (50, 99))
    return Figures(float(answered.sum() / found.ended), float(p50), float(p99), found.cpu_s / found.ended)


def _ask(port: int, requests: Unique, load: Load) -> Drive:
    at_once = np.zeros(RATE * load.seconds)
    try:
        return driver.drive(port, requests, at_once, connections=load.clients, wait_s=load.seconds)
    except OSError as error:
        raise DistilleryError(f"the server broke off under load: {error.strerror or error}") from error
