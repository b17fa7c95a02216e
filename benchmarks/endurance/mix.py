"""What is sent: every form of a body that there is, fresh ones and repeats, and some that must be refused.

The images are the bundle's golden ones, each copy with a number of its own in the corner; the right answers are the
bundle's network's, asked in this process.
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from urllib3.filepost import encode_multipart_formdata

from benchmarks.endurance.site import PATH
from benchmarks.serving import payloads
from benchmarks.serving.payloads import Pixels
from handler import codecs, forms
from handler.bundle import FILES
from handler.contract import Contract, probabilities
from handler.engines import ENGINES, Setup
from handler.settings import LimitSettings
from serving import driver
from serving.driver import Drive
from tests.handler.payloads import huge_png

JSON, RAW = "application/json", "application/octet-stream"
BOUNDARY = "between the parts"
FORM = f'multipart/form-data; boundary="{BOUNDARY}"'
NEAR = 1e-4  # of probabilities: so far may one batch size be from another
POPULAR = 1000  # bodies that come again and again
BAD_SHARE = 0.02
TRACE = 200_000  # requests, after which the order begins again
Body = tuple[str | None, bytes]


def _jpeg(image: Pixels) -> bytes:
    stream = BytesIO()
    Image.fromarray(image.squeeze()).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def _instances(instance: Any) -> bytes:
    return json.dumps({"instances": [instance]}).encode()


def _form(name: str, png: bytes) -> bytes:
    return encode_multipart_formdata({name: ("image.png", png, "image/png")}, BOUNDARY)[0]


FORMS: tuple[Callable[[Pixels], Body], ...] = (
    lambda image: (RAW, image.tobytes()),
    lambda image: ("image/png", payloads.png(image)),
    lambda image: (None, payloads.png(image)),
    lambda image: ("image/jpeg", _jpeg(image)),
    lambda image: (JSON, payloads.features(image)),
    lambda image: (JSON, _instances(image.tolist())),
    lambda image: (JSON, _instances({"b64": base64.b64encode(image.tobytes()).decode()})),
    lambda image: (FORM, _form("data", payloads.png(image))),
)


def bad(image: Pixels) -> list[Body]:
    """One of each kind that docs/wire.md refuses, made of a good image."""
    numbers, png = [0] * image.size, payloads.png(image)

    def row(*values: Any) -> Body:
        return JSON, json.dumps({"features": [*numbers[len(values) :], *values]}).encode()

    return [
        (None, b""), (JSON, b'{"features": ['), (JSON, b'"\xff"'), (JSON, b"[" * 10_000), (RAW, image.tobytes()[1:]),
        (JSON, _instances({"b64": "?"})), (JSON, json.dumps({"features": numbers[1:]}).encode()), row("0"),
        row(float("nan")), row(256), row(-1), (JSON, row(0)[1].replace(b"0]", b"1e400]")),
        ("image/png", png[: len(png) // 2]), ("image/jpeg", _jpeg(image)[:-99]), ("image/png", huge_png(4001, 4000)),
        ("text/plain", b"hello, student"),
        (JSON, json.dumps({"features": [numbers] * 257}).encode()), ("image/gif", b"GIF89a" + bytes(20)),
        (FORM, _form("image", png)), (FORM, _form("data", png)[:-9]),
    ]  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """`requests` whole; `scores` `[N, K]` of the answers, with NaN for who must be refused; the `order` they go in."""

    requests: list[bytes]
    scores: NDArray[np.float64]
    order: NDArray[np.int64]

    @cached_property
    def refused(self) -> NDArray[np.bool_]:
        """Which of the requests must be."""
        return np.asarray(np.isnan(self.scores[:, 0]))

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The two files that mixed.lua reads."""
        whole, order = folder / "requests", folder / "order"
        payloads.write(self.requests, whole)
        order.write_text("".join(f"{place}\n" for place in self.order))
        return whole, order

    def to_refuse(self, begin: int, count: int) -> int:
        """How many of `count` requests from `begin` on must be."""
        return int(self.refused[self.order[(begin + np.arange(count)) % len(self.order)]].sum())

    def wrong(self, found: Drive, places: Sequence[int]) -> int:
        """How many of the answers are not what they must be."""
        return sum(
            not self.right(int(status), body, place)
            for status, body, place in zip(found.status, found.bodies, places, strict=True)
        )

    def right(self, status: int, body: bytes, place: int) -> bool:
        """Whether that is what the request at a place must be answered."""
        if self.refused[place] or status != 200:
            return bool(self.refused[place]) and 400 <= status < 500
        found = json.loads(body)
        scores = (found.get("prediction") or found["predictions"])[0]
        return bool(np.abs(np.array(scores) - self.scores[place]).max() < NEAR)


def made(bundle: Path, distinct: int, *, bad_share: float = BAD_SHARE, seed: int = 0) -> Mix:
    """So many different good bodies: half of the requests walk through them, the other half repeat the popular ones.

    An answer that the walk left behind in the caches has gone when the walk comes again, if `distinct` is well above
    what they hold: 10,000 in each worker. One in twenty bodies goes around the cache.
    """
    contract = Contract.read(bundle / FILES.contract)
    images = _images(bundle, distinct)
    good = [FORMS[i % len(FORMS)](image) for i, image in enumerate(images)]
    worse = bad(images[0])
    control = {0: {"Cache-Control": "no-cache"}, 20: {"Cache-Control": "no-store"}}
    requests = [driver.request(PATH, *body, **control.get(i % 40, {})) for i, body in enumerate(good)]
    requests += [driver.request(PATH, *body) for body in worse]
    scores = np.full((len(requests), len(contract.labels)), np.nan)
    scores[:distinct] = _expected(bundle, contract, good)
    return Mix(requests, scores, _order(distinct, len(worse), bad_share, seed))


def _order(distinct: int, bad: int, bad_share: float, seed: int) -> NDArray[np.int64]:
    random = np.random.default_rng(seed)
    repeats = random.random(TRACE) < 0.5
    order = np.cumsum(~repeats) % distinct
    order[repeats] = payloads.zipf(min(POPULAR, distinct), int(repeats.sum()), 1.0, seed)
    refused = random.random(TRACE) < bad_share
    order[refused] = distinct + random.integers(bad, size=int(refused.sum()))
    return order


def _images(bundle: Path, count: int) -> Pixels:
    with np.load(bundle / FILES.golden) as file:
        golden = file["images"]
    return payloads.numbered(np.tile(golden, (-(-count // len(golden)), 1, 1, 1))[:count])


def _expected(bundle: Path, contract: Contract, good: list[Body]) -> NDArray[np.float64]:
    model = ENGINES["onnx"].load(bundle / FILES.onnx, Setup(contract))
    limits, found = LimitSettings(), []
    for start in range(0, len(good), 64):
        bodies = [_within(*body) for body in good[start : start + 64]]
        kinds = [(codecs.kind_of(body, kind or "", contract), body) for kind, body in bodies]
        items = [codecs.decode(kind, body, contract, limits) for kind, body in kinds]
        found.append(probabilities(np.asarray(model(codecs.stacked(items, contract)))))
    return np.concatenate(found)


def _within(kind: str | None, body: bytes) -> Body:
    """What a form holds; any other body is as it is."""
    return forms.parts(body, BOUNDARY)[0][1:] if kind == FORM else (kind, body)
