"""The management API, typed: what a model runs with, its workers, their number. Tokens and timeouts always."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests

from handler.errors import DistilleryError

WAIT_S = 5.0  # for an answer of the management API, which does no work but scaling


@dataclass(frozen=True)
class Worker:
    """One worker process; `memory_bytes` is TorchServe's own figure, 0 until it has measured.

    `gpu` is the number of the GPU that it was given, None without one, and ? where nvidia-smi does not tell.
    """

    id: str
    pid: int
    status: str
    memory_bytes: int
    gpu: str | None = None


@dataclass(frozen=True)
class Model:
    """What TorchServe really runs, which need not be what the archive asked for."""

    name: str
    version: str
    archive: str
    settings: Mapping[str, Any]
    workers: tuple[Worker, ...]
    pending: int

    @property
    def ready(self) -> int:
        """How many workers take requests."""
        return sum(worker.status == "READY" for worker in self.workers)


class Management:
    """A client of the management port at `url`."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no part in a loopback call
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def models(self) -> tuple[str, ...]:
        """The names of the models that are registered."""
        return tuple(model["modelName"] for model in self._call("GET", "models", {})["models"])

    def describe(self, name: str) -> Model:
        """The default version of a model; DistilleryError when there is none or the server is not there."""
        return _model(self._call("GET", f"models/{name}", {})[0])

    def scale(self, name: str, workers: int, wait_s: float) -> None:
        """Ask for exactly so many workers, and wait until TorchServe has them or gives up."""
        # Query parameters, for a JSON body would set batch delays of its own.
        query = {"min_worker": workers, "max_worker": workers, "synchronous": "true", "timeout": int(wait_s)}
        self._call("PUT", f"models/{name}", query, wait_s + WAIT_S)

    def _call(self, verb: str, path: str, query: Mapping[str, Any], wait_s: float = WAIT_S) -> Any:
        try:
            answer = self._session.request(verb, f"{self.url}/{path}", params=query, timeout=wait_s)
        except requests.Timeout:
            raise DistilleryError(f"{self.url}: no answer of the management API within {wait_s:g} s") from None
        except requests.RequestException:
            raise DistilleryError(f"{self.url}: no TorchServe is listening there") from None
        try:
            body = answer.json()
        except ValueError:
            raise DistilleryError(f"{self.url}: not TorchServe's management API: it answers no JSON") from None
        if not answer.ok:
            raise DistilleryError(f"{self.url}/{path}: {answer.status_code}: {body.get('message', body)}")
        return body


def _model(found: Mapping[str, Any]) -> Model:
    keys = {"minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout"}
    keys |= {"deviceType", "deviceIds"}
    workers = tuple(
        Worker(worker["id"], worker["pid"], worker["status"], worker["memoryUsage"], _gpu(worker))
        for worker in found["workers"]
    )
    return Model(
        name=found["modelName"],
        version=found["modelVersion"],
        archive=found["modelUrl"],
        settings={key: found[key] for key in keys if key in found},
        workers=workers,
        pending=found.get("jobQueueStatus", {}).get("pendingRequests", 0),
    )


def _gpu(worker: Mapping[str, Any]) -> str | None:
    usage = re.match(r"gpuId::(\d+)", worker.get("gpuUsage", ""))
    return (usage[1] if usage else "?") if worker["gpu"] else None
