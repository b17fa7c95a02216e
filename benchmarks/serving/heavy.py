"""A bundle of a larger network, some 3 ms an image: what is left of a server's speed where the model decides.

    python -m benchmarks.serving.heavy runs/heavy/bundle

The network is `residual` with random weights on images of Fashion-MNIST, enlarged: its answers mean nothing, its
latencies are measured as training measures them, for the handler chooses its micro-batch by them.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from handler import networks
from handler.contract import Contract
from handler.engines import ENGINES, Setup
from training import data, measure
from training.artifact import write_bundle
from training.config import DataSettings
from training.export import Source, to_onnx

SIDE = 56  # pixels
IMAGES = 128


def bundle(folder: Path) -> str:
    """Write the bundle in place of an earlier one; returns its digest."""
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


if __name__ == "__main__":
    print(bundle(Path(sys.argv[1])))
