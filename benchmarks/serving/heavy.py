"""A bundle of a larger network, some 3 ms an image: what is left of a server's speed where the model decides.

    python -m benchmarks.serving.heavy runs/heavy/bundle

The network is `residual` with random weights on images of Fashion-MNIST, enlarged: its answers mean nothing, its
latencies are measured as training measures them, for the handler chooses its micro-batch by them.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from handler import networks
from handler.contract import Contract
from handler.engines import ENGINES, Setup
from handler.errors import DistilleryError
from training import data, measure
from training.artifact import write_bundle
from training.config import DataSettings
from training.export import Source, to_onnx

SIDE = 56  # pixels
IMAGES = 128


def bundle(folder: Path) -> str:
    """Write the bundle into a new folder; returns its digest. DistilleryError if it exists, or there are no images."""
    if folder.exists():  # `write_bundle` would take its place, whatever is in it
        raise DistilleryError(f"{folder}: exists already; expected a new folder")
    found = data.load(DataSettings(test_limit=IMAGES))
    images = F.interpolate(found.test.images, (SIDE, SIDE))
    contract = Contract(network="residual", channels=1, height=SIDE, width=SIDE, labels=tuple(found.labels))
    torch.manual_seed(0)
    network = networks.build("residual", channels=1, size=(SIDE, SIDE), classes=len(contract.labels)).train()
    with torch.no_grad():
        network(images)  # so that its BatchNorms have seen such images
    source = Source(network.eval(), contract, images)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "student.onnx"
        to_onnx(source, path)
        cost = measure.latencies({"onnx": ENGINES["onnx"].load(path, Setup(contract))}, images)
        measured = {name: {"accuracy": 0.1, "latency_ms": {"cpu": figures}} for name, figures in cost.items()}
        return write_bundle(
            folder,
            student=network,
            engines={"onnx": path},
            contract=contract,
            golden=replace(found.test, images=images),
            report={"served": "student", "engines": {"student": measured}},
            evidence={},
        )


def main(arguments: list[str] | None = None) -> int:
    """Write the bundle and print its digest. Status 0, or 1 when it cannot be written."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.serving.heavy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    try:
        print(bundle(parser.parse_args(arguments).folder))
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
