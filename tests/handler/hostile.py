"""Bodies that nobody means well with: good ones with bytes changed, and forms that nobody reads. One a seed."""

import base64
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from tests.handler.payloads import JSON, RAW, chunk, encoded

Hostile = tuple[bytes, str | None]
"""A body and its Content-Type."""
TYPES = (None, "", JSON, RAW, "image/png", "image/jpeg", "text/plain", "x" * 300)
FORMS = "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "multipart/form-data"
"""What TorchServe itself takes apart, unless it is kept from it."""
BOMB = zlib.compress(bytes(1 << 20), 9)
EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
NASTY = (
    "null", "true", '"0"', '"\\ud800"', "-1", "256", "1e400", "-1e-400", "NaN", "-Infinity", "1" * 5000, "0.5", "{}",
    "[]", "[[]]", '{"b64":0}', '{"b64":"?"}', '{"features":[]}', '"' + "\\u0000" * 50 + '"', "[" * 300 + "]" * 300, "",
)  # fmt: skip


@cache
def _images() -> tuple[bytes, ...]:
    """PNG and JPEG of every mode."""
    grey = Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28))
    deep = Image.fromarray((np.arange(784, dtype=np.uint16) * 80).reshape(28, 28))
    found = [encoded(grey.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    found += [encoded(deep, "PNG"), encoded(grey.resize((61, 47)), "PNG")]
    found += [encoded(grey.convert("P"), "PNG", transparency=3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    found += [encoded(grey.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")]
    return (*found, encoded(grey.convert("RGB").resize((61, 47)), "JPEG", progressive=True, exif=exif.tobytes()))


def hostile(seed: int) -> Hostile:
    """The body of a seed; most are refused, some are good after all."""
    random = Random(seed)
    body, content_type = random.choice(KINDS)(random)
    return body, random.choice((*TYPES, *FORMS)) if random.random() < 0.15 else content_type


def _anything(random: Random) -> Hostile:
    return random.randbytes(random.choice((0, 1, 8, 783, 784, 785, 5000))), random.choice(TYPES)


def _broken_image(random: Random) -> Hostile:
    body = random.choice(_images())
    return _changed(body, random), "image/png" if body[:1] == b"\x89" else "image/jpeg"


def _false_png(random: Random) -> Hostile:
    """Every checksum is right: what is wrong lies deeper."""
    source = random.choice([body for body in _images() if body[:1] == b"\x89"])
    pieces, at = [], 8
    while at < len(source):
        (length,) = struct.unpack_from(">I", source, at)
        kind, content = source[at + 4 : at + 8], source[at + 8 : at + 8 + length]
        at += 12 + length
        if random.random() < 0.4:
            content = _deflated(content, random) if kind == b"IDAT" else _changed(content, random)
        pieces += [chunk(kind, content)] * random.choice((1, 1, 1, 1, 0, 2))
    pieces.insert(random.randrange(len(pieces) + 1), _odd_chunk(random))
    return source[:8] + b"".join(pieces), "image/png"


def _odd_chunk(random: Random) -> bytes:
    return random.choice((
        b"", chunk(b"zTXt", b"a\0\0" + BOMB), chunk(b"iCCP", b"a\0\0" + BOMB), chunk(b"tRNS", random.randbytes(7)),
        chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB), chunk(b"eXIf", random.randbytes(40)), chunk(b"acTL", bytes(8)),
        chunk(b"PLTE", random.randbytes(5)), struct.pack(">I", random.choice(EXTREME)) + b"IDAT",
    ))  # fmt: skip


def _deflated(content: bytes, random: Random) -> bytes:
    """Rows of other bytes, or of another number."""
    return zlib.compress(_changed(zlib.decompress(content), random))


def _large_image(random: Random) -> Hostile:
    """About as many pixels as are allowed, or many more, in a few bytes."""
    width, height = random.choice(((1, 65_000), (65_000, 1), (3000, 2000), (4001, 4000), (0, 28)))
    header = struct.pack(">IIBBBBB", width, height, 1, random.choice((0, 0, 3)), 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""), "image/png"


def _false_json(random: Random) -> Hostile:
    """Whole JSON with something that has no place in it."""
    row = [str(random.randrange(256)) for _ in range(random.choice((784, 784, 784, 783, 1, 0)))]
    for _ in range(random.choice((0, 1, 1, 3))):
        row.insert(random.randrange(len(row) + 1), random.choice(NASTY))
        if len(row) > 784:
            row.pop()
    rows = f"[{','.join(row)}]"
    nested = random.choice((rows, f"[{rows}]", f"[{rows},{rows}]", f"[{rows},5]", random.choice(NASTY)))
    key = random.choice(("features", "features", "instances", "inputs", "feature\\u0073", ""))
    body = random.choice((f'{{"{key}":{nested}}}', f'{{"{key}":{nested},"features":1}}', nested)).encode()
    return (body if random.random() < 0.7 else _changed(body, random)), JSON


def _instances(random: Random) -> Hostile:
    """KServe's form around one of the others."""
    inner, _ = random.choice((_broken_image, _false_png, _anything))(random)
    text = base64.b64encode(inner).decode()
    value: Any = {"instances": [{"b64": text}] * random.choice((1, 1, 2, 300))}
    body = json.dumps(value).encode()
    return (body if random.random() < 0.7 else _changed(body, random)), JSON


def _two_in_one(random: Random) -> Hostile:
    """The beginning of one and the end of another."""
    first, second = random.choice(KINDS[:4])(random), random.choice(KINDS[:4])(random)
    at = random.randrange(len(first[0]) + 1)
    return first[0][:at] + second[0][at // 2 :], first[1]


def _multipart(random: Random) -> Hostile:
    """A form around one of the others."""
    inner, kind = random.choice(KINDS[:4])(random)
    named = random.choice((b"data", b"data", b"body", b"image", b""))
    head = b'--x\r\nContent-Disposition: form-data; name="' + named + b'"\r\nContent-Type: ' + (kind or "").encode()
    body = head + b"\r\n\r\n" + inner + b"\r\n--x--\r\n"
    return (body if random.random() < 0.7 else _changed(body, random)), FORMS[1]


KINDS: tuple[Callable[[Random], Hostile], ...] = (
    _broken_image, _false_png, _false_json, _anything, _instances, _broken_image, _false_json, _two_in_one,
    _multipart,
    lambda random: _large_image(random) if random.random() < 0.02 else _false_png(random),
)  # fmt: skip


def _changed(body: bytes, random: Random) -> bytes:
    """With some bytes flipped, set, lost, doubled, cut off or put in."""
    made = bytearray(body)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(made) + 1)
        match random.randrange(7):
            case 0:
                made[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                made[at : at + 1] = bytes(b ^ 1 << random.randrange(8) for b in made[at : at + 1])
            case 2:
                made[at : at + 4] = struct.pack(">I", random.choice(EXTREME))
            case 3:
                del made[at : at + random.randrange(1, 40)]
            case 4:
                made[at:at] = made[at : at + random.randrange(1, 40)]
            case 5:
                made[at:at] = random.randbytes(random.randrange(1, 9))
            case _:
                del made[max(at, len(made) // 2) :]
    return bytes(made)
