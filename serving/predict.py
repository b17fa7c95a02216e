"""The `predict` command: which images to send, and the table of what came back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.errors import DistilleryError, ServeError, SettingsError
from serving import archive as archives
from serving.client import Client, Prediction

SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Input:
    """One image to send; `truth` is its label where that is known."""

    name: str
    read: Callable[[], bytes]
    content_type: str | None = None
    truth: str | None = None


def files(paths: Sequence[Path]) -> list[Input]:
    """Image files, and the images in folders, in order."""
    found = []
    for path in paths:
        inside = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES] if path.is_dir() else [path]
        if not inside:
            raise DistilleryError(f"{path}: holds no {', '.join(SUFFIXES)} file")
        found += [Input(str(file), file.read_bytes) for file in sorted(inside)]
    return found


def test_images(archive: Path, indices: Sequence[int]) -> tuple[tuple[str, ...], list[Input]]:
    """The archive's labels, and those of its test images that were asked for."""
    with archives.unpacked(archive) as root:
        golden = archives.golden(root)
    count = len(golden.images)
    for i in indices:
        if not 0 <= i < count:
            raise SettingsError(f"--index {i}: {archive} holds {count} test images, 0 to {count - 1}")
    raw = "application/octet-stream"
    found = [
        Input(f"test image {i}", golden.images[i].tobytes, raw, golden.labels[int(golden.truth[i])]) for i in indices
    ]
    return golden.labels, found


def ask(client: Client, inputs: Sequence[Input], labels: Sequence[str], top: int) -> list[dict[str, Any]]:
    """One row for each image; one that is refused gets an `error`, and the others go on."""
    rows = []
    for one in inputs:
        try:
            rows.append(_row(one, client.predict(one.read(), one.content_type), labels, top))
        except ServeError as error:
            rows.append({"file": one.name, "error": str(error), "code": error.code})
        except OSError as error:
            rows.append({"file": one.name, "error": f"cannot be read: {error.strerror}", "code": "no_file"})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """File, label, probability, source, whether the label is right, and the next best labels."""
    width = max(len(row["file"]) for row in rows)
    return "\n".join(f"{row['file']:{width}}  {_cells(row)}" for row in rows)


def _row(one: Input, answer: Prediction, labels: Sequence[str], top: int) -> dict[str, Any]:
    count = len(answer.scores)
    names = labels if len(labels) == count else [str(i) for i in range(count)]
    best = sorted(range(count), key=lambda i: -answer.scores[i])[:top]
    row = dataclasses.asdict(answer) | {"file": one.name, "truth": one.truth, "probability": answer.probability}
    return row | {"top": {names[i]: answer.scores[i] for i in best}}


def _cells(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"error: {row['error']}"
    others = ", ".join(f"{name} {score:.3f}" for name, score in list(row["top"].items())[1:])
    truth = "" if row["truth"] is None else "right" if row["truth"] == row["label"] else f"WRONG: {row['truth']}"
    return f"{row['label']:12}  {row['probability']:.3f}  {row['source']:5}  {truth:5}  {others}".rstrip()
