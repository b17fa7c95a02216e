"""The whole command, once and quickly: an empty server and one peer in an environment of its own."""

import json
import shutil
from pathlib import Path

import psutil
import pytest

from benchmarks.serving import environments
from benchmarks.serving.__main__ import main
from handler.bundle import FILES, seal
from handler.errors import DistilleryError
from tests.bundles import random_source
from training.export import FORMATS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed"),
]
CACHE = Path.home() / ".cache" / "distillery" / "serving"


@pytest.fixture(autouse=True, scope="module")
def fastapi() -> None:
    """Its environment, where it can be had."""
    try:
        environments.python("fastapi", CACHE)
    except DistilleryError as error:
        pytest.skip(str(error))


def test_the_command_measures_judges_and_leaves_nothing_behind(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    flags = ["--quick", "--peers", "nothing,fastapi", "--reference", "nothing", "--forms", "raw", "png"]
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    status = main([*flags, "--bundle", str(bundle), "--environments", str(CACHE), "--out", str(out)])
    found = json.loads(out.read_text())
    assert status == 0, found["left_out"]
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    assert len(found["points"]) == 8  # two contestants, two forms, two numbers of clients
    assert all(point["requests"] and not point["refused"] and not point["lost"] for point in found["points"])
    judged = {name: [p["judged"] for p in found["points"] if p["contestant"] == name] for name in found["contestants"]}
    assert min(judged["fastapi"]) > 0 and max(judged["nothing"]) == 0
    assert len(found["ratios"]) == 4
    assert out.with_suffix(".md").read_text().startswith("# Serving side by side")
    assert {path.name for path in tmp_path.glob("*.png")} == {"found.raw.unique.png", "found.png.unique.png"}


def test_who_answers_wrongly_is_left_out_and_the_status_says_so(bundle: Path, tmp_path: Path) -> None:
    """The right answers come from the ONNX file; PyTorch serves the weights, which are here another student's."""
    mixed = tmp_path / "bundle"
    shutil.copytree(bundle, mixed)
    FORMATS["onnx"].write(random_source(seed=1), mixed / FILES.onnx)
    seal(mixed, {})
    out = tmp_path / "found.json"
    flags = ["--quick", "--table", "as-documented", "--peers", "fastapi", "--environments", str(CACHE)]
    assert main([*flags, "--bundle", str(mixed), "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert "'wrong'" in found["left_out"]["fastapi"] and not found["points"]
