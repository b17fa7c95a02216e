"""Which codec reads a body."""

import numpy as np
import pytest

from handler import codecs
from handler.contract import Contract
from handler.errors import BadInput, ServeError, Unsupported
from handler.settings import LimitSettings
from tests.handler.payloads import dumps, jpeg, png

CONTRACT = Contract(network="separable", channels=1, height=2, width=3, labels=("a", "b"))
PIXELS = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
PNG, JPEG, RAW, JSON = png(PIXELS), jpeg(PIXELS), PIXELS.tobytes(), dumps({"features": PIXELS.ravel().tolist()})


@pytest.mark.parametrize(
    ("payload", "content_type", "kind"),
    [
        (PNG, "", "image"),
        (JPEG, "image/png", "image"),
        (PNG, "text/plain", "image"),
        (PNG, "application/octet-stream", "image"),
        (RAW, "application/octet-stream", "raw"),
        (PNG[:6], "application/octet-stream", "raw"),
        (JSON, "application/json", "json"),
        (PNG, "application/json", "json"),  # and is then refused as JSON
    ],
)
def test_the_kind_of_a_body(payload: bytes, content_type: str, kind: str) -> None:
    assert codecs.kind_of(payload, content_type, CONTRACT) == kind


@pytest.mark.parametrize(
    ("payload", "content_type", "error", "text"),
    [
        (b"", "application/json", BadInput, "the body is empty"),
        (RAW, "", Unsupported, "no Content-Type and not the bytes of an image"),
        (JSON, "text/plain", Unsupported, "text/plain and not the bytes of an image: expected PNG"),
        (b"GIF89a", "image/gif", Unsupported, "image/gif and not"),
        (b"?", "x" * 99, Unsupported, f"^{'x' * 60} and"),
        (RAW[:5], "application/octet-stream", BadInput, "expected 6 bytes"),
    ],
)
def test_what_no_codec_reads(payload: bytes, content_type: str, error: type[ServeError], text: str) -> None:
    with pytest.raises(error, match=text):
        codecs.kind_of(payload, content_type, CONTRACT)


@pytest.mark.parametrize(("kind", "payload"), [("image", PNG), ("raw", RAW), ("json", JSON)])
def test_each_codec_gives_one_image(kind: codecs.Kind, payload: bytes) -> None:
    item = codecs.decode(kind, payload, CONTRACT, LimitSettings())
    np.testing.assert_array_equal(codecs.stacked([item], CONTRACT), PIXELS[None, None])
    assert item.form == "prediction"
