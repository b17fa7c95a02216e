"""Bytes → pixels: PNG and JPEG through Pillow, raw pixels as they are. Training decodes with this same function.

An image is turned upright by its EXIF tag, laid on black where it is transparent, made grey or RGB as the
contract asks, and resampled to the contract's size if it has another. Colour profiles are not applied.
"""

import io
import struct
import zlib
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from handler.contract import Contract, Pixels
from handler.errors import BadInput, TooLarge, Unsupported

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
MODES = {1: "L", 3: "RGB"}
# What Pillow raises for bytes that are not the image they claim to be; anything else is a fault of ours.
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AssertionError, UserWarning,
    struct.error, zlib.error,
)  # fmt: skip


def is_image(payload: bytes) -> bool:
    """Whether the bytes begin as a PNG or a JPEG does."""
    return payload.startswith((PNG, JPEG))


def blob_kind(payload: bytes, contract: Contract) -> Literal["raw", "image"]:
    """What bytes without a type are: raw pixels if there are exactly as many as the contract asks, else an image.

    Raises BadInput `bad_shape` when they are neither.
    """
    if len(payload) == contract.size:
        return "raw"
    if is_image(payload):
        return "image"
    expected = f"expected {layout(contract, 'bytes')} or a PNG or JPEG image"
    raise BadInput("bad_shape", f"{expected}, got {len(payload)} bytes")


def layout(contract: Contract, unit: str) -> str:
    """One item in words, such as `784 numbers (28×28×1)`: height × width × channels."""
    return f"{contract.size} {unit} ({contract.height}×{contract.width}×{contract.channels})"


def raw(payload: bytes | bytearray, contract: Contract) -> Pixels:
    """N·H·W·C bytes as uint8 `[N, C, H, W]`; a view, nothing is copied."""
    shape = len(payload) // contract.size, contract.height, contract.width, contract.channels
    return np.ndarray(shape, np.uint8, payload).transpose(0, 3, 1, 2)


def decode(payload: bytes, contract: Contract, budget: int) -> tuple[bytes, int]:
    """A PNG or JPEG as H·W·C bytes, which `raw` reads, and how many pixels it had as it was sent: at most `budget`.

    Raises Unsupported for other formats, TooLarge above the budget, BadInput `bad_image` for what is corrupt.
    """
    if not is_image(payload):
        raise Unsupported("unsupported_media", "the image is neither PNG nor JPEG, the two formats that are read")
    if contract.channels not in MODES:
        raise Unsupported("unsupported_media", f"this model takes no images: send {layout(contract, 'bytes')}, raw")
    kind = PngImageFile if payload.startswith(PNG) else JpegImageFile  # Image.open takes as long as a small image
    try:
        with kind(io.BytesIO(payload)) as picture:
            area = picture.width * picture.height
            if area > budget:  # the header is read, nothing is decoded yet
                size = f"{picture.width}×{picture.height}"
                raise TooLarge("too_many_pixels", f"the image has {size} pixels; expected at most {budget} a request")
            picture.load()
            if picture.info:  # the tag is there, or in text
                ImageOps.exif_transpose(picture, in_place=True)
            return _pixels(picture, contract), area
    except BROKEN as error:
        raise BadInput("bad_image", f"the image cannot be decoded: {_reason(error)}") from error


def _pixels(picture: Image.Image, contract: Contract) -> bytes:
    picture = _to_mode(picture, MODES[contract.channels])
    size = contract.width, contract.height
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)  # antialiased: Pillow widens it with the scale
    return picture.tobytes()


def _to_mode(picture: Image.Image, mode: str) -> Image.Image:
    """Grey ("L") or "RGB", whatever the image was: 1 to 16 bits, palette, CMYK, transparent."""
    if picture.mode.startswith("I"):  # 16 bits: convert() would cut off at 255 instead of scaling
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        black = Image.new("RGBA", coloured.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, coloured)
    if picture.mode not in ("1", "L", mode):
        picture = picture.convert("RGB")  # Pillow makes grey out of palettes and CMYK only by this way
    return picture if picture.mode == mode else picture.convert(mode)


def _reason(error: BaseException) -> str:
    """One line, without what Pillow says of our own buffers."""
    text = " ".join(str(error).split())
    return "it is corrupt" if not text or "BytesIO" in text else text[:120]
