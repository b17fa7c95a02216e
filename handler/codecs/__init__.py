"""Wire ↔ item: what a body is, and the pixels in it. One modality a file; `answer` is the way back."""

from dataclasses import dataclass
from typing import Literal

from handler.codecs import features, image
from handler.contract import Contract
from handler.errors import BadInput, Unsupported
from handler.settings import LimitSettings

Kind = Literal["raw", "image", "json"]


@dataclass(frozen=True, slots=True)
class Item:
    """The images of one request, uint8 `[N, C, H, W]`, and the key that their answer goes under."""

    images: image.Pixels
    form: str


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


def decode(kind: Kind, payload: bytes, contract: Contract, limits: LimitSettings) -> Item:
    """The pixels of a body; raises ServeError for what is not as the contract says."""
    if kind == "json":
        return Item(*features.decode(features.parse(payload), contract, limits))
    pixels = image.raw(payload, contract) if kind == "raw" else image.decode(payload, contract, limits)
    return Item(pixels[None], "prediction")
