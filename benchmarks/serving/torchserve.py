"""TorchServe in its shapes: our archive, upstream's defaults with a plain handler, an empty handler read two ways."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving.environments import PEERS, ROOT
from benchmarks.serving.processes import Alive, running
from benchmarks.serving.stage import Stage
from handler.errors import DistilleryError
from handler.settings import CacheSettings, HandlerSettings
from serving import archive, server
from serving.archive import ServeSettings, camel
from serving.instance import addresses, beside, read_properties
from serving.profiles import PROFILES

CONFIG = ROOT / "config.properties"
HERE = PEERS / "torchserve"
MODEL = "student"


@contextmanager
def distillery(stage: Stage, *, profile: str, each_core: bool = False, cache: bool = True) -> Iterator[Alive]:
    """Our archive in one of its profiles, started as `python -m serving start` does; one worker, or one a core."""
    asked = _asked(stage, profile, each_core)
    store = stage.store / f"distillery-{profile}-{asked['min_workers']}-{cache}"
    own = HandlerSettings(engine="onnx", cache=CacheSettings(enabled=cache))
    settings = ServeSettings(**asked, handler=own)
    path = store / f"{MODEL}.mar"
    if not path.is_file():
        archive.pack(stage.bundle, store, name=MODEL, settings=settings)
    instance = beside(CONFIG, stage.port, stage.folder)
    server.start(instance, path, config=CONFIG, tokens=False)
    try:
        yield lambda: instance.process() is not None
    finally:
        server.stop(instance, 0)


@contextmanager
def stock(stage: Stage) -> Iterator[Alive]:
    """Upstream's defaults: batches of one, a worker a core, fifteen lines of log a request."""
    with _torchserve(stage, "plain", {}, {}) as alive:
        yield alive


@contextmanager
def empty(stage: Stage, *, profile: str, reading: str, each_core: bool = False) -> Iterator[Alive]:
    """Our settings and log, and a handler that does nothing; `reading` upstream or buffered, how its socket is read."""
    model = {camel(name): value for name, value in _asked(stage, profile, each_core).items()}
    properties = {**read_properties(CONFIG), "metrics_config": str(ROOT / "metrics.yaml")}
    with _torchserve(stage, "empty", model, properties, READING=reading) as alive:
        yield alive


def _asked(stage: Stage, profile: str, each_core: bool) -> dict[str, Any]:
    """The settings of the profile, with one worker or one a core."""
    workers = stage.workers if each_core else 1
    return {**PROFILES[profile], "min_workers": workers, "max_workers": workers}


@contextmanager
def _torchserve(
    stage: Stage, handler: str, model: Mapping[str, int], properties: Mapping[str, str], **environ: str
) -> Iterator[Alive]:
    path = _archived(stage, handler, model)
    home = {"LOG_LOCATION": stage.folder / "logs", "METRICS_LOCATION": stage.folder / "logs", "TEMP": stage.folder}
    config = stage.folder / "config.properties"
    config.write_text("".join(f"{key}={value}\n" for key, value in {**properties, **addresses(stage.port)}.items()))
    command = [sys.executable, "-P", "-m", "ts.model_server", "--start", "--foreground", "--ncs"]
    command += ["--model-store", str(path.parent), "--models", f"{MODEL}={path.name}", "--disable-token-auth"]
    command += ["--ts-config", str(config), *(["--log-config", str(ROOT / "log4j2.xml")] if properties else [])]
    own = {name: str(value) for name, value in home.items()} | {"JAVA_HOME": server.java_home(os.environ)}
    with running(command, folder=stage.folder, environ=stage.environ(**own, **environ), log=stage.log) as alive:
        yield alive


def _archived(stage: Stage, handler: str, model: Mapping[str, int]) -> Path:
    """The archive of a handler of peers/torchserve, made by upstream's archiver."""
    store = stage.store / "-".join([handler, *map(str, model.values())])
    path = store / f"{MODEL}.mar"
    if path.is_file():
        return path
    store.mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "model_archiver.model_packaging", "--model-name", MODEL, "--version", "1.0"]
    command += ["--handler", str(HERE / f"{handler}.py"), "--export-path", str(store)]
    if model:
        config = stage.folder / "model-config.yaml"
        config.write_text("".join(f"{key}: {value}\n" for key, value in model.items()))
        command += ["--config-file", str(config)]
    environ = {**os.environ, "TMPDIR": str(stage.folder)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DistilleryError(f"torch-model-archiver failed: {reason}")
    return path
