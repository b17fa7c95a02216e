"""The management API as the code sees it, and the errors that its users see."""

import copy
from typing import Any

import pytest

from handler.errors import DistilleryError
from serving.archive import ServeSettings
from serving.management import Management
from serving.operate import differences
from tests.serving.conftest import Stub

DESCRIBED: dict[str, Any] = {
    "modelName": "student",
    "modelVersion": "1.0",
    "modelUrl": "student.mar",
    "minWorkers": 1,
    "maxWorkers": 2,
    "batchSize": 32,
    "maxBatchDelay": 1,
    "responseTimeout": 30,
    "startupTimeout": 120,
    "deviceType": "cpu",
    "workers": [
        {"id": "9000", "status": "READY", "memoryUsage": 7, "pid": 11, "gpu": False},
        {"id": "9001", "status": "UNLOADING", "memoryUsage": 0, "pid": 12, "gpu": False},
    ],
    "jobQueueStatus": {"remainingCapacity": 254, "pendingRequests": 2},
}


def test_what_runs_is_read(stub: Stub) -> None:
    stub.answers = [(200, [DESCRIBED])]
    model = Management(stub.url, "secret").describe("student")
    assert (model.name, model.version, model.archive, model.pending) == ("student", "1.0", "student.mar", 2)
    assert [worker.pid for worker in model.workers] == [11, 12]
    assert model.ready == 1
    assert stub.asked[0].headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        ({"gpu": False, "gpuUsage": "N/A"}, None),
        ({"gpu": True, "gpuUsage": "gpuId::1 utilization.gpu [%]::7 %utilization.memory [%]::0 %"}, "1"),
        ({"gpu": True, "gpuUsage": "failed to obtained gpu usage"}, "?"),
    ],
)
def test_the_gpu_of_a_worker_is_read(stub: Stub, worker: dict[str, Any], expected: str | None) -> None:
    stub.answers = [(200, [DESCRIBED | {"workers": [DESCRIBED["workers"][0] | worker]}])]
    assert [found.gpu for found in Management(stub.url).describe("student").workers] == [expected]


def test_gpus_that_torchserve_does_not_give_are_named(stub: Stub) -> None:
    asked = ServeSettings(device_type="gpu", device_ids=(0, 1))
    stub.answers = [(200, [DESCRIBED | found]) for found in ({"deviceType": "gpu", "deviceIds": [0, 1]}, {})]
    management = Management(stub.url)
    assert differences(asked, "1.0", management.describe("student")) == []
    assert differences(asked, "1.0", management.describe("student")) == [
        "deviceType is cpu, the archive asks for gpu",
        "deviceIds is None, the archive asks for [0, 1]",
    ]


def test_scaling_asks_with_query_parameters_for_both_bounds(stub: Stub) -> None:
    stub.answers = [(200, {"status": "Workers scaled"})]
    Management(stub.url).scale("student", 3, 60)
    asked = stub.asked[0]
    assert (asked.verb, asked.body) == ("PUT", b"")
    assert asked.path == "/models/student?min_worker=3&max_worker=3&synchronous=true&timeout=60"


def test_torchserves_own_message_is_shown(stub: Stub) -> None:
    stub.answers = [(404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: x"})]
    with pytest.raises(DistilleryError, match="404: Model not found: x"):
        Management(stub.url).describe("x")


def test_a_stranger_on_the_port_is_named(stub: Stub) -> None:
    stub.answers = [(200, b"<html>")]
    with pytest.raises(DistilleryError, match="not TorchServe's management API"):
        Management(stub.url).models()


def test_nobody_on_the_port_is_one_line() -> None:
    with pytest.raises(DistilleryError, match=r"^http://127\.0\.0\.1:1: no TorchServe is listening there$"):
        Management("http://127.0.0.1:1").models()


def test_a_setting_that_torchserve_changed_is_named_with_both_values(stub: Stub) -> None:
    stub.answers = [(200, [DESCRIBED | {"maxBatchDelay": 100, "maxWorkers": 7}])]
    model = Management(stub.url).describe("student")
    assert differences(ServeSettings(), "1.0", model) == [
        "maxWorkers is 7, the archive asks for 2",
        "maxBatchDelay is 100, the archive asks for 1",
    ]
    assert differences(ServeSettings(), "1.0", model, counts=False) == ["maxBatchDelay is 100, the archive asks for 1"]
    assert differences(ServeSettings(max_batch_delay=100, max_workers=7), "2.0", model) == [
        "version is 1.0, the archive is 2.0"
    ]


@pytest.mark.parametrize(
    "key", ["minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout"]
)
def test_every_setting_of_ours_is_compared(stub: Stub, key: str) -> None:
    changed = copy.deepcopy(DESCRIBED)
    stub.answers = [(200, [DESCRIBED]), (200, [changed | {key: 99}])]
    management = Management(stub.url)
    assert differences(ServeSettings(), "1.0", management.describe("student")) == []
    assert [line.split()[0] for line in differences(ServeSettings(), "1.0", management.describe("student"))] == [key]
