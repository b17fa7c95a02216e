"""Bodies as clients send them."""

import base64
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Golden = dict[str, Any]  # name → array, of golden.npz
JSON = "application/json"
RAW = "application/octet-stream"


def png(image: Any, **options: Any) -> bytes:
    """PNG of an array or of a Pillow image."""
    return encoded(image, "PNG", **options)


def jpeg(image: Any, **options: Any) -> bytes:
    return encoded(image, "JPEG", **{"quality": 95, **options})


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(stream, kind, **options)
    return stream.getvalue()


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def features(image: Pixels) -> bytes:
    return dumps({"features": image.ravel().tolist()})


def b64(payload: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(payload).decode()}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png(width: int, height: int) -> bytes:
    """A whole, valid PNG of 1-bit black: a few kilobytes on the wire, width × height pixels in memory."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    content = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
