"""A folder of pictures that a small network learns in a second, for commands that run as processes of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

CLASSES = "abc"
SMALL = {"network": "seed_student", "epochs": 2, "batch_size": 32, "learning_rate": 0.05}


def draw(folder: Path) -> Path:
    """8×8 grey pictures; the class is the column that is bright."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8), ("test", 16)):
        for k, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (8, 8), dtype=np.uint8)
                pixels[:, 2 * k : 2 * k + 3] += 60
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def write(file: Path, pictures: Path, **settings: Any) -> Path:
    """An experiment over these pictures, written to `file`, which names it."""
    data = {"name": "folder", "path": str(pictures), "root": str(pictures.parent / "data")}
    tree = {
        "device": "cpu",
        "data": {**data, "height": 8, "width": 8, "channels": 1},
        "views": {"shift": 0, "flip": False},
        "teacher": SMALL,
        "student": SMALL,
        **settings,
    }
    file.write_text(yaml.safe_dump(tree))
    return file
