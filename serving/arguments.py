"""The grammar of each command: its flags, what they mean, and an example."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.archive import ServeSettings
from serving.profiles import PROFILES
from serving.search import OBJECTIVES

FLAGS = ("min_workers", "max_workers", "batch_size", "max_batch_delay", "response_timeout", "startup_timeout")
DIMENSIONS = ("batch_size", "workers", "threads", "engine")  # of bench --tune, as `search.Candidate` has them
EXAMPLES = {
    "pack": "python -m serving pack runs/quickstart/bundle --engine onnx handler.cache.ttl_s=600",
    "check": "python -m serving check model_store/student.mar",
    "start": "python -m serving start --port 9080",
    "status": "python -m serving status --json",
    "token": "python -m serving token",
    "predict": "python -m serving predict shoe.png photos/ --index 0 1 2",
    "scale": "python -m serving scale 2",
    "stop": "python -m serving stop --drain 30",
    "bench": "python -m serving bench --tune --clients 64",
}


def _pack_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path, help="a bundle, such as runs/quickstart/bundle")
    p.add_argument(
        "settings", nargs="*", metavar="key=value", help="any other setting, such as handler.cache.entries=0"
    )
    p.add_argument("--name", default="student", help="of the model and its file (default: %(default)s)")
    p.add_argument("--version", default="1.0", help="of the model (default: %(default)s)")
    p.add_argument("--model-store", type=Path, default=Path("model_store"), help="where to (default: %(default)s)")
    for name in FLAGS:
        default = getattr(ServeSettings(), name)
        p.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"TorchServe's setting (default: {default})")
    p.add_argument("--engine", help="what computes in the worker (default: auto)")
    p.add_argument("--profile", choices=PROFILES, default="throughput", help="of the settings (default: %(default)s)")


def _check_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("archive", type=Path, help="an archive, such as model_store/student.mar")


def _instance_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", type=Path, default=Path("config.properties"), help="default: %(default)s")
    p.add_argument("--port", type=int, help="the first of five ports of an instance beside the default one")


def _start_arguments(p: argparse.ArgumentParser) -> None:
    _instance_arguments(p)
    p.add_argument("--model-store", type=Path, default=Path("model_store"), help="default: %(default)s")
    p.add_argument("--models", default="student.mar", metavar="ARCHIVE", help="default: %(default)s")
    p.add_argument("--profile", choices=PROFILES, help="serve a copy of the archive with this profile's settings")
    p.add_argument("--replace", action="store_true", help="stop a server that serves another archive first")
    p.add_argument("--no-token", action="store_true", help="answer without a token, for demonstrations and load tests")


def _stop_arguments(p: argparse.ArgumentParser) -> None:
    _instance_arguments(p)
    p.add_argument("--drain", type=float, default=10.0, help="seconds to wait for requests in hand (default: 10)")


def _token_arguments(p: argparse.ArgumentParser) -> None:
    _instance_arguments(p)
    p.add_argument("--management", action="store_true", help="the token of the management port")


def _status_arguments(p: argparse.ArgumentParser) -> None:
    _instance_arguments(p)
    p.add_argument("--name", default="student", help="the model (default: %(default)s)")


def _scale_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("workers", type=int, help="how many")
    _stop_arguments(p)
    p.add_argument("--name", default="student", help="the model (default: %(default)s)")


def _predict_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("paths", type=Path, nargs="*", metavar="PATH", help="image files, or folders of images")
    _status_arguments(p)
    p.add_argument(
        "--index", type=int, nargs="+", default=[], metavar="N", help="test images of the archive, by number"
    )
    p.add_argument("--archive", type=Path, default=Path("model_store/student.mar"), help="default: %(default)s")
    p.add_argument("--top", type=int, default=3, help="how many labels to show (default: %(default)s)")
    p.add_argument("--url", help="another server's inference address, such as http://127.0.0.1:9080")


def _bench_arguments(p: argparse.ArgumentParser) -> None:
    default = Path("model_store/student.mar")
    p.add_argument("archive", type=Path, nargs="?", default=default, help=f"default: {default}")
    p.add_argument("--config", type=Path, default=Path("config.properties"), help="default: %(default)s")
    p.add_argument("--clients", type=_positive, default=64, help="who ask without a pause (default: %(default)s)")
    p.add_argument("--seconds", type=_positive, default=2, help="of each measurement (default: %(default)s)")
    p.add_argument("--rounds", type=_positive, default=3, help="measurements of each candidate (default: %(default)s)")
    p.add_argument("--tune", action="store_true", help="try other settings, and write the best into the archive")
    p.add_argument("--dry-run", action="store_true", help="tune and print, but write nothing")
    p.add_argument(
        "--objective", choices=OBJECTIVES, default="throughput", help="requests/s or p50 (default: %(default)s)"
    )
    several: dict[str, Any] = {"nargs": "+", "default": argparse.SUPPRESS}
    p.add_argument("--batch-sizes", type=_positive, dest="batch_size", **several, help="to try (default: 1 8 32 128)")
    p.add_argument("--workers", type=_positive, **several, help="to try (default: 1 2 4 ..., and the cores)")
    p.add_argument("--threads", type=_natural, **several, help="to try (default: 1, and cores / workers, which 0 is)")
    p.add_argument("--engines", dest="engine", **several, help="to try (default: all that are accurate enough)")


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'")
    return int(text)


def _positive(text: str) -> int:
    if _natural(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got '{text}'")
    return int(text)


ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    name: globals()[f"_{name}_arguments"] for name in EXAMPLES
}
