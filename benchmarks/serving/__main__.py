"""Ours and its peers side by side: the same student, the same images, the same load, in turns.

example: python -m benchmarks.serving --bundle runs/full/bundle --out benchmarks/results/serving/same_runtime.json
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.serving import environments, generator, payloads, render, rounds, summary
from benchmarks.serving.bench import Bench, Point
from benchmarks.serving.contestants import CONTESTANTS
from benchmarks.serving.environments import PEERS
from benchmarks.serving.stage import Stage
from benchmarks.serving.traffic import REPEATS, Traffic
from handler.bundle import FILES, atomic, verify
from handler.contract import Contract
from handler.engines import ENGINES, Setup
from handler.errors import DistilleryError

RUNTIMES = {"same-runtime": "onnx", "as-documented": "torch"}
DEFAULT = (
    "distillery-throughput", "distillery-latency", "mosec", "mosec-latency", "fastapi", "litserve", "bentoml",
    "torchserve-stock", "flask", "torchserve-empty",
)  # fmt: skip
QUICK = 1000  # test images
PACKAGES = ("torch", "onnxruntime", "numpy", "pillow", "torchserve")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 on wrong usage."""
    about, _, example = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser("python -m benchmarks.serving", description=about, epilog=example)
    p.add_argument("--bundle", type=Path, default=Path("runs/full/bundle"), help="the student (default: %(default)s)")
    p.add_argument("--table", choices=RUNTIMES, default="same-runtime", help="ONNX Runtime for all, or PyTorch")
    p.add_argument("--peers", type=_names, default=DEFAULT, metavar="A,B", help=f"all, or of {', '.join(CONTESTANTS)}")
    p.add_argument("--reference", help="whose ratios are shown (default: the first of the peers)")
    p.add_argument("--forms", nargs="+", choices=("raw", "png"), default=["raw"])
    p.add_argument("--traffic", nargs="+", choices=("unique", "zipf", *REPEATS), default=["unique"])
    p.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law (default: %(default)s)")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    p.add_argument("--open", type=float, nargs="*", default=[0.2, 0.5, 0.8], help="shares of the best capacity")
    p.add_argument("--together", action="store_true", help="all up at once, closed loops only: for ratios near 1")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=int, default=3, help="a point (default: %(default)s)")
    p.add_argument("--warm-up", type=int, default=25, help="seconds, after each start (default: %(default)s)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of the peers that take a number")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="one round, one second a point, two points: to see it work")
    p.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "distillery" / "serving")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="FILE.md and charts are written beside it")
    found = p.parse_args(arguments)
    found.reference = found.reference or found.peers[0]
    if found.quick:
        found.rounds, found.seconds, found.warm_up, found.clients = 1, 1, 0, [1, 32]
    found.open = [] if found.together else found.open
    if min(found.rounds, found.seconds, found.workers, *found.clients) < 1 or found.warm_up < 0:
        p.error("expected --rounds, --seconds, --workers and --clients of at least 1")
    return found


def _names(text: str) -> tuple[str, ...]:
    names = tuple(CONTESTANTS) if text == "all" else tuple(text.split(","))
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}': expected all, or some of {', '.join(CONTESTANTS)}")
    return names


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Ours, and what each peer pins."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    for name in sorted({CONTESTANTS[name].environment for name in names} - {""}):
        for line in (PEERS / name / "requirements.txt").read_text().split():
            package, _, pinned = line.partition("==")
            found[package] = pinned
    return found


def prepared(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Make every environment before anything is measured; who cannot have one, and why."""
    left_out = {}
    for name in names:
        try:
            if CONTESTANTS[name].environment:
                environments.python(CONTESTANTS[name].environment, folder)
        except DistilleryError as error:
            left_out[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
    return left_out


def measure(options: argparse.Namespace, store: Path) -> dict[str, Any]:
    """The whole comparison as one tree."""
    bundle, cache = options.bundle.resolve(), options.environments.absolute()
    digest = verify(bundle)["digest"]
    if options.table == "as-documented":  # one refusal instead of one from every peer
        ENGINES["eager"].load(bundle / FILES.weights, Setup(Contract.read(bundle / FILES.contract)))
    missing = prepared(options.peers, cache)
    names = [name for name in options.peers if name not in missing]
    pool = payloads.load(bundle, QUICK if options.quick else 0)
    traffic = Traffic(pool, store, options.exponent, options.seed)
    stage = Stage(bundle, RUNTIMES[options.table], 0, store, store, cache, options.workers)
    bench = Bench(traffic, stage, options.seconds, options.warm_up)
    about = {"machine": machine(), "generator": generator.check(bench, options.clients)}
    points = [Point(form, kind, n) for form in options.forms for kind in options.traffic for n in options.clients]
    if options.together:
        outcome = rounds.together(bench, names, points, options.rounds)
    else:
        outcome = rounds.by_turns(bench, names, points, options.rounds, options.open)
    return {
        **about,
        "student": {"digest": digest, "network": Contract.read(bundle / FILES.contract).network},
        "left_out": {**missing, **outcome.left_out},
        "contestants": {name: CONTESTANTS[name].title for name in options.peers},
        "ratios": summary.ratios(outcome.records, options.reference),
        "points": summary.points(outcome.records),
        "records": outcome.records,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write. Status 0, 1 when something was wrong or could not be measured, 130 when interrupted."""
    options = options_of(arguments)
    environments.clean()
    settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    about = {"command": shlex.join(["python", "-m", "benchmarks.serving", *(arguments or sys.argv[1:])])}
    store = Path(tempfile.mkdtemp(prefix="bench"))
    try:
        if not shutil.which("wrk"):
            raise DistilleryError("wrk is not installed: expected it on PATH; on Debian: apt-get install wrk")
        result = {**about, "versions": versions(options.peers), "settings": settings, **measure(options, store)}
        print(render.markdown(result))
        if options.out:
            with atomic(options.out) as path:
                path.write_text(json.dumps(result, indent=1) + "\n")
            render.write(result, options.out)
    except KeyboardInterrupt:
        return 130
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(store, ignore_errors=True)
    return int(bool(result["left_out"]) or any(point["wrong"] for point in result["points"]))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # ended politely, it ends its servers too
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
