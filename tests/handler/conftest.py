"""A worker per test, over the random archive, and payloads of every kind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import handler
from handler import codecs, student_handler
from handler.contract import Contract
from handler.settings import LimitSettings
from serving import archive as archives
from tests.bundles import LABELS
from tests.handler.payloads import Golden, Pixels
from tests.handler.redis_server import RedisServer, started
from tests.harness import Worker


@pytest.fixture(scope="session")
def root(packed: Path) -> Iterator[Path]:
    """The archive, unpacked as TorchServe does."""
    with archives.unpacked(packed) as folder:
        yield folder


@pytest.fixture
def in_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's code, taken for the archive's: measured by coverage, open to patches."""
    monkeypatch.setattr(handler, "__file__", str(root / "handler" / "__init__.py"))
    monkeypatch.setattr(student_handler, "__file__", str(root / "student_handler.py"))
    return root


@pytest.fixture
def worker(in_place: Path) -> Iterator[Worker]:
    with Worker(in_place, in_place=True) as worker:
        yield worker


@pytest.fixture
def contract() -> Contract:
    return Contract(network="separable", channels=1, height=28, width=28, labels=LABELS)


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings(pixels=1_000_000, rows=4)


@pytest.fixture(scope="session")
def golden(root: Path) -> Golden:
    """Images `[N, H, W, C]`, labels, logits."""
    with np.load(root / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def images(golden: Golden) -> Pixels:
    """Eight test images uint8 `[8, 28, 28]`, each answered differently."""
    return np.asarray(golden["images"][:8, :, :, 0])


@pytest.fixture
def faulty(images: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of ours that fails at the second image."""
    decode = codecs.decode

    def broken(kind: codecs.Kind, payload: bytes, *rest: Any) -> codecs.Item:
        if payload == images[1].tobytes():
            raise RuntimeError("told so")
        return decode(kind, payload, *rest)

    monkeypatch.setattr(codecs, "decode", broken)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may stop, pause and fill."""
    yield from started()


@pytest.fixture(scope="module")
def running_redis() -> Iterator[RedisServer]:
    """One Redis for a module."""
    yield from started()


@pytest.fixture
def redis_server(running_redis: RedisServer) -> RedisServer:
    """A Redis with nothing in it."""
    running_redis.admin.flushall()
    return running_redis
