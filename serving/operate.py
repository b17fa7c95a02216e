"""Day two: what runs, is it what was asked for, how many workers; drain before anything ends."""

import contextlib
import logging
import time
from dataclasses import dataclass, replace

import psutil

from handler.errors import DistilleryError
from serving import archive as archives
from serving.archive import Archive, ServeSettings
from serving.instance import Instance, Record
from serving.management import Model, Worker

log = logging.getLogger(__name__)
LOOK_S = 0.25
IDLE_LOOKS = 4  # looks at workers that used no processor time since the one before
COUNTS = ("minWorkers", "maxWorkers")


@dataclass(frozen=True)
class Status:
    """The truth about one server; `ready` means every worker READY with the settings the archive asked for."""

    address: str
    running: bool
    ready: bool
    pid: int | None = None
    name: str | None = None
    version: str | None = None
    digest: str | None = None
    batch_size: int | None = None
    pending: int = 0
    workers: tuple[Worker, ...] = ()
    problems: tuple[str, ...] = ()


def status(instance: Instance, name: str) -> Status:
    """Ask process, management port and archive; never raises for a server that is down."""
    process, record = instance.process(), instance.record()
    pid = process.pid if process else None
    try:
        model = instance.management().describe(name)
    except DistilleryError as error:
        return Status(instance.inference, process is not None, False, pid, name, problems=(str(error),))
    problems = _problems(instance, model, record)
    return Status(
        address=instance.inference,
        running=True,
        ready=not problems,
        pid=pid,
        name=model.name,
        version=model.version,
        digest=record.digest if record else None,
        batch_size=model.settings.get("batchSize"),
        pending=model.pending,
        workers=tuple(replace(worker, memory_bytes=_memory(worker)) for worker in model.workers),
        problems=tuple(problems),
    )


def scale(instance: Instance, name: str, workers: int, *, drain_s: float, wait_s: float = 120.0) -> Model:
    """Have exactly so many workers READY; drains first when some of them go.

    TorchServe answers 500 to what a worker that goes has in hand. Draining waits, up to `drain_s`, for a moment
    when none has anything; under traffic that never pauses such answers remain possible, and our client asks again.
    """
    if workers < 1:
        raise DistilleryError("0 workers would leave queued requests without any answer: use `python -m serving stop`")
    management = instance.management()
    before = management.describe(name)
    if workers < len(before.workers):
        drain(instance, drain_s, name)
    management.scale(name, workers, wait_s)
    end = time.monotonic() + wait_s
    model = management.describe(name)
    while not model.ready == len(model.workers) == workers:
        if time.monotonic() > end:
            raise DistilleryError(f"{name}: {model.ready} of {workers} workers READY after {wait_s:g} s")
        time.sleep(LOOK_S)
        model = management.describe(name)
    return model


def drain(instance: Instance, wait_s: float, name: str | None = None) -> bool:
    """Wait until nothing is queued or in hand; False, with a warning, when that takes longer than `wait_s`.

    TorchServe does not tell what is in hand. Without an open connection nothing is; with some, which clients may
    keep open for later, the workers must have been idle for a second.
    """
    management, end = instance.management(), time.monotonic() + wait_s
    before, idle = None, 0
    while wait_s > 0:
        try:
            models = [management.describe(one) for one in ([name] if name else management.models())]
        except DistilleryError:
            return True  # nobody there to drain
        now, queued = _effort(models), any(model.pending for model in models)
        idle = idle + 1 if now == before and not queued else 0
        if idle >= IDLE_LOOKS or (not queued and instance.clients() == 0):
            return True
        if time.monotonic() > end:
            log.warning("still busy after %g s: requests in hand will be lost", wait_s)
            return False
        before = now
        time.sleep(LOOK_S)
    return False


def differences(asked: ServeSettings, version: str, model: Model, *, counts: bool = True) -> list[str]:
    """One line for each setting that TorchServe runs with another value than the archive asked for."""
    wanted, skipped = asked.to_dict(), {"handler", *(() if counts else COUNTS)}
    lines = [
        f"{key} is {model.settings.get(key)}, the archive asks for {value}"
        for key, value in wanted.items()
        if key not in skipped and model.settings.get(key) != value
    ]
    return lines + ([f"version is {model.version}, the archive is {version}"] if model.version != version else [])


def _problems(instance: Instance, model: Model, record: Record | None) -> list[str]:
    """Why the server is not ready; empty when it is. The number of workers is whatever `scale` made it."""
    found = [f"worker {worker.id} is {worker.status}" for worker in model.workers if worker.status != "READY"]
    least = max(1, model.settings["minWorkers"])
    if len(model.workers) < least:
        found.append(f"{len(model.workers)} of {least} workers exist")
    asked = record or _asked(instance, model)
    return found + (differences(asked.settings, asked.version, model, counts=False) if asked else [])


def _asked(instance: Instance, model: Model) -> Archive | None:
    """The archive that plain `torchserve --start` was given, if it still lies in the model store."""
    try:
        return archives.read(instance.folder / instance.properties.get("model_store", "model_store") / model.archive)
    except DistilleryError:
        return None


def _effort(models: list[Model]) -> dict[int, float]:
    """Processor seconds that each worker has used."""
    used = {}
    for pid in (worker.pid for model in models for worker in model.workers):
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            used[pid] = times.user + times.system
    return used


def _memory(worker: Worker) -> int:
    """What the process holds now; TorchServe's own figure is old, or 0."""
    try:
        return int(psutil.Process(worker.pid).memory_info().rss)
    except psutil.Error:
        return worker.memory_bytes
