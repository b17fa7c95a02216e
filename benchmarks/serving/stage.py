"""Where one contestant stands: its student, its port, its folders, its environment."""

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.environments import PEERS, ROOT


@dataclass(frozen=True)
class Stage:
    """What a contestant is started with; `folder` is empty and its own, `store` keeps archives for the next time."""

    bundle: Path
    runtime: str
    port: int
    folder: Path
    store: Path
    environments: Path
    workers: int

    @property
    def log(self) -> Path:
        """What the server prints."""
        return self.folder / "console.log"

    def environ(self, **more: str) -> dict[str, str]:
        """The environment of a server's process: ours, one thread a worker, and where the student is."""
        own = {
            "BUNDLE": str(self.bundle), "RUNTIME": self.runtime, "PORT": str(self.port), "WORKERS": str(self.workers),
            "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(PEERS), str(ROOT)]),
        }  # fmt: skip
        return {**os.environ, **own, **more}
