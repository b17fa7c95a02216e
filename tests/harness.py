"""A TorchServe worker without Java: its own loader, its own Service, its own wire format, in this process.

    with Worker(archive_root) as worker:
        [reply] = worker.ask(post(png, "image/png"))

What goes in and comes out are the bytes that the front end would exchange with the worker's socket.
"""

import contextlib
import io
import json
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import ts
from numpy.typing import NDArray
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import TsModelLoader
from ts.protocol.otf_message_handler import retrieve_msg

IN_PLACE = "handler.student_handler"  # the repository's code instead of the archive's: for coverage and patches


@dataclass(frozen=True)
class Post:
    """A request as the front end passes it on: headers, and parameters as name → (content type, value)."""

    headers: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """An answer as the front end gets it."""

    request_id: str
    status: int
    phrase: str
    content_type: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def scores(self) -> NDArray[np.float64]:
        """The probabilities `[N, K]` of a prediction."""
        assert self.status == 200, self.body
        return np.array(next(iter(self.json.values())))

    @property
    def error(self) -> tuple[int, str]:
        return self.status, self.json["code"]


def post(body: bytes, content_type: str | None = None, **headers: str) -> Post:
    """A plain body; TorchServe hands on the media type without parameters, and the header as the client wrote it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if content_type is not None:
        named["Content-Type"] = content_type
    return Post(named, {"body": ((content_type or "").partition(";")[0], body)})


def multipart(**parts: tuple[str, bytes]) -> Post:
    """A multipart body: one parameter a part."""
    return Post({"Content-Type": "multipart/form-data; boundary=x"}, parts)


class Worker:
    """A loaded archive. `code` ARCHIVE runs the archive's own code, apart from this repository's; IN_PLACE does not."""

    def __init__(self, root: Path, *, batch_size: int = 8, gpu: int | None = None, in_place: bool = False) -> None:
        self.root, self.batch_size, self.gpu, self.in_place = root, batch_size, gpu, in_place
        self.manifest = json.loads((root / "MAR-INF" / "MANIFEST.json").read_text())["model"]

    def __enter__(self) -> "Worker":
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # TorchServe leaves the file open
            metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
        metrics.initialize_cache()
        metrics.model_name = self.manifest["modelName"]
        entry = IN_PLACE if self.in_place else self.manifest["handler"]
        with contextlib.nullcontext() if self.in_place else _only(self.root):
            self.service = TsModelLoader().load(
                self.manifest["modelName"], str(self.root), entry, self.gpu, self.batch_size, None, True, metrics
            )
        self.service.set_cl_socket(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.service

    @property
    def handler(self) -> Any:
        """The StudentHandler."""
        return self.service._entry_point.__self__

    def ask(self, *posts: Post) -> list[Reply]:
        """One batch over the wire and back; the requests' ids are "id-0", "id-1" and so on."""
        frame = b"I" + b"".join(encoded(f"id-{i}", item) for i, item in enumerate(posts)) + END
        command, batch = retrieve_msg(_Socket(frame))
        assert command == b"I"
        return _replies(bytes(self.service.predict(batch)))


class _Socket:
    """What retrieve_msg reads from."""

    def __init__(self, frame: bytes) -> None:
        self.recv = io.BytesIO(frame).read


END = struct.pack("!i", -1)


def _text(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def encoded(request_id: str, item: Post) -> bytes:
    headers = b"".join(_text(name.encode()) + _text(value.encode()) for name, value in item.headers.items())
    parameters = b"".join(
        _text(name.encode()) + _text(kind.encode()) + _text(value) for name, (kind, value) in item.parameters.items()
    )
    return _text(request_id.encode()) + headers + END + parameters + END


def _replies(frame: bytes) -> list[Reply]:
    stream = io.BytesIO(frame)

    def number() -> int:
        return int(struct.unpack("!i", stream.read(4))[0])

    def text() -> str:
        return stream.read(number()).decode()

    code, message = number(), text()
    assert (code, message) == (200, "Prediction success"), "the batch failed as a whole"
    replies = []
    while (length := number()) != -1:
        request_id, content_type = stream.read(length).decode(), text()
        status, phrase = number(), text()
        headers = {text(): text() for _ in range(number())}
        replies.append(Reply(request_id, status, phrase, content_type, headers, stream.read(number())))
    return replies


@contextlib.contextmanager
def _only(root: Path) -> Iterator[None]:
    """As in a worker's process: `handler` and `student_handler` come from the archive, which is also the folder."""
    ours = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] in ("handler", "student_handler")
    }
    path, folder, wrote = list(sys.path), Path.cwd(), sys.dont_write_bytecode
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(folder)
        sys.path[:], sys.dont_write_bytecode = path, wrote
        for name in [name for name in sys.modules if name.split(".")[0] in ("handler", "student_handler")]:
            del sys.modules[name]
        sys.modules.update(ours)
