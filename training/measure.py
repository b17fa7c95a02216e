"""What a student costs in each engine, as a worker would run it: right answers, bytes, memory, milliseconds.

python -m training.measure ENGINE FILE < contract.json     # resident bytes of a process that answers a batch
"""

import functools
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from handler.contract import Contract
from handler.engines import ENGINES, Forward, Setup
from handler.errors import DistilleryError
from handler.settings import load
from training import evaluate
from training.evaluate import Key

BATCHES = (1, 4, 8, 32, 128)


def answers(forward: Forward, images: Tensor, batch: int = 500) -> Tensor:
    """Logits float32 `[N, K]` of uint8 `[N, C, H, W]`."""
    return torch.from_numpy(np.concatenate([forward(part.numpy()) for part in torch.split(images, batch)]))


def parity(logits: Tensor, eager: Tensor, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """How an engine answers, beside the same network in PyTorch, beside the student, and beside the teacher."""
    return {
        "accuracy": evaluate.accuracy(logits, labels),
        "agreement": evaluate.agreement(logits, teacher),
        "agreement_with_student": evaluate.agreement(logits, student),
        "agreement_with_eager": evaluate.agreement(logits, eager),
        "probability_difference_max": (F.softmax(logits, 1) - F.softmax(eager, 1)).abs().max().item(),
        "ece": evaluate.calibration_error(logits, labels),
    }


def sizes(*paths: Path) -> dict[str, int]:
    """Bytes on disk, and when packed with LZMA."""
    data = b"".join(path.read_bytes() for path in paths)
    return {"size_bytes": len(data), "packed_bytes": min(len(data), len(lzma.compress(data)))}


def latencies(forwards: Mapping[Key, Forward], images: Tensor) -> dict[Key, dict[str, dict[str, float]]]:
    """p50 and p99 in milliseconds by batch size; on one thread of the CPU, all measured in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[Key, dict[str, dict[str, float]]] = {key: {} for key in forwards}
    try:
        for batch in BATCHES:
            part = images[torch.arange(batch) % len(images)].numpy()
            calls = {key: functools.partial(forward, part) for key, forward in forwards.items()}
            for key, figures in evaluate.latency_ms(calls).items():
                found[key][str(batch)] = figures
    finally:
        torch.set_num_threads(threads)
    return found


def resident_bytes(files: Mapping[tuple[str, str], Path], contract: Contract) -> dict[tuple[str, str], int]:
    """Memory of a process that runs an engine and nothing else, after a batch of the largest size, by role and engine.

    As many processes at a time as there are cores; most of their seconds go into starting.
    """

    def measured(engine: str, path: Path) -> int:
        command = [sys.executable, "-m", "training.measure", engine, str(path)]
        done = subprocess.run(command, input=contract.to_json(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise DistilleryError(f"{path}: cannot be measured: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
        return int(done.stdout)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(measured, (engine for _, engine in files), files.values())
        return dict(zip(files, found, strict=True))


def main() -> None:
    """Load an engine, answer a batch, and say how much memory that took."""
    engine, path = sys.argv[1:]
    contract = load(Contract, json.load(sys.stdin))
    torch.set_num_threads(1)
    ENGINES[engine].load(Path(path), Setup(contract))(np.zeros((BATCHES[-1], *contract.shape), np.uint8))
    sys.stdout.write(str(psutil.Process().memory_info().rss))


if __name__ == "__main__":
    main()
