"""Does a GPU pay? Images a second of a student, in each engine and precision, by batch size, on CPU and GPU.

    python benchmarks/gpu_throughput.py --bundle runs/full/bundle --out benchmarks/results/gpu_throughput.json

Models are loaded and asked as a worker does it, copies to and from the GPU included, with all cores on the CPU. At
each batch size they take turns. An engine that cannot be loaded here, or whose golden images differ, is left out and
named. Without a GPU it measures the CPU alone, and says so. Nothing else should run meanwhile.
"""

import argparse
import functools
import json
import os
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import machine
from handler.bundle import FILES, verify
from handler.contract import Contract
from handler.engines import ENGINES
from handler.errors import DistilleryError
from handler.model import Student, load_model, replay
from handler.settings import HandlerSettings, load
from training.evaluate import latency_ms

Key = tuple[str, str, str]
"""Device, engine and precision."""


def models(bundle: Path, contract: Contract, largest: int) -> tuple[dict[Key, Student], dict[str, str]]:
    """All that can be loaded here and answers as it should; and why the others cannot."""
    found: dict[Key, Student] = {}
    left_out: dict[str, str] = {}
    for kind, gpu_id in {"cpu": None, **({"cuda": 0} if torch.cuda.is_available() else {})}.items():
        for name, engine in ENGINES.items():
            if kind not in engine.devices or not (bundle / engine.file).is_file():
                continue
            for precision in engine.precisions:
                wishes = {"engine": name, "precision": precision, "micro_batch": largest}
                settings = load(HandlerSettings, wishes)
                try:
                    model, _ = load_model(bundle, contract, settings, os.cpu_count() or 1, gpu_id, largest)
                    replay(model, bundle / FILES.golden, [1])
                    found[kind, name, precision] = model
                except DistilleryError as error:
                    left_out[f"{kind} {name} {precision}"] = str(error)
    return found, left_out


def measure(
    found: dict[Key, Student], contract: Contract, batches: list[int], repetitions: int, seconds: float
) -> list[dict[str, Any]]:
    """A row for each model and batch size, of medians; the images are noise, which takes as long as any others."""
    images = np.random.default_rng(0).integers(0, 256, (batches[-1], *contract.shape), np.uint8)
    rows = []
    for batch in batches:
        calls = {key: functools.partial(model.predict, images[:batch]) for key, model in found.items()}
        for (device, engine, precision), ms in latency_ms(calls, repetitions, seconds).items():
            row = {"device": device, "engine": engine, "precision": precision, "batch": batch}
            rows.append(row | {"images_per_s": round(1000 * batch / ms["p50"], 1), "latency_ms": ms})
        print(f"batch {batch} done", file=sys.stderr)
    return rows


def gains(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By batch size: the best of the GPU over the best of the CPU; nothing where there is no GPU."""
    best: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        best[row["batch"]][row["device"]] = max(best[row["batch"]].get(row["device"], 0.0), row["images_per_s"])
    return {str(batch): round(on["cuda"] / on["cpu"], 2) for batch, on in best.items() if "cuda" in on}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("runs/full/bundle"))
    parser.add_argument("--batches", type=int, nargs="+", default=[2**i for i in range(10)])
    parser.add_argument("--repetitions", type=int, default=7, help="rounds at each batch size, at least 5")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each model at each batch size")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.repetitions < 5 or min(options.batches) < 1:
        parser.error("expected --repetitions of at least 5, and --batches of at least 1")
    try:
        digest, contract = verify(options.bundle)["digest"], Contract.read(options.bundle / FILES.contract)
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    here, batches = machine(), sorted(options.batches)
    found, left_out = models(options.bundle, contract, batches[-1])
    rows = measure(found, contract, batches, options.repetitions, options.seconds)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "bundle": digest,
        "machine": {**here, "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None},
        "torch": torch.__version__,
        "left_out": left_out,
        "images_per_s_gpu_over_cpu": gains(rows),
        "rows": rows,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if not torch.cuda.is_available():
        print("no GPU here: the CPU alone was measured", file=sys.stderr)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
