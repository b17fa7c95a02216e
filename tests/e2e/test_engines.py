"""One bundle behind TorchServe in each of its engines: the same answers."""

import sys
from pathlib import Path

import numpy as np
import pytest

from handler.contract import probabilities
from serving import archive
from tests.bundles import EXPORTED
from tests.e2e.conftest import ROOT, Site, post

pytestmark = pytest.mark.e2e


def packed_for(site: Site, bundle: Path, engine: str) -> None:
    """Pack the bundle with the engine named in its model-config.yaml."""
    command = [sys.executable, "-m", "serving", "pack", str(bundle), "--engine", engine]
    done = site.run(*command, PYTHONPATH=str(ROOT))
    assert done.status == 0, done.error


@pytest.mark.parametrize("engine", ["eager", *EXPORTED])
def test_each_engine_answers_as_the_student_does(site: Site, bundle: Path, packed: Path, engine: str) -> None:
    packed_for(site, bundle, engine)
    assert site.serving("start", "--replace").status == 0
    try:
        with archive.unpacked(packed) as root, np.load(root / "golden.npz") as golden:
            images = golden["images"]
            expected = probabilities(golden["logits_onnx-int8" if engine == "onnx-int8" else "logits"])
        answers = [post(site.instance(), image.tobytes(), "application/octet-stream") for image in images]
        assert [answer.status_code for answer in answers] == [200] * len(images)
        found = np.array([answer.json()["prediction"][0] for answer in answers])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        log = site.folder / "logs" / str(site.port) / "model_log.log"
        assert f"engine {engine} (the settings name it)" in log.read_text()
    finally:
        assert site.serving("stop").status == 0


def test_an_engine_that_the_bundle_does_not_hold_is_refused_before_it_serves(site: Site, bundle: Path) -> None:
    packed_for(site, bundle, "compiled")
    for command in (("check", "model_store/student.mar"), ("start", "--port", str(site.port))):
        done = site.run(sys.executable, "-m", "serving", *command, PYTHONPATH=str(ROOT))
        error = [line for line in done.error.splitlines() if line.startswith("error: ")]
        assert done.status == 1 and len(error) == 1
        assert "engine compiled: " in error[0] and "the engines in it are eager, onnx" in error[0]
