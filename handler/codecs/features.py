"""JSON → pixels, as bytes: `{"features": …}`, a bare list, or KServe's `{"instances": …}`. Intensities 0–255, H·W·C."""

import base64
import contextlib
import json
from itertools import chain
from typing import Any

import numpy as np
import orjson

from handler.codecs import image
from handler.contract import Contract
from handler.errors import BadInput, ServeError, TooLarge, json_type
from handler.settings import LimitSettings

NUMBERS = {int, float}  # exactly these: a bool is an int to Python, a digit string a number to numpy, not to us


def parse(payload: bytes) -> Any:
    """The value of a JSON text; BadInput `bad_json`, `not_finite` or `out_of_range`."""
    with contextlib.suppress(orjson.JSONDecodeError):  # a tenth of the time; what it refuses, Python's can name
        return orjson.loads(payload)
    try:
        return _DECODER.decode(payload.decode())
    except UnicodeDecodeError:
        raise BadInput("bad_json", "the body is not JSON: expected UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise BadInput("bad_json", f"the body is not JSON: {error}") from None
    except RecursionError:
        raise BadInput("bad_json", "the body is not JSON that is read: lists are nested too deeply") from None
    except ValueError:  # Python refuses to convert integers of thousands of digits
        raise BadInput("out_of_range", "a number has too many digits; expected intensities 0–255") from None


def canonical(value: Any) -> bytes:
    """The JSON text of a value that the server had decoded already; BadInput `bad_json` if it has none."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        raise BadInput("bad_json", "the body is not JSON that is read") from None


def decode(value: Any, contract: Contract, limits: LimitSettings) -> tuple[list[bytes], str]:
    """The images of a JSON value, H·W·C bytes each, and the key that its answer goes under.

    Raises BadInput for what is not of this form, TooLarge above `limits.rows` rows or `limits.pixels` pixels.
    """
    if isinstance(value, list):
        return _rows(value, "body", contract, limits), "prediction"
    keys = value.keys() & {"features", "instances"} if isinstance(value, dict) else set()
    if len(keys) != 1:
        raise BadInput("bad_json", 'expected {"features": […]}, {"instances": […]} or a list of numbers')
    if "features" in keys:
        return _rows(value["features"], "features", contract, limits), "prediction"
    return _instances(value["instances"], contract, limits), "predictions"


def _refuse(constant: str) -> Any:
    raise BadInput("not_finite", f"{constant} is not a number that can be used; expected intensities 0–255")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _rows(value: Any, name: str, contract: Contract, limits: LimitSettings) -> list[bytes]:
    """One flat list of numbers, or a list of such lists."""
    if not isinstance(value, list):
        raise BadInput("bad_type", f"{name}: expected a list of numbers, got {json_type(value)}")
    if not (value and isinstance(value[0], list)):
        return [_item(value, name, [(contract.size,)], contract)]
    _check_count(value, name, limits)
    return [_item(row, f"{name}[{i}]", [(contract.size,)], contract) for i, row in enumerate(value)]


def _instances(value: Any, contract: Contract, limits: LimitSettings) -> list[bytes]:
    """A list of items, each a flat list, a list nested as the image is, or base64 bytes."""
    if not isinstance(value, list):
        raise BadInput("bad_type", f"instances: expected a list, got {json_type(value)}")
    if not value:
        raise BadInput("bad_shape", "instances: expected at least one, got none")
    _check_count(value, "instances", limits)
    grid = contract.height, contract.width
    shapes: list[tuple[int, ...]] = [(contract.size,), (*grid, contract.channels)]
    shapes += [grid] if contract.channels == 1 else []
    items, left = [], limits.pixels
    for i, instance in enumerate(value):
        name = f"instances[{i}]"
        if isinstance(instance, dict):
            pixels, area = _blob(instance, name, contract, left)
            left -= area
        else:
            pixels = _item(instance, name, shapes, contract)
        items.append(pixels)
    return items


def _check_count(rows: list[Any], name: str, limits: LimitSettings) -> None:
    if len(rows) > limits.rows:
        raise TooLarge("too_many_rows", f"{name}: expected at most {limits.rows} rows a request, got {len(rows)}")


def _blob(instance: dict[str, Any], name: str, contract: Contract, budget: int) -> tuple[bytes, int]:
    """`{"b64": …}` as H·W·C bytes, and how many of the request's pixels an image in it took."""
    text = instance.get("b64")
    if not isinstance(text, str):
        raise BadInput("bad_type", f'{name}: expected {{"b64": "base64 text"}} or lists of numbers')
    try:
        payload = base64.b64decode(text, validate=True)
    except ValueError:
        raise BadInput("bad_base64", f"{name}.b64: expected base64 text") from None
    try:
        if image.blob_kind(payload, contract) == "raw":
            return payload, 0
        return image.decode(payload, contract, budget)
    except ServeError as error:
        raise type(error)(error.code, f"{name}: {error}") from error


def _item(value: Any, name: str, shapes: list[tuple[int, ...]], contract: Contract) -> bytes:
    """Numbers nested in one of `shapes` as bytes."""
    expected = image.layout(contract, "numbers")
    if not isinstance(value, list):
        code = "bad_shape" if type(value) in NUMBERS else "bad_type"
        raise BadInput(code, f"{name}: expected {expected}, got {json_type(value)}")
    shape = [len(value)]
    kinds = set(map(type, value))
    while kinds == {list}:
        widths = set(map(len, value))
        if len(widths) > 1:
            raise BadInput("bad_shape", f"{name}: expected {expected}, got lists of different lengths")
        shape += widths
        value = list(chain.from_iterable(value))
        kinds = set(map(type, value))
    if list in kinds:
        raise BadInput("bad_shape", f"{name}: expected {expected}, got numbers and lists mixed")
    if tuple(shape) not in shapes:
        raise BadInput("bad_shape", f"{name}: expected {expected}, got {'×'.join(map(str, shape))}")
    if not kinds <= NUMBERS:
        wrong = json_type(next(v for v in value if type(v) not in NUMBERS))
        raise BadInput("bad_type", f"{name}: expected {expected}, got {wrong} among them")
    return _bytes(value, kinds, name)


def _bytes(values: list[Any], kinds: set[type], name: str) -> bytes:
    """Numbers as bytes, fractions rounded to the nearest (halves to even)."""
    try:
        if kinds == {int}:
            return bytes(values)  # one pass in C that checks the range as well
        numbers = np.array(values, np.float64)
    except (ValueError, OverflowError):
        wrong = next(v for v in values if not 0 <= v <= 255)
        shown = f"{wrong:.6g}" if abs(wrong) < 1e300 else "a number that is far outside"
        raise BadInput("out_of_range", f"{name}: expected intensities 0–255, got {shown}") from None
    if not np.isfinite(numbers).all():
        raise BadInput("not_finite", f"{name}: expected finite numbers 0–255, got one too large to be represented")
    low, high = numbers.min(), numbers.max()
    if low < 0 or high > 255:
        raise BadInput("out_of_range", f"{name}: expected intensities 0–255, got {low if low < 0 else high:.6g}")
    return np.rint(numbers).astype(np.uint8).tobytes()
