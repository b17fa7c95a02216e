"""How TorchServe deals out GPUs: it counts what CUDA_VISIBLE_DEVICES names, even where there is none."""

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import ROOT, Site, post

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")]


def test_workers_get_the_gpus_of_the_list_in_turn_and_so_when_scaled(site: Site, bundle: Path) -> None:
    settings = ["device_type=gpu", "device_ids=[2, 0]", "min_workers=2", "max_workers=3"]
    packed = site.run(sys.executable, "-m", "serving", "pack", str(bundle), *settings, PYTHONPATH=str(ROOT))
    assert packed.status == 0, packed.error
    command = [sys.executable, "-m", "serving", "start", "--port", str(site.port)]
    began = site.run(*command, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="0,1,2")
    try:
        assert began.status == 0, began.error
        assert site.serving("scale", "3").status == 0
        status = site.serving("status", "--json").json
        assert status["problems"] == [] and None not in [worker["gpu"] for worker in status["workers"]]
        log = (site.folder / "logs" / str(site.port) / "model_log.log").read_text()
        assert sorted(re.findall(r"the server gave this worker GPU (\d), but torch sees none", log)) == ["0", "2", "2"]
        assert post(site.instance(), bytes(784), "application/octet-stream").status_code == 200
    finally:
        assert site.serving("stop").status == 0
