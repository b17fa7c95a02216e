"""How fast does a student learn: from labels alone, from the bank, from a live teacher, and with torchdistill?

    python benchmarks/training_speed.py --out benchmarks/results/training_speed.json

Same images, batch size, teacher and student for all, on the CPU; ours through `python -m training`, torchdistill in
an environment of its own that is made first (some GB, once). In each repetition they run one after the other, each
with all cores; ratios are of runs of the same repetition. The first epoch of each run warms up and does not count.
Weights are random: speed does not depend on them. Nothing else should run meanwhile. Exit status 1 when a ratio
that has a bound misses it. About eight minutes on two cores.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine
from handler.errors import DistilleryError
from handler.networks import build
from training import data
from training.reading import read_experiment

PEER = ROOT / "benchmarks" / "peers" / "torchdistill"
PINNED = (PEER / "requirements.txt").read_text().split()[-1]
BATCH = 128
LIMIT_S = 900  # of one child process; installing takes the longest
OWN = ("plain", "bank", "live")
RATIOS: dict[str, tuple[str, str, str, float | None]] = {
    # name: numerator and denominator of images/s, and the bound that the median must keep
    "epoch_s_bank_over_plain": ("plain", "bank", "at most", 1.1),
    "images_per_s_live_over_torchdistill": ("live", "torchdistill", "at least", 2.0),
    "images_per_s_bank_over_torchdistill": ("bank", "torchdistill", "at least", 2.0),
    "images_per_s_live_over_torchdistill_tuned": ("live", "torchdistill_tuned", "", None),
    "images_per_s_bank_over_torchdistill_tuned": ("bank", "torchdistill_tuned", "", None),
}
FAIRNESS = [
    "torchdistill: its DistillationBox, KDLoss and YAML as in its CIFAR-10 sample; num_workers: the faster of 0 and 2",
    "torchdistill: logging, loss.item() and validation of its example script are left out; workers persist",
    "torchdistill: its teacher is put into eval mode; our first layer (normalisation) is taken out of its networks",
    "torchdistill_tuned adds what its box has no setting for: a bfloat16 teacher (it has float32) and channels-last",
    "torchdistill 1.1.5 stores no teacher logits, so our bank is compared with its live teacher",
    "ours: teacher in bfloat16, student in float32; bank_build_s is paid once and is not in the epochs",
]


def child(command: list[str], folder: Path, what: str) -> str:
    """Run a command to its end and return what it printed; DistilleryError with its last words when it fails."""
    ours = ("DISTILLERY__", "DIST_", "BATCH_SIZE", "PYTHONPATH")  # would change what is compared
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    try:
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DistilleryError(f"{what}: {' '.join(str(error).split())[:200]}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise DistilleryError(f"{what}: {lines[-1].strip()}")
    return done.stdout


def environment(folder: Path) -> Path:
    """The Python of an environment with torchdistill and our version of torch, made in `folder` where it is not."""
    python = folder / "bin" / "python"
    wanted = [PINNED, *(f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision", "numpy"))]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    try:
        there = {line.partition("+")[0] for line in child([*pip, "freeze"], ROOT, "pip").splitlines()}
    except DistilleryError:
        there = set()
    if not there.issuperset(wanted):
        print(f"installing {' '.join(wanted)} into {folder}", file=sys.stderr)
        child([sys.executable, "-m", "venv", str(folder)], ROOT, f"{PINNED}: no environment in {folder}")
        child([*pip, "install", "--quiet", *wanted], ROOT, f"{PINNED}: cannot be installed into {folder}")
    return python


class Bench:
    """One run of the comparison: `images` training images, `epochs` a run, files in `folder`."""

    def __init__(self, folder: Path, python: Path, images: int, epochs: int) -> None:
        self.folder, self.python, self.epochs = folder, python, epochs
        self.file = folder / "speed.yaml"
        torch.save(build("residual", channels=1, size=(28, 28), classes=10).state_dict(), folder / "teacher.pt")
        settings = {
            "name": "plain",
            "device": "cpu",
            "baseline": True,
            "data": {"train_limit": images, "test_limit": BATCH, "validation": 500},
            "views": {"shift": 1, "flip": True},
            "teacher": {"network": "residual", "weights": str(folder / "teacher.pt"), "precision": "bfloat16"},
            "student": {"network": "separable", "epochs": epochs, "batch_size": BATCH},
            "objective": {"temperature": 4.0, "alpha": 0.9},
        }
        self.file.write_text(yaml.safe_dump(settings))

    def write_images(self) -> None:
        """The images of our experiment as the files that torchvision's FashionMNIST reads."""
        found = data.load(read_experiment(self.file, [], {}).data)
        raw = self.folder / "data" / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, split in (("train", found.train), ("t10k", found.test)):
            images, labels = split.images[:, 0].numpy(), split.labels.numpy().astype(np.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                header = np.array([0x800 + array.ndim, *array.shape], ">i4")
                (raw / f"{name}-{kind}-ubyte").write_bytes(header.tobytes() + array.tobytes())

    def train(self, stage: str, name: str, *settings: str) -> float:
        """One of our commands in the run `name`; its seconds, start of the process included."""
        flags = [f"name={name}", f"bank={str(name == 'bank').lower()}", *settings, "--runs", str(self.folder / "runs")]
        start = time.perf_counter()
        child([sys.executable, "-m", "training", stage, str(self.file), *flags], ROOT, f"{name}: {stage}")
        return time.perf_counter() - start

    def own(self, name: str, seed: int) -> float:
        """Images per second of our run `name`; a new seed makes the stage run again."""
        role = "baseline" if name == "plain" else "student"
        self.train(role, name, f"student.seed={seed}")
        lines = (self.folder / "runs" / name / f"{role}.history.jsonl").read_text().splitlines()
        return statistics.median(float(json.loads(line)["images_per_s"]) for line in lines[1:])

    def peer(self, workers: int, tuned: bool, seed: int) -> float:
        """Images per second of torchdistill."""
        flags = ["--workers", str(workers), "--epochs", str(self.epochs), "--seed", str(seed)]
        command = [str(self.python), str(PEER / "driver.py"), *flags, *(["--tuned"] if tuned else [])]
        answer = json.loads(child(command, self.folder, "torchdistill").splitlines()[-1])
        return statistics.median(map(float, answer["images_per_s"][1:]))


def summary(values: list[float], digits: int = 1) -> dict[str, float]:
    """Median, least and greatest."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(figure, digits) for name, figure in figures.items()}


def ratios(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Each of RATIOS over the repetitions; `kept` says whether its median keeps its bound."""
    found: dict[str, Any] = {}
    for name, (over, under, sense, bound) in RATIOS.items():
        line: dict[str, Any] = summary([a / b for a, b in zip(speeds[over], speeds[under], strict=True)], 3)
        if bound is not None:
            kept = line["median"] <= bound if sense == "at most" else line["median"] >= bound
            line |= {"wanted": f"{sense} {bound}", "kept": kept}
        found[name] = line
    return found


def measure(bench: Bench, repetitions: int) -> dict[str, Any]:
    """Prepare, find torchdistill's best number of workers, then all of them in turns."""
    bench.write_images()
    # Both commands start a process, read the data and copy the teacher: what is left is the bank.
    start_s = bench.train("prepare", "live")
    build_s = bench.train("prepare", "bank") - start_s
    trials = {tuned: {n: bench.peer(n, tuned, 0) for n in (0, 2)} for tuned in (False, True)}
    best = {tuned: max(found, key=found.__getitem__) for tuned, found in trials.items()}
    speeds: dict[str, list[float]] = {name: [] for name in (*OWN, "torchdistill", "torchdistill_tuned")}
    for seed in range(1, repetitions + 1):
        for name in OWN:
            speeds[name].append(bench.own(name, seed))
        for name, tuned in (("torchdistill", False), ("torchdistill_tuned", True)):
            speeds[name].append(bench.peer(best[tuned], tuned, seed))
        print(f"{seed}/{repetitions}", *(f"{k} {v[-1]:,.0f}" for k, v in speeds.items()), "images/s", file=sys.stderr)
    return {
        "ratios": ratios(speeds),
        "images_per_s": {name: summary(values) for name, values in speeds.items()},
        "bank_build_s": round(build_s, 1),
        "torchdistill_workers": {
            ("tuned" if tuned else "as_it_is"): {
                "images_per_s": {n: round(v, 1) for n, v in found.items()},
                "taken": best[tuned],
            }
            for tuned, found in trials.items()
        },
    }


def main() -> int:
    """Install, measure, print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6400, help="training images, at least one batch of 128")
    parser.add_argument("--epochs", type=int, default=3, help="of each run, at least 2; the first does not count")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "distillery" / "torchdistill")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.images < BATCH or options.epochs < 2 or options.repetitions < 1:
        parser.error(f"expected --images of at least {BATCH}, --epochs of at least 2, --repetitions of at least 1")
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchdistill": PINNED.partition("==")[2],
        },
        "settings": {"images": options.images, "batch_size": BATCH, "epochs": options.epochs, "views": 18},
        "repetitions": options.repetitions,
        "fairness": FAIRNESS,
    }
    try:
        python = environment(options.environment.absolute())
        with TemporaryDirectory(prefix="training_speed_") as folder:
            result |= measure(Bench(Path(folder), python, options.images, options.epochs), options.repetitions)
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return int(not all(line.get("kept", True) for line in result["ratios"].values()))


if __name__ == "__main__":
    sys.exit(main())
