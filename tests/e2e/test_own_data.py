"""A folder of one's own PNG files, of three classes: teacher, student, archive, answers; and no code written."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import ROOT, Site, clear, make_site, post

pytestmark = pytest.mark.e2e

COLOURS = {"brick": (200, 60, 40), "grass": (40, 180, 60), "water": (40, 80, 200)}


def picture(colour: tuple[int, int, int], chance: np.random.Generator, path: Path) -> None:
    """A noisy picture of that colour, of a size of its own."""
    height, width = chance.integers(10, 30, 2)
    noise = chance.normal(0, 40, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, chance = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        for name, colour in COLOURS.items():
            for i in range(count):
                picture(colour, chance, folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def site(packed: Path) -> Iterator[Site]:
    made = make_site(packed)
    yield made
    clear(made)


def test_a_folder_of_images_goes_through_to_answers(site: Site, photos: Path) -> None:
    settings = [
        *("name=mine", f"data.path={photos}", "data.height=16", "data.width=16", "data.validation=12"),
        *("teacher.epochs=6", "teacher.batch_size=16", "student.epochs=20", "student.batch_size=16", "views.shift=1"),
    ]
    experiment = str(ROOT / "training/experiments/folder.yaml")
    command = [sys.executable, "-m", "training", "run", experiment, *settings, "--json"]
    trained = site.run(*command, PYTHONPATH=str(ROOT))
    assert trained.status == 0, trained.error
    assert json.loads(trained.out)["models"]["student"]["accuracy"] > 0.8
    for arguments in (("pack", "runs/mine/bundle"), ("check", "model_store/student.mar")):
        done = site.run(sys.executable, "-m", "serving", *arguments, PYTHONPATH=str(ROOT))
        assert done.status == 0, done.error
    began = site.serving("start")
    assert began.status == 0, began.error
    try:
        for name in COLOURS:
            answer = post(site.instance(), (photos / "test" / name / "0.png").read_bytes(), "image/png")
            assert answer.status_code == 200, answer.text
            assert answer.json()["label"][0] in COLOURS
            assert len(answer.json()["prediction"][0]) == 3
        told = site.serving("predict", str(photos / "test" / "water" / "1.png"))
        assert told.status == 0, told.error
        assert "water" in told.out
    finally:
        assert site.serving("stop").status == 0
