"""Where one TorchServe lives: its ports, its folder, its tokens, its process.

The default instance is the one that config.properties describes, with key_file.json in the working folder:
plain `torchserve --start` makes it as well as `serving start` does. An instance with a port of its own takes
five in a row (inference, management, metrics, two of gRPC) and keeps all that is its own, key_file.json
included, in logs/PORT; so several live side by side.
"""

import json
import random
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from handler.bundle import atomic
from handler.errors import DistilleryError
from serving.archive import ServeSettings
from serving.client import token
from serving.management import Management

PID_FILE = ".model_server.pid"
JAVA_CLASS = "org.pytorch.serve.ModelServer"
ADDRESSES = {"inference_address": 8080, "management_address": 8081, "metrics_address": 8082}
GRPC = {"grpc_inference_port": 7070, "grpc_management_port": 7071}
PORTS = len(ADDRESSES) + len(GRPC)  # of an instance, in a row


@dataclass(frozen=True)
class Record:
    """What `start` leaves in server.json for the commands after it: which process serves what."""

    pid: int
    version: str
    digest: str
    config: str

    @property
    def settings(self) -> ServeSettings:
        """What the archive asked for when it was started."""
        return ServeSettings.from_yaml(self.config)


@dataclass(frozen=True)
class Instance:
    """One TorchServe, running or not; `folder` holds key_file.json, `home` the logs and the temporary files."""

    folder: Path
    home: Path
    properties: Mapping[str, str]

    @property
    def inference(self) -> str:
        """The address that clients call."""
        return self._url("inference_address")

    @property
    def key_file(self) -> Path:
        """Where TorchServe writes its tokens."""
        return self.folder / "key_file.json"

    @property
    def temporary(self) -> Path:
        """The server's own TEMP: sockets and unpacked archives."""
        return self.home / "tmp"

    @property
    def pid_folder(self) -> Path:
        """The server's TMPDIR: pid file. The default instance's is the user's, for there `torchserve --stop` looks."""
        return Path(tempfile.gettempdir()) if self.home != self.folder else self.temporary

    def management(self) -> Management:
        """A client of its management port."""
        return Management(self._url("management_address"), token(self.key_file, "management"))

    def ports(self) -> tuple[int, ...]:
        """All the ports that it listens on."""
        http = [int(urlsplit(self._url(key)).port or 0) for key in ADDRESSES]
        return (*http, *(int(self.properties.get(key, port)) for key, port in GRPC.items()))

    def record(self) -> Record | None:
        """What `start` wrote about the process that runs now; None for one that another command started."""
        try:
            found = Record(**json.loads((self.home / "server.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        process = self.process()
        return found if process and process.pid == found.pid else None

    def write_record(self, record: Record) -> None:
        """Remember what was started."""
        with atomic(self.home / "server.json") as path:
            path.write_text(json.dumps(asdict(record), indent=2) + "\n")

    def forget(self) -> None:
        """Remove what is of use only while the server runs."""
        for path in (self.home / "server.json", self.key_file):
            path.unlink(missing_ok=True)
        if java(self.pid_folder) is None:
            (self.pid_folder / PID_FILE).unlink(missing_ok=True)

    def process(self) -> psutil.Process | None:
        """The running server: that of the pid file, if it has our ports; another folder's may have written it."""
        found = java(self.pid_folder)
        listens = (self.ports()[1], psutil.CONN_LISTEN)
        return found if found and listens in (connections(found) or []) else None

    def clients(self) -> int | None:
        """How many connections to the inference ports are open; None when that cannot be known."""
        process, ports = self.process(), (self.ports()[0], self.ports()[3])
        found = connections(process) if process else None
        if found is None:
            return None
        return sum(port in ports and state == psutil.CONN_ESTABLISHED for port, state in found)

    def _url(self, key: str) -> str:
        url = self.properties.get(key, f"http://127.0.0.1:{ADDRESSES[key]}")
        return url.replace("0.0.0.0", "127.0.0.1").rstrip("/")


def locate(config: Path, port: int | None = None) -> Instance:
    """The instance that config.properties describes, or that with `port` as its first."""
    if port is None:
        return Instance(Path.cwd(), Path("logs").resolve(), read_properties(config))
    return beside(config, port, (Path("logs") / str(port)).resolve())


def beside(config: Path, port: int, home: Path) -> Instance:
    """An instance with five ports from `port` on, that keeps all that is its own in `home`."""
    return Instance(home, home, {**read_properties(config), **addresses(port)})


def addresses(port: int) -> dict[str, str]:
    """TorchServe's settings for five ports from `port` on."""
    own = {key: f"http://127.0.0.1:{port + i}" for i, key in enumerate(ADDRESSES)}
    return own | {key: str(port + len(ADDRESSES) + i) for i, key in enumerate(GRPC)}


def read_properties(path: Path) -> dict[str, str]:
    """The settings of a config.properties."""
    if not path.is_file():
        raise DistilleryError(f"{path}: no such file: run from the project's root, or name it with --config")
    lines = [line.strip() for line in path.read_text().splitlines()]
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
    return {key.strip(): value.strip() for key, value in pairs}


def java(folder: Path) -> psutil.Process | None:
    """The live TorchServe of the pid file in a folder."""
    try:
        process = psutil.Process(int((folder / PID_FILE).read_text()))
        # After a restart of the machine the pid may be anyone's.
        return process if alive(process) and JAVA_CLASS in process.cmdline() else None
    except (OSError, ValueError, psutil.Error):
        return None


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def connections(process: psutil.Process) -> list[tuple[int, str]] | None:
    """Port and state of each connection that a process holds; None when the system does not tell."""
    try:
        return [(one.laddr.port, one.status) for one in process.net_connections("tcp")]
    except psutil.Error:
        return None


def free_port() -> int:
    """The first of five free ports in a row."""
    for first in random.sample(range(20_000, 32_000, PORTS), 200):
        if not taken(tuple(range(first, first + PORTS))):
            return first
    raise DistilleryError("no five free ports in a row between 20000 and 32000")


def taken(ports: tuple[int, ...]) -> list[int]:
    """Which of the ports another process holds."""
    busy = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                busy.append(port)
    return busy
