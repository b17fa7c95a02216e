"""Answer → wire: JSON, encoded once; the cache keeps all of it but the part that differs between hit and miss."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from handler.errors import ServeError

DIGITS = 9  # decimals of a probability: for 1,000 classes, their sum is 1 within 1e-6
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def head(form: str, probabilities: NDArray[np.float64], labels: Sequence[str]) -> bytes:
    """The answer for probabilities `[N, K]` as far as it does not depend on its source; `tail` closes it."""
    best = probabilities.argmax(axis=1).tolist()
    body = {form: probabilities.round(DIGITS).tolist(), "label": [labels[k] for k in best], "class_id": best}
    return _encode(body)[:-1].encode()


def tail(source: str, model: Mapping[str, str]) -> bytes:
    """The end of all answers of one model from one source, "model" or "cache"."""
    return ("," + _encode({"source": source, "model": dict(model)})[1:]).encode()


def error(fault: ServeError, request_id: str) -> bytes:
    """What a request gets instead; its text may quote the request, whatever that held, so it is made printable."""
    body = {"error": str(fault), "code": fault.code, "request_id": request_id}
    return _encode(body).encode(errors="replace")
