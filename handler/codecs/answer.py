"""Answer → wire: JSON, encoded once; the cache keeps all of it but the part that differs between hit and miss."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from handler.errors import ServeError

DIGITS = 9  # decimals of a probability: for 1,000 classes, their sum is 1 within 1e-6
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def head(form: str, rows: Sequence[Sequence[float]], ids: Sequence[int], labels: Sequence[str]) -> bytes:
    """The answer as far as it does not depend on its source, open for `tail` to close it.

    `rows` are the probabilities `[N][K]` of one request's images, `ids` the class of each.
    """
    return orjson.dumps({form: rows, "label": [labels[k] for k in ids], "class_id": ids})[:-1]


def more(found: Mapping[str, Any]) -> bytes:
    """What options add to a head: numbers, lists and arrays by their names."""
    return b"," + orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] if found else b""


def tail(source: str, model: Mapping[str, str]) -> bytes:
    """The end of all answers of one model from one source, "model" or "cache"."""
    return b"," + orjson.dumps({"source": source, "model": dict(model)})[1:]


def error(fault: ServeError, request_id: str) -> bytes:
    """What a request gets instead; its text may quote the request, whatever that held, which orjson would refuse."""
    body = {"error": str(fault), "code": fault.code, "request_id": request_id}
    return _encode(body).encode(errors="replace")
