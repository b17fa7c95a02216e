"""The worker's half of `check`, run by path in a bare process: `python -P replay.py ARCHIVE_FOLDER RESULT.json`.

It loads the archive with TorchServe's own loader and replays the golden payloads through its own Service and
wire format, without Java. It imports nothing of this project: whatever is missing in the archive is missing here.
"""

import io
import json
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ts
import yaml
from numpy.typing import NDArray
from PIL import Image
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import TsModelLoader

# By how much probabilities may differ from those of the logits of that name, which training stored: of the network
# itself, and of int8, whose kernels round where they please. The worker has already compared its own engine's.
TOLERANCES = {"logits": 1e-3, "logits_onnx-int8": 0.1}


@dataclass(frozen=True)
class Answer:
    """One item of a response frame."""

    status: int
    body: bytes


class Frame:
    """A reader of TorchServe's wire format: big-endian integers, and texts behind their length."""

    def __init__(self, frame: bytes) -> None:
        self._stream = io.BytesIO(frame)

    def number(self) -> int:
        """The next integer."""
        return int(struct.unpack("!i", self._stream.read(4))[0])

    def text(self) -> bytes:
        """The next text."""
        return self._stream.read(self.number())

    def answers(self) -> list[Answer]:
        """All items; the frame's own status and message come first, -1 comes last."""
        self.number()
        self.text()
        found = []
        while (length := self.number()) != -1:
            self._stream.read(length)  # the request's id
            self.text()  # content type
            status = self.number()
            self.text()  # the status's phrase
            for _ in range(self.number()):
                self.text(), self.text()
            found.append(Answer(status, self.text()))
        return found


def row(payload: bytes, content_type: str) -> dict[str, Any]:
    """A request as TorchServe's worker gets it."""
    value = bytearray(payload)
    return {
        "requestId": b"check",
        "headers": [{"name": b"Content-Type", "value": content_type.encode()}],
        "parameters": [{"name": "body", "contentType": content_type, "value": value}],
    }


def png(image: NDArray[np.uint8]) -> bytes:
    """An image `[H, W, C]` of one or three channels as PNG."""
    stream = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(stream, "PNG")
    return stream.getvalue()


def load(folder: Path) -> tuple[Any, int]:
    """TorchServe's Service over the archive, as a worker makes it, and the archive's batch size."""
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    batch = int(yaml.safe_load((folder / manifest["configFile"]).read_text())["batchSize"])
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = manifest["modelName"]
    service = TsModelLoader().load(
        manifest["modelName"], str(folder), manifest["handler"], None, batch, None, True, metrics
    )
    service.set_cl_socket(None)
    return service, batch


def replay(service: Any, rows: list[dict[str, Any]], batch: int) -> NDArray[np.float64]:
    """The probabilities `[N, K]` of the rows' answers; ValueError with the first answer that is no 200."""
    found = []
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        answers = Frame(bytes(service.predict(part))).answers()
        if len(answers) != len(part):
            raise ValueError(f"{len(part)} requests got {len(answers)} answers")
        for answer in answers:
            if answer.status != 200:
                raise ValueError(f"a golden payload got {answer.status}: {answer.body.decode(errors='replace')}")
            found.append(json.loads(answer.body)["prediction"][0])
    return np.array(found)


def compare(kind: str, found: NDArray[np.float64], stored: dict[str, NDArray[np.float32]]) -> float:
    """The largest difference to the softmax of the nearest of the stored logits `[N, K]`.

    ValueError when it, or a class, is not what it was.
    """
    differences = {}
    for name, logits in stored.items():
        powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        expected = powers / powers.sum(axis=1, keepdims=True)
        # Two classes within the tolerance of each other may change places.
        lost = expected.max(axis=1) - expected[np.arange(len(found)), found.argmax(axis=1)]
        differences[name] = float(np.abs(found - expected).max()), int((lost > TOLERANCES[name]).sum())
    name = min(differences, key=differences.__getitem__)
    difference, flipped = differences[name]
    if not difference <= TOLERANCES[name] or flipped:
        raise ValueError(
            f"golden payloads as {kind}: probabilities differ by up to {difference:.2g} (allowed {TOLERANCES[name]}), "
            f"{flipped} of {len(found)} classes changed"
        )
    return difference


def main(folder: Path, result: Path) -> None:
    """Check the archive in `folder` and write the figures."""
    began = time.monotonic()
    service, batch = load(folder)
    loaded = time.monotonic()
    with np.load(folder / "golden.npz", allow_pickle=False) as file:
        images, logits = file["images"], {name: file[name] for name in TOLERANCES if name in file}
    kinds = {"raw": [row(image.tobytes(), "application/octet-stream") for image in images]}
    if images.shape[3] in (1, 3):
        kinds["png"] = [row(png(image), "image/png") for image in images]
    differences = {kind: compare(kind, replay(service, rows, batch), logits) for kind, rows in kinds.items()}
    figures = {
        "payloads": sum(map(len, kinds.values())),
        "forms": list(kinds),
        "max_difference": max(differences.values()),
        "load_s": round(loaded - began, 2),
        "replay_s": round(time.monotonic() - loaded, 2),
    }
    result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
