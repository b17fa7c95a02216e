"""Who is compared: how each is started, and what it is sent."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.serving import environments
from benchmarks.serving.environments import PEERS
from benchmarks.serving.processes import Alive, running
from benchmarks.serving.stage import Stage
from benchmarks.serving.torchserve import distillery, empty, stock

PLAIN = {"raw": "raw", "png": "png"}
BASE64 = {"raw": "raw-base64", "png": "png-base64"}
TORCHSERVE = "/predictions/student"
Start = Callable[[Stage], AbstractContextManager[Alive]]


@dataclass(frozen=True)
class Contestant:
    """One row of the tables.

    `wires`: the form of payloads.WIRES that an image goes in; a form that is not there is not taken. `ceiling`: it
    answers without looking at the image, so nothing is judged.
    """

    title: str
    path: str
    start: Start
    wires: Mapping[str, str] = field(default_factory=lambda: PLAIN)
    environment: str = ""
    ceiling: bool = False


@contextmanager
def _started(stage: Stage, *, name: str, command: str, batch: int) -> Iterator[Alive]:
    """A server of peers/NAME in its own environment."""
    python = environments.python(name, stage.environments)
    words = command.format(port=stage.port, workers=stage.workers).split()
    own = {"BATCH": str(batch), "BENTOML_HOME": str(stage.folder), "BENTOML_DO_NOT_TRACK": "True"}
    with running([python, *words], folder=PEERS / name, environ=stage.environ(**own), log=stage.log) as alive:
        yield alive


@contextmanager
def nothing(stage: Stage, options: tuple[int, ...] = ()) -> Iterator[Alive]:
    """The empty HTTP server."""
    command = [sys.executable, str(Path(__file__).parent / "empty.py"), str(stage.port), *map(str, options)]
    with running(command, folder=stage.folder, environ=stage.environ(), log=stage.log) as alive:
        yield alive


def _peer(
    title: str, name: str, path: str, command: str, *, batch: int = 1, wires: Mapping[str, str] = PLAIN
) -> Contestant:
    return Contestant(title, path, partial(_started, name=name, command=command, batch=batch), wires, name)


def _ours(title: str, **how: Any) -> Contestant:
    return Contestant(title, TORCHSERVE, partial(distillery, **how))


def _ceiling(title: str, **how: Any) -> Contestant:
    return Contestant(title, TORCHSERVE, partial(empty, **how), ceiling=True)


UVICORN = "-m uvicorn server:app --host 127.0.0.1 --port {port} --workers {workers} --no-access-log --log-level warning"
MOSEC = "--address 127.0.0.1 --port {port} --log-level warning"
BENTOML = "-m bentoml serve server:Classifier --host 127.0.0.1 --port {port}"

CONTESTANTS = {
    "distillery-throughput": _ours("Distillery, a worker a core", profile="throughput", each_core=True),
    "distillery-one-worker": _ours("Distillery, as it is packed", profile="throughput"),
    "distillery-latency": _ours("Distillery, batches of 1", profile="latency"),
    "distillery-uncached": _ours("Distillery, without its cache", profile="throughput", each_core=True, cache=False),
    "mosec": _peer("mosec, batches to 128", "mosec", "/inference", f"server.py {MOSEC}", batch=128),
    "mosec-latency": _peer("mosec, batches of 1", "mosec", "/inference", f"server.py {MOSEC}"),
    "fastapi": _peer("FastAPI + uvicorn", "fastapi", "/predict", UVICORN),
    "litserve": _peer("LitServe, batches to 32", "litserve", "/predict", "server.py", batch=32, wires=BASE64),
    "litserve-latency": _peer("LitServe, batches of 1", "litserve", "/predict", "server.py", wires=BASE64),
    "bentoml": _peer("BentoML", "bentoml", "/predict", BENTOML),
    "torchserve-stock": Contestant("TorchServe, stock", TORCHSERVE, stock),
    "flask": _peer("Flask, our first service", "flask", "/predict", "server.py", wires={"raw": "features"}),
    "mosec-core": _peer("our core under mosec", "mosec", "/inference", f"adapter.py {MOSEC}"),
    "litserve-core": _peer("our core under LitServe", "litserve", "/predict", "adapter.py", wires=BASE64),
    "torchserve-empty": _ceiling("TorchServe, empty handler", profile="throughput", reading="upstream", each_core=True),
    "torchserve-empty-buffered": _ceiling(
        "TorchServe, empty handler, read in blocks", profile="throughput", reading="buffered", each_core=True
    ),
    "torchserve-empty-latency": _ceiling(
        "TorchServe, empty handler, batches of 1", profile="latency", reading="upstream"
    ),
    "nothing": Contestant("an HTTP server that does nothing", "/", nothing, ceiling=True),
}
