"""Is what comes over HTTP what the report says? All test images, 64 in flight, as PNG and as raw bytes.

    python benchmarks/accuracy_over_http.py --run runs/quickstart --out benchmarks/results/accuracy_over_http.json

The server must be running (`python -m serving start`) with the archive of that run. Exit status 1 when the number of
right answers differs from the report's by more than 3 for the same engine.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from handler.engines import ENGINES
from serving.client import Client
from serving.instance import locate
from training import data, report
from training.reading import read_experiment

ALLOWED = 3


def png(image: NDArray[np.uint8]) -> bytes:
    """A grey image `[1, H, W]` as PNG bytes."""
    stream = BytesIO()
    Image.fromarray(image[0]).save(stream, "PNG")
    return stream.getvalue()


FORMS: dict[str, tuple[str, Callable[[NDArray[np.uint8]], bytes]]] = {
    "png": ("image/png", png),
    "raw": ("application/octet-stream", lambda image: image.transpose(1, 2, 0).tobytes()),
}


def measure(
    url: str, key_file: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], form: str, flight: int
) -> dict[str, float]:
    """Send every image once, `flight` at a time; how many answers were right, and how long it took."""
    content_type, encode = FORMS[form]
    payloads = [encode(image) for image in images]

    def send(part: range) -> int:
        with Client(url, key_file=key_file) as client:
            answers = [client.predict(payloads[i], content_type, cache=False).class_id for i in part]
        return int((np.array(answers) == labels[part.start :: part.step]).sum())

    start = time.perf_counter()
    with ThreadPoolExecutor(flight) as pool:
        right = sum(pool.map(send, [range(i, len(payloads), flight) for i in range(min(flight, len(payloads)))]))
    seconds = time.perf_counter() - start
    return {"right": right, "seconds": round(seconds, 2), "requests_per_s": round(len(payloads) / seconds, 1)}


def main() -> int:
    """Measure both forms, print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--port", type=int)
    parser.add_argument("--engine", choices=ENGINES, default="onnx", help="the engine that the server runs")
    parser.add_argument("--flight", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    instance = locate(Path("config.properties"), options.port)
    experiment = read_experiment(options.run / "experiment.yaml", [], {})
    test = data.load(experiment.data).test
    images, labels = test.images.numpy(), test.labels.numpy()
    found = report.read(options.run)
    expected = round(found["engines"][experiment.compress.serve][options.engine]["accuracy"] * len(labels))
    forms = {
        form: measure(instance.inference, instance.key_file, images, labels, form, options.flight) for form in FORMS
    }
    result = {
        "run": found["experiment"],
        "engine": options.engine,
        "images": len(labels),
        "in_flight": options.flight,
        "right_in_report": expected,
        "forms": forms,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return int(any(abs(figures["right"] - expected) > ALLOWED for figures in forms.values()))


if __name__ == "__main__":
    sys.exit(main())
