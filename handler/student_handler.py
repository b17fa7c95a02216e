"""TorchServe's entry: rows to requests, answers to bytes, and what must hold before a worker says it is ready.

In the archive this file lies at the root, as a module of its own, with `handler/` as a package beside it.
TorchServe demands exactly one class here.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import handler
from handler import forms, frames
from handler.bundle import FILES, verify
from handler.cache import CacheManager
from handler.codecs.features import canonical
from handler.contract import Contract
from handler.description import describe
from handler.errors import BadInput, BundleError, DistilleryError, told
from handler.inside import Inside
from handler.messages import Answer, Request
from handler.metrics import Metrics, resident, to_torchserve
from handler.model import load_model, replay
from handler.options import Wishes, media, wishes
from handler.service import Service
from handler.settings import HandlerSettings, environment, load

log = logging.getLogger(__name__)
T = TypeVar("T")
Parts = Sequence[tuple[str, str, Any]]
"""Name, Content-Type and value of each part of a body."""


class StudentHandler:
    """Serves the student of the archive it lies in."""

    service: Service

    def initialize(self, context: Any) -> None:
        """Verify the archive, load the student and warm it up; raises DistilleryError rather than serve what is off."""
        try:
            self.service = _service(context)
        except DistilleryError as error:
            log.error("refused to serve: %s", error)
            raise
        frames.install(self.service.respond, _request_in_frame, self.service.settle)

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[bytes]:
        """TorchServe's call: one row a request in, one body a request out; never raises."""
        requests = self.preprocess(rows, context)
        answers = self.inference(requests)
        return self.postprocess(answers, context)

    def preprocess(self, rows: list[dict[str, Any]], context: Any) -> list[Request]:
        """Rows as requests; one that cannot be read carries its error."""
        return [_request_of(row, context, i) for i, row in enumerate(rows)]

    def inference(self, requests: list[Request]) -> list[Answer]:
        """One answer a request, in order."""
        return self.service.answer(requests)

    def postprocess(self, answers: list[Answer], context: Any) -> list[bytes]:
        """The bodies; status and headers go to the context."""
        for i, answer in enumerate(answers):
            context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, i)
            for name, value in answer.headers:
                context.set_response_header(i, name, value)
        return [answer.body for answer in answers]


def _service(context: Any) -> Service:
    """The service over the verified archive, its model warm."""
    properties, config = context.system_properties, context.model_yaml_config or {}
    root = Path(properties["model_dir"]).resolve()
    _refuse_foreign_code(root)
    digest = verify(root)["digest"]
    contract = Contract.read(root / FILES.contract)
    settings = load(HandlerSettings, config.get("handler") or {}, environment(os.environ).get("handler", {}))
    batch = properties.get("batch_size") or 1
    threads = settings.threads or (1 if batch == 1 else max(1, _cores() // config.get("minWorkers", 1)))
    model, why = load_model(root, contract, settings, threads, properties.get("gpu_id"), batch)
    sizes = [2**i for i in range(batch.bit_length())]
    model.warm_up(sizes)
    difference = replay(model, root / FILES.golden, sizes)
    line = "engine %s (%s), device %s, precision %s, threads %d, archive %s, golden images within %.1g"
    log.info(line, model.engine, why, model.device, settings.precision, threads, digest, difference)
    version = context.manifest["model"]["modelVersion"]
    identity = {"name": context.model_name, "version": version, "digest": digest}
    cache = CacheManager.from_settings(settings.cache, [digest, context.model_name, version])
    metrics = Metrics(cache.totals, resident, to_torchserve(context.metrics))
    inside = Inside(root, contract, model.device)
    description = describe(root, model, threads, why, identity, inside)
    return Service(model, cache, settings.limits, identity, metrics, inside, description)


def _refuse_foreign_code(root: Path) -> None:
    """The passport vouches for the code in the archive: other code, found earlier on the path, must not run instead."""
    for name, file in (("handler", handler.__file__), ("student_handler", __file__)):
        if not Path(file).resolve().is_relative_to(root):
            raise BundleError(f"{root}: {name} was loaded from {file}: take that folder out of PYTHONPATH")


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _request_of(row: Mapping[str, Any], context: Any, index: int) -> Request:
    """One of TorchServe's rows as a request."""
    headers = context.get_all_request_header(index)
    parts = [(name, _type_of_part(headers, name), value) for name, value in row.items()]
    texts = {name: value for name, value in headers.items() if isinstance(value, str)}  # not a part's name
    return _request(str(context.get_request_id(index)), parts, wishes, texts)


def _request(request_id: str, parts: Parts, read: Callable[[T, str], Wishes], headers: T) -> Request:
    """A request out of the parts of its body and its headers; whatever is wrong with it stays with it."""
    try:
        plain = len(parts) == 1 and parts[0][0] == "body"  # nearly all are
        own, value = parts[0][1:] if plain else _part(parts)
        content_type, look_up, store, options, description, boundary = read(headers, own)
        if description and not parts:  # whereas a prediction has a part, be it empty
            return Request(request_id=request_id, describe=True)
        payload = value if isinstance(value, bytes) else _payload(value, content_type)
        if boundary is not None:
            own, payload = _part(forms.parts(payload, boundary))
            content_type = media(own)
        return Request(payload, content_type, request_id, look_up, store, options)
    except Exception as error:
        return Request(request_id=request_id, error=told(error, request_id))


def _request_in_frame(request_id: str, headers: bytes, parts: Parts) -> Request:
    """A request as `frames` finds it, where that has taken the place of TorchServe's rows and context."""
    return _request(request_id, parts, _wishes_in_frame, headers)


@functools.lru_cache(256)  # clients repeat themselves
def _wishes_in_frame(headers: bytes, own: str) -> Wishes:
    return wishes(frames.parsed(headers), own)


def _type_of_part(headers: Mapping[str, Any], name: str) -> str:
    part = headers.get(name)  # a string if the client sent a header of the part's name
    return str(part.get("content-type") or "") if isinstance(part, dict) else ""


def _part(parts: Parts) -> tuple[str, Any]:
    """Type and value of the part that holds the image; of several with one name it is the last."""
    found = {name: (kind, value) for name, kind, value in parts}
    if found.keys() and found.keys().isdisjoint({"data", "body"}):
        raise BadInput("empty_body", f"expected a part named 'data', got {sorted(map(str, found))[:3]}")
    return found.get("data") or found.get("body") or ("", b"")


def _payload(value: Any, content_type: str) -> bytes:
    """The bytes of a part that came otherwise; what the server has decoded is encoded again: one way leads on."""
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, str) and content_type.startswith("text/"):
        return value.encode()
    return canonical(value)
