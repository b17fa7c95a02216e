"""Our own core outside TorchServe, for the adapters of mosec and LitServe. Environment: BUNDLE."""

import os
from collections.abc import Sequence
from pathlib import Path

from handler.bundle import FILES, verify
from handler.cache import CacheManager
from handler.contract import Contract
from handler.inside import Inside
from handler.messages import Request
from handler.metrics import Metrics
from handler.model import load_model
from handler.service import Service
from handler.settings import HandlerSettings

BATCH = 128
RAW = "application/octet-stream"  # of which the core looks whether it is an image


def load() -> Service:
    """The service over the bundle, as the archive's handler makes it; the one place that knows its constructor."""
    root = Path(os.environ["BUNDLE"])
    digest = verify(root)["digest"]
    settings = HandlerSettings(engine="onnx")
    contract = Contract.read(root / FILES.contract)
    model, _ = load_model(root, contract, settings, 1, None, BATCH)
    model.warm_up([2**i for i in range(BATCH.bit_length())])
    cache = CacheManager.from_settings(settings.cache, [digest])
    identity = {"name": "student", "version": "1.0", "digest": digest}
    return Service(model, cache, settings.limits, identity, Metrics(), Inside(root, contract))


def answers(service: Service, bodies: Sequence[bytes]) -> list[bytes]:
    """One body a request, whatever its status."""
    return [found.body for found in service.answer([Request(payload=bytes(b), content_type=RAW) for b in bodies])]
