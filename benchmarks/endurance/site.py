"""What is put under load: our archive in two workers behind TorchServe, a Redis that they share, all on its own."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.serving.torchserve import CONFIG, MODEL
from handler.settings import CacheSettings, HandlerSettings
from serving import archive, server
from serving.archive import ServeSettings
from serving.instance import Instance, beside, free_port
from tests.handler.redis_server import RedisServer

WORKERS = 2
PATH = f"/predictions/{MODEL}"
REDIS_MEMORY = "8mb"  # some 10,000 answers, as many as a worker keeps


@dataclass(frozen=True)
class Site:
    """The running pair, and what can be seen of the workers from outside."""

    instance: Instance
    redis: RedisServer

    @property
    def port(self) -> int:
        """Where clients ask."""
        return self.instance.ports()[0]

    def pids(self) -> list[int]:
        """The workers that TorchServe knows."""
        return sorted(worker.pid for worker in self.instance.management().describe(MODEL).workers)

    def complaints(self) -> list[str]:
        """Tracebacks and errors in the workers' log."""
        lines = (self.instance.home / "model_log.log").read_text(errors="replace").splitlines()
        return [line for line in lines if "Traceback" in line or "[ERROR" in line]


@contextmanager
def serving(bundle: Path) -> Iterator[Site]:
    """Started, every worker READY; stopped at the end, and nothing of it left."""
    with tempfile.TemporaryDirectory(prefix="load", ignore_cleanup_errors=True) as name, RedisServer() as redis:
        redis.admin.config_set("maxmemory", REDIS_MEMORY)
        redis.admin.config_set("maxmemory-policy", "allkeys-lru")
        folder = Path(name)
        own = HandlerSettings(engine="onnx", cache=CacheSettings(redis_url=redis.url))
        settings = ServeSettings(min_workers=WORKERS, max_workers=WORKERS, handler=own)
        packed = archive.pack(bundle, folder / "store", name=MODEL, settings=settings)
        instance = beside(CONFIG, free_port(), folder)
        server.start(instance, packed.path, config=CONFIG, tokens=False)
        try:
            yield Site(instance, redis)
        finally:
            server.stop(instance, 0)


def resident(pids: list[int]) -> dict[int, int]:
    """The memory of each worker in bytes; of those that are gone nothing."""
    return {pid: psutil.Process(pid).memory_info().rss for pid in pids if psutil.pid_exists(pid)}
