"""TorchServe's entry: rows to requests, answers to bytes, and what must hold before a worker says it is ready.

In the archive this file lies at the root, as a module of its own, with `handler/` as a package beside it.
TorchServe demands exactly one class here.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import handler
from handler import metrics
from handler.bundle import FILES, verify
from handler.cache import CacheManager
from handler.codecs.features import canonical
from handler.contract import Contract
from handler.errors import BadInput, BundleError, DistilleryError, Internal, ServeError
from handler.model import load_model, replay
from handler.service import Answer, Request, Service
from handler.settings import HandlerSettings, environment, load

log = logging.getLogger(__name__)


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

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[bytes]:
        """TorchServe's call: one row a request in, one body a request out; never raises."""
        requests = self.preprocess(rows, context)
        answers = self.inference(requests)
        return self.postprocess(answers, context)

    def preprocess(self, rows: list[dict[str, Any]], context: Any) -> list[Request]:
        """Rows as requests; one that cannot be read carries its error."""
        return [_request(row, context, i) for i, row in enumerate(rows)]

    def inference(self, requests: list[Request]) -> list[Answer]:
        """One answer a request, in order."""
        return self.service.answer(requests)

    def postprocess(self, answers: list[Answer], context: Any) -> list[bytes]:
        """The bodies; status and headers go to the context, counts to TorchServe's metrics."""
        for i, answer in enumerate(answers):
            context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, i)
            for name, value in answer.headers.items():
                context.set_response_header(i, name, value)
        metrics.emit(context.metrics, Counter(answer.outcome for answer in answers))
        return [answer.body for answer in answers]


def _service(context: Any) -> Service:
    """The service over the verified archive, its model warm."""
    properties, config = context.system_properties, context.model_yaml_config or {}
    root = Path(properties["model_dir"]).resolve()
    _refuse_foreign_code(root)
    digest = verify(root)["digest"]
    contract = Contract.read(root / FILES.contract)
    settings = load(HandlerSettings, config.get("handler") or {}, environment(os.environ).get("handler", {}))
    threads = settings.threads or max(1, _cores() // config.get("maxWorkers", 1))
    batch = properties.get("batch_size") or 1
    model, why = load_model(root, contract, settings, threads, properties.get("gpu_id"), batch)
    sizes = [2**i for i in range(batch.bit_length())]
    model.warm_up(sizes)
    difference = replay(model, root / FILES.golden, sizes)
    line = "engine %s (%s), device %s, threads %d, archive %s, golden images within %.1g"
    log.info(line, model.engine, why, model.device, threads, digest, difference)
    version = context.manifest["model"]["modelVersion"]
    identity = {"name": context.model_name, "version": version, "digest": digest}
    cache = CacheManager.from_settings(settings.cache, [digest, context.model_name, version])
    return Service(model, cache, settings.limits, identity)


def _refuse_foreign_code(root: Path) -> None:
    """The passport vouches for the code in the archive: other code, found earlier on the path, must not run instead."""
    for name, file in (("handler", handler.__file__), ("student_handler", __file__)):
        if not Path(file).resolve().is_relative_to(root):
            raise BundleError(f"{root}: {name} was loaded from {file}: take that folder out of PYTHONPATH")


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _request(row: Mapping[str, Any], context: Any, index: int) -> Request:
    """One row as a request; whatever is wrong with it stays with it."""
    request_id = str(context.get_request_id(index))
    try:
        headers = {name.lower(): value for name, value in context.get_all_request_header(index).items()}
        name = "data" if "data" in row else "body"
        content_type = _content_type(headers, name)
        control = {word.strip().lower() for word in str(headers.get("cache-control", "")).split(",")}
        return Request(
            payload=_payload(row, name, content_type),
            content_type=content_type,
            request_id=request_id,
            look_up=control.isdisjoint({"no-cache", "no-store"}),
            store="no-store" not in control,
        )
    except ServeError as error:
        return Request(request_id=request_id, error=error)
    except Exception:
        log.exception("request %s cannot be read", request_id)
        return Request(request_id=request_id, error=Internal())


def _content_type(headers: Mapping[str, Any], name: str) -> str:
    """The part's own content type, else the request's; in lower case, without parameters."""
    part = headers.get(name)  # a string if the client sent a header of the part's name
    own = part.get("content-type") if isinstance(part, dict) else None
    return str(own or headers.get("content-type", "")).partition(";")[0].strip().lower()


def _payload(row: Mapping[str, Any], name: str, content_type: str) -> bytes:
    """The bytes of the part; what the server has decoded already is encoded again, so that one way leads on."""
    if row and name not in row:
        raise BadInput("empty_body", f"expected a part named 'data', got {sorted(map(str, row))[:3]}")
    value = row.get(name, b"")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str) and content_type.startswith("text/"):
        return value.encode()
    return canonical(value)
