"""Wire ↔ item: what a body is, and the pixels in it. One modality a file; `answer` is the way back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from handler.codecs import features, image
from handler.contract import Contract, Pixels
from handler.errors import BadInput, Unsupported
from handler.options import Options, parse
from handler.settings import LimitSettings

Kind = Literal["raw", "image", "json"]


@dataclass(slots=True, eq=False)
class Item:
    """What is in one request: `count` images, H·W·C bytes each, the key of their answer, and what else it holds."""

    pixels: bytes
    form: str = "prediction"
    count: int = 1
    options: Options | None = None


NOTHING = Item(b"", count=0)


def kind_of(payload: bytes, content_type: str, contract: Contract) -> Kind:
    """What a body is, from its Content-Type (lower case, without parameters, "" if none) and its first bytes.

    Raises BadInput `empty_body` or `bad_shape`, Unsupported for what no codec reads.
    """
    if not payload:
        hint = "JSON needs the header Content-Type: application/json"
        raise BadInput("empty_body", f"the body is empty: expected an image, raw pixels or JSON ({hint})")
    if content_type == "application/json":
        return "json"
    if content_type == "application/octet-stream":
        return image.blob_kind(payload, contract)
    if image.is_image(payload):
        return "image"
    got = content_type[:60] or "no Content-Type"
    expected = "PNG, JPEG, application/octet-stream (raw pixels) or application/json"
    raise Unsupported("unsupported_media", f"{got} and not the bytes of an image: expected {expected}")


def decode(
    kind: Kind, payload: bytes, contract: Contract, limits: LimitSettings, options: Options | None = None
) -> Item:
    """What is in a body, whose headers give `options`; raises ServeError for what is not as the contract says."""
    if kind == "raw":
        return Item(payload, options=options)
    if kind == "image":
        return Item(image.decode(payload, contract, limits.pixels)[0], options=options)
    value = features.parse(payload)
    if isinstance(value, dict) and "options" in value:
        options = parse(value["options"], options)
    images, form = features.decode(value, contract, limits)
    return Item(b"".join(images), form, len(images), options)


def stacked(items: Iterable[Item], contract: Contract) -> Pixels:
    """The images of all items, in order, as one contiguous array uint8 `[N, C, H, W]`."""
    pixels = bytearray().join([item.pixels for item in items])  # which torch may write to
    return np.ascontiguousarray(image.raw(pixels, contract))
