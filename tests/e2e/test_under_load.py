"""Several archives, two workers and a Redis, all real, asked many times at once: never another's answer."""

import contextlib
import functools
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import PngImagePlugin

from benchmarks.endurance.faults import FAULTS, used_again
from handler.codecs import image
from handler.contract import Contract, probabilities
from handler.settings import CacheSettings, HandlerSettings, LimitSettings
from serving import archive
from serving.archive import ServeSettings
from serving.instance import Instance
from tests.bundles import SERVED, blocks, random_bundle, random_source
from tests.e2e.conftest import clear, make_site, post, until
from tests.handler.payloads import RAW, png
from tests.handler.redis_server import RedisServer, started
from training.export import Source

pytestmark = pytest.mark.e2e
GRID = blocks(64)[:, 0].numpy()
OTHER_SHAPE = 14, 56  # as many pixels
BACK_S = 10.0
Told = tuple[bytes, requests.Response]
"""A body and what it was answered."""


@dataclass(frozen=True)
class Stand:
    """A server with two workers of student 1.0; student 2.0 and the teacher lie in its model store."""

    instance: Instance
    redis: RedisServer
    sources: dict[str, Source]

    def ask(self, body: bytes, kind: str = RAW, model: str = "student") -> requests.Response:
        return post(self.instance, body, kind, f"predictions/{model}")

    def at_once(self, bodies: Sequence[bytes], model: str = "student", kind: str = RAW) -> list[requests.Response]:
        """All of them sent at one moment, each over a connection of its own."""
        begin = threading.Barrier(len(bodies))

        def one(body: bytes) -> requests.Response:
            begin.wait()
            return self.ask(body, kind, model)

        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(one, bodies))

    def counted(self, name: str, model: str = "student") -> float:
        """A metric, over all its labels and workers."""
        text = requests.get(f"http://127.0.0.1:{self.instance.ports()[2]}/metrics", timeout=5).text
        values = re.findall(rf'(?m)^distillery_{name}\{{[^}}]*ModelName="{model}"[^}}]*\}} (\S+)$', text)
        return sum(map(float, values))

    def asked(self, model: str) -> float:
        """How many requests have been looked up: the last of a batch's figures to be seen."""
        return self.counted("cache_hits_total", model) + self.counted("cache_misses_total", model)

    def computing(self, bodies: Sequence[bytes], model: str) -> tuple[list[requests.Response], float]:
        """The answers to all of them at once, and how many images the model classified for them."""
        computed, asked = self.counted("predictions_total", model), self.asked(model)
        answers = self.at_once(bodies, model)
        until(lambda: self.asked(model) == asked + len(bodies), "all of them counted")
        return answers, self.counted("predictions_total", model) - computed

    def manage(self, verb: str, path: str, **query: Any) -> None:
        management = self.instance.management()
        answer = management._session.request(verb, f"{management.url}/{path}", params=query, timeout=90)
        assert answer.ok, answer.text

    def judge(self, answer: requests.Response, pixels: bytes) -> str:
        """The digest that stands in an answer, whose prediction must be that of the network with this digest."""
        assert answer.status_code == 200, answer.text
        found = answer.json()
        digest: str = found["model"]["digest"]
        np.testing.assert_allclose(found["prediction"][0], expected(self.sources[digest], pixels), atol=1e-4)
        return digest


@functools.lru_cache(4096)
def expected(source: Source, pixels: bytes) -> Any:
    with torch.no_grad():
        return probabilities(source.network(torch.tensor(image.raw(pixels, source.contract).copy())).numpy())[0]


def store(folder: Path, name: str, version: str, workers: int, redis: RedisServer, source: Source) -> archive.Archive:
    """An archive in its reference engine, for so many workers that share their answers."""
    cache = CacheSettings(redis_url=redis.url)
    own = HandlerSettings(engine="eager", cache=cache)
    settings = ServeSettings(min_workers=workers, max_workers=workers, handler=own)
    bundle = random_bundle(folder / f"{name}-{version}", source, engines=())
    return archive.pack(bundle, folder / f"store-{version}", name=name, version=version, settings=settings)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    yield from started()


@pytest.fixture(scope="module")
def stand(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("archives")
    made = {("student", "1.0", 2): random_source(0), ("student", "2.0", 1): random_source(1)}
    made[("teacher", "1.0", 1)] = random_source(2, OTHER_SHAPE)
    archives = {kind: store(folder, *kind, redis, source) for kind, source in made.items()}
    site = make_site(archives["student", "1.0", 2].path)
    shutil.copy(archives["student", "2.0", 1].path, site.folder / "model_store" / "second.mar")
    shutil.copy(archives["teacher", "1.0", 1].path, site.folder / "model_store" / "teacher.mar")
    config = site.folder / "config.properties"
    config.write_text(config.read_text().replace("enable_model_api=false", "enable_model_api=true"))
    try:
        began = site.serving("start")
        assert began.status == 0, began.error
        yield Stand(site.instance(), redis, {archives[kind].digest: source for kind, source in made.items()})
        assert site.serving("stop").status == 0
    finally:
        clear(site)


@pytest.fixture(scope="module")
def teacher(stand: Stand) -> str:
    """The teacher, with one worker, beside the student."""
    stand.manage("POST", "models", url="teacher.mar", initial_workers=1, synchronous="true")
    return "teacher"


def fresh(count: int) -> list[bytes]:
    """Images that nobody has sent."""
    return [np.random.default_rng().integers(256, size=784, dtype=np.uint8).tobytes() for _ in range(count)]


@contextlib.contextmanager
def asking(stand: Stand, body: Callable[[], bytes]) -> Iterator[list[Told]]:
    """Four clients who ask until the end, and what they were told so far."""
    told: list[Told] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set() and len(told) < 20_000:
            asked = body()
            told.append((asked, stand.ask(asked)))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            yield told
        finally:
            over.set()
    for one in clients:
        one.result()


def more(told: list[Told], count: int) -> None:
    """Returns when so many more have been told something."""
    enough = len(told) + count
    until(lambda: len(told) >= enough, f"{count} more answers")


def test_what_any_worker_has_answered_is_a_hit_on_all(stand: Stand) -> None:
    """TorchServe gives the workers requests in turn: of two in a row that are the same each gets one."""
    bodies, before = fresh(20), stand.counted("cache_shared_hits_total")
    for body in bodies:
        first, *others = (stand.ask(body) for _ in range(3))
        stand.judge(first, body)
        assert first.headers["X-Cache"] == "MISS"
        for other in others:
            assert other.headers["X-Cache"] == "HIT"
            assert other.content == first.content.replace(b'"model"', b'"cache"', 1)
    until(lambda: stand.counted("cache_shared_hits_total") > before, "hits on the worker that had not computed")


@pytest.mark.parametrize(("model", "most"), [("student", 2), ("teacher", 1)])
def test_requests_that_are_the_same_at_once_are_computed_once_a_worker(
    stand: Stand, teacher: str, model: str, most: int
) -> None:
    for body in fresh(5):
        answers, computed = stand.computing([body] * 32, model)
        assert len({stand.judge(answer, body) for answer in answers}) == 1
        assert 1 <= computed <= most


def test_a_corrupt_image_is_never_kept_and_changes_no_neighbour(stand: Stand) -> None:
    """Alone and in company, again and again; the corrupt ones are the good ones, cut off."""
    bodies = [png(pixels) for pixels in GRID[:8]]
    corrupt = [body[:-40] for body in bodies]
    for _ in range(3):
        answers = stand.at_once([*bodies, *corrupt, *bodies], kind="image/png")
        assert [answer.status_code for answer in answers] == [200] * 8 + [400] * 8 + [200] * 8
        for pixels, one, bad, other in zip(GRID, answers[:8], answers[8:16], answers[16:], strict=False):
            stand.judge(one, pixels.tobytes())
            stand.judge(other, pixels.tobytes())
            assert bad.json()["code"] == "bad_image" and "X-Cache" not in bad.headers


def test_of_two_archives_each_gives_its_own_answer(stand: Stand, teacher: str) -> None:
    """The same bytes, at once and again; to the teacher they are an image of another shape."""
    bodies = [pixels.tobytes() for pixels in GRID[:12]]
    digests: dict[str, set[str]] = {"student": set(), teacher: set()}
    for _ in range(2):
        for model, found in digests.items():
            for body, answer in zip(bodies, stand.at_once(bodies, model), strict=True):
                found.add(stand.judge(answer, body))
    assert [len(found) for found in digests.values()] == [1, 1] and not set.intersection(*digests.values())


def sized(pixels: Any, size: int) -> bytes:
    """A PNG of exactly so many bytes."""
    text = PngImagePlugin.PngInfo()
    text.add_text("x", "")
    missing = size - len(png(pixels, pnginfo=text))
    text = PngImagePlugin.PngInfo()
    text.add_text("x", "x" * missing)
    return png(pixels, pnginfo=text)


def test_the_same_bytes_as_another_kind_are_another_request(stand: Stand, teacher: str) -> None:
    """784 bytes that are a PNG: an image to those who say so, raw pixels to those who say that."""
    pixels = GRID[20]
    body = sized(pixels, pixels.size)
    shapes: dict[str, Contract] = {"student": SERVED, teacher: random_source(2, OTHER_SHAPE).contract}
    for _ in range(2):
        for model, contract in shapes.items():
            decoded, _ = image.decode(body, contract, LimitSettings().pixels)
            stand.judge(stand.ask(body, RAW, model), body)
            stand.judge(stand.ask(body, "image/png", model), decoded)


@pytest.mark.parametrize("name", FAULTS)
def test_no_client_notices_what_becomes_of_redis(stand: Stand, name: str) -> None:
    begin, end = FAULTS[name]
    failed = stand.counted("redis_errors_total")
    with asking(stand, lambda: fresh(1)[0]) as told:
        more(told, 20)
        begin(stand.redis)
        until(lambda: stand.counted("redis_errors_total") > failed, "a worker has felt it")
        end(stand.redis)
        until(used_again(stand.redis, 2), "both workers use it again", BACK_S)
    for body, answer in told:
        stand.judge(answer, body)


def test_a_new_version_never_gives_an_old_answer(stand: Stand) -> None:
    """Registered and made the default while clients ask for what caches and Redis have of the old one."""
    bodies = [pixels.tobytes() for pixels in GRID]
    turn = cycle(bodies)
    with asking(stand, lambda: next(turn)) as told:
        more(told, 200)
        stand.manage("POST", "models", url="second.mar", initial_workers=1, synchronous="true")
        more(told, 100)
        stand.manage("PUT", "models/student/2.0/set-default")
        more(told, 300)
    digests = [stand.judge(answer, body) for body, answer in told]
    assert digests[0] != digests[-1] and set(digests[-200:]) == {digests[-1]}
    for version, digest in (("1.0", digests[0]), ("2.0", digests[-1])):
        for body in bodies[:9]:
            assert stand.judge(stand.ask(body, model=f"student/{version}"), body) == digest
