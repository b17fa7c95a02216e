"""What a request asks for beside its images: what else the answer holds, and what the headers say of type and cache.

    {"top_k": 3, "logits": true, "features": true}      in a JSON body the field `options`, for any body the header

The header is `X-Options`. Where both are given, the body's wins, name by name.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from handler.errors import BadInput, json_type, unknown

FORM = "multipart/form-data"
_BOUNDARY = re.compile(r';\s*boundary="?([^";]+)', re.IGNORECASE)
OFFERED = {"top_k": "a whole number above 0", "logits": "true or false", "features": "true or false"}


@dataclass(frozen=True, slots=True)
class Options:
    """What an answer holds beside the probabilities, or, with `explanation`, in their place.

    `top_k`: so many classes an image, best first; `features`: what the last layer reads. An explanation has a route
    of its own, not a name. The text of all this stands in the cache's key.
    """

    top_k: int = 0
    logits: bool = False
    features: bool = False
    explanation: bool = False


NONE = Options()


class Wishes(NamedTuple):
    """Of the headers: Content-Type, whether the cache may answer, and keep the answer, options, a description.

    `boundary` is None unless the body is a form; then it is what its parts lie between, empty if no header tells.
    """

    content_type: str
    look_up: bool
    store: bool
    options: Options | None
    describe: bool
    boundary: str | None = None


def wishes(headers: Mapping[str, str], own: str = "") -> Wishes:
    """What the headers ask for; BadInput `bad_option`. `own` is the type of the part itself, which goes before theirs.

    `explain` and `describe` are TorchServe's, spelled as it spells them: for `/explanations` and for a description. On
    `/predictions` it overwrites a client's `explain`, and it leaves none beside a `describe` of its own.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    control = {word.strip().lower() for word in lower.get("cache-control", "").split(",")}
    options = Options(explanation=True) if headers.get("explain") == "True" else None
    if "x-options" in lower:
        try:
            options = parse(orjson.loads(lower["x-options"]), options)
        except orjson.JSONDecodeError:
            raise BadInput("bad_option", 'X-Options: expected a JSON object such as {"top_k": 3}') from None
    look_up, store = control.isdisjoint({"no-cache", "no-store"}), "no-store" not in control
    describe = headers.get("describe") == "True" and "explain" not in headers
    content_type, boundary = lower.get("content-type", ""), None
    if media(own) == FORM:  # of a form that is taken apart already it is the part's
        boundary = found[1] if (found := _BOUNDARY.search(content_type)) else ""
    return Wishes(media(own) or media(content_type), look_up, store, options, describe, boundary)


@functools.lru_cache(256)
def media(content_type: str) -> str:
    """A Content-Type in lower case, without parameters."""
    return content_type.partition(";")[0].strip().lower()


def parse(value: Any, given: Options | None = None) -> Options | None:
    """A JSON value over the options that are `given`; None when nothing is asked for. BadInput `bad_option`."""
    if not isinstance(value, dict):
        raise BadInput("bad_option", f'options: expected an object such as {{"top_k": 3}}, got {json_type(value)}')
    for name, one in value.items():
        if name not in OFFERED:
            raise BadInput("bad_option", unknown("option", " ".join(name.split())[:60], OFFERED))
        if type(one) is not type(getattr(NONE, name)) or (name == "top_k" and one < 1):
            raise BadInput("bad_option", f"options.{name}: expected {OFFERED[name]}, got {json_type(one)}")
    options = replace(given or NONE, **value)
    return options if options != NONE else None
