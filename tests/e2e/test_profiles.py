"""Profiles and tuning with a real TorchServe: what was asked for runs, and a measurement leaves nothing running."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from handler.contract import probabilities
from serving import archive
from serving.profiles import PROFILES, with_settings
from tests.e2e.conftest import ROOT, Site, post, until

pytestmark = pytest.mark.e2e
BENCH = (sys.executable, "-m", "serving", "bench", "--clients", "4", "--seconds", "1", "--rounds", "1")


def left(site: Site) -> list[psutil.Process]:
    """Processes of a private server: their command lines name its folder."""
    private = str(site.folder / "t" / "bench")
    return [one for one in psutil.process_iter(["cmdline"]) if private in " ".join(one.info["cmdline"] or [])]


def test_start_serves_a_copy_with_the_profile_and_leaves_the_archive(site: Site, packed: Path) -> None:
    began = site.serving("start", "--profile", "latency")
    assert began.status == 0 and "batchSize 1, " in began.out, began.error
    try:
        status = site.serving("status", "--json")
        copy = with_settings(packed, PROFILES["latency"], site.folder / "expected.mar")
        assert status.status == 0 and status.json["batch_size"] == 1 and status.json["digest"] == copy.digest
        assert site.instance().management().describe("student").settings["batchSize"] == 1
        assert site.serving("start", "--profile", "latency").out.startswith("already running")
        plain = site.serving("start")
        assert plain.status == 1 and "start with --replace" in plain.error
        with archive.unpacked(packed) as root, np.load(root / "golden.npz") as golden:
            images, expected = golden["images"][:8], probabilities(golden["logits"][:8])
        answers = [post(site.instance(), image.tobytes(), "application/octet-stream") for image in images]
        assert {answer.json()["model"]["digest"] for answer in answers} == {copy.digest}
        found = np.array([answer.json()["prediction"][0] for answer in answers])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        again = site.serving("start", "--profile", "throughput", "--replace")
        assert again.status == 0 and "batchSize 32, " in again.out, again.error
        assert site.serving("status", "--json").json["digest"] == archive.read(packed).digest, "as it was packed"
        assert (site.folder / "model_store" / "student.mar").read_bytes() == packed.read_bytes()
    finally:
        assert site.serving("stop").status == 0


def test_tuning_writes_what_serves_best_and_says_why_the_rest_does_not(site: Site, packed: Path) -> None:
    """The archive asks for an engine that it does not hold: whatever the machine does, another one is better."""
    path = site.folder / "model_store" / "student.mar"
    before = with_settings(packed, {"handler": {"engine": "compiled"}}, path)
    fixed = ("--batch-sizes", "32", "--workers", "1", "--threads", "0", "--engines", "onnx", "--json")
    done = site.run(*BENCH, "--tune", *fixed, PYTHONPATH=str(ROOT))
    assert done.status == 0, done.error
    broken, good = done.json["rows"]
    assert "engine compiled: " in broken["problem"] and broken["rounds"] == []
    assert good["candidate"]["engine"] == "onnx" and good["rounds"][0]["requests_per_s"] > 0
    after = archive.read(path)
    assert after.settings.handler.engine == "onnx" and after.digest == done.json["written"] != before.digest
    assert json.loads((path.parent / "student.tune.json").read_text()) == done.json
    assert left(site) == [] and not list((site.folder / "t").glob("bench*"))


def asking(bench: subprocess.Popen[bytes]) -> bool:
    """Whether all its clients are connected."""
    found = psutil.Process(bench.pid).net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED for one in found) >= 4


@pytest.mark.parametrize("moment", ["starting", "measuring"])
def test_a_measurement_that_is_ended_ends_its_server(site: Site, moment: str) -> None:
    command, environ = [*BENCH, "--seconds", "60"], {**site.environ, "PYTHONPATH": str(ROOT)}
    bench = subprocess.Popen(command, cwd=site.folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: left(site) if moment == "starting" else asking(bench), moment)
    os.kill(bench.pid, signal.SIGTERM)
    out, _ = bench.communicate(timeout=60)
    assert bench.returncode == 130 and b"Traceback" not in out
    assert left(site) == [] and not list((site.folder / "t").glob("bench*"))
