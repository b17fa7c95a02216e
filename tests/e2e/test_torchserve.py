"""A real TorchServe, on ports and in folders of its own: started, asked, attacked, scaled, stopped."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from PIL import Image
from urllib3.filepost import encode_multipart_formdata

from handler.metrics import METRICS
from serving import archive
from tests.bundles import remade
from tests.e2e.conftest import Site, post, touched, until

pytestmark = pytest.mark.e2e
RAW = "application/octet-stream"


@pytest.fixture(scope="module")
def golden(packed: Path) -> archive.Golden:
    with archive.unpacked(packed) as root:
        return archive.golden(root)


def picture(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def ready(site: Site, count: int, default: bool = False) -> Callable[[], bool]:
    """Whether `status` says so, with so many workers."""

    def asked() -> bool:
        found = site.serving("status", "--json", default=default)
        return found.status == 0 and len(found.json["workers"]) == count

    return asked


def test_started_means_ready_with_the_settings_asked_for(served: Site, packed: Path) -> None:
    found = served.serving("status", "--json")
    assert found.status == 0
    status = found.json
    assert status["ready"] and status["running"] and status["problems"] == []
    assert status["digest"] == archive.read(packed).digest
    assert [worker["status"] for worker in status["workers"]] == ["READY"]
    assert status["workers"][0]["memory_bytes"] > 50_000_000
    assert psutil.Process(status["pid"]).is_running()
    model = served.instance().management().describe("student")
    assert model.settings["batchSize"] == 32 and model.settings["maxBatchDelay"] == 1


def test_keys_are_for_their_owner_and_nobody_enters_without(served: Site) -> None:
    instance = served.instance()
    assert stat.S_IMODE(instance.key_file.stat().st_mode) == 0o600
    for url in (f"{instance.inference}/predictions/student", f"{instance.management().url}/models"):
        answer = requests.get(url, timeout=5)
        assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException")


def test_no_model_can_be_registered_or_removed_over_http(served: Site) -> None:
    management = served.instance().management()
    for verb, path in (("POST", "models?url=student.mar"), ("DELETE", "models/student")):
        assert management._session.request(verb, f"{management.url}/{path}", timeout=5).status_code == 405


def test_a_repeated_request_comes_from_the_cache(served: Site, golden: archive.Golden) -> None:
    body = golden.images[1].tobytes()
    first, second = (post(served.instance(), body, RAW) for _ in range(2))
    assert (first.status_code, first.headers["X-Cache"], first.json()["source"]) == (200, "MISS", "model")
    assert (second.status_code, second.headers["X-Cache"], second.json()["source"]) == (200, "HIT", "cache")
    assert first.json()["prediction"] == second.json()["prediction"]
    bypass = post(served.instance(), body, RAW, **{"Cache-Control": "no-cache"})
    assert (bypass.headers["X-Cache"], bypass.json()["source"]) == ("BYPASS", "model")


def test_every_form_of_one_image_gets_one_answer(served: Site, golden: archive.Golden) -> None:
    image = golden.images[2]
    rows = [image.flatten().tolist()]
    bodies = [
        (image.tobytes(), RAW),
        (picture(Image.fromarray(image[:, :, 0])), None),
        (json.dumps({"features": rows}), "application/json; charset=utf-8"),
    ]
    answers = [post(served.instance(), body, kind) for body, kind in bodies]
    assert [answer.status_code for answer in answers] == [200] * 3
    scores = np.array([answer.json()["prediction"][0] for answer in answers])
    assert np.abs(scores - scores[0]).max() < 1e-6
    kserve = post(served.instance(), json.dumps({"instances": rows}), "application/json")
    assert np.abs(np.array(kserve.json()["predictions"][0]) - scores[0]).max() < 1e-6


def test_forms_are_the_workers_and_cost_nothing_when_they_are_broken(served: Site, golden: archive.Golden) -> None:
    """TorchServe itself answers such with 500 and keeps the memory of each: after a hundred of these it takes none."""
    instance, image = served.instance(), golden.images[4]
    body, kind = encode_multipart_formdata({"data": ("a.png", picture(Image.fromarray(image[:, :, 0])), "image/png")})
    whole, plain = post(instance, body, kind), post(instance, image.tobytes(), RAW)
    assert whole.json()["prediction"] == [pytest.approx(plain.json()["prediction"][0], abs=1e-6)]
    large = b'--x\r\nContent-Disposition: form-data; name=""\r\n\r\n' + bytes(5_000_000)
    broken = [post(instance, large, "multipart/form-data; boundary=x") for _ in range(100)]
    assert {(answer.status_code, answer.json().get("code")) for answer in broken} == {(400, "bad_form")}
    assert post(instance, b"a=%", "application/x-www-form-urlencoded").json()["code"] == "unsupported_media"
    assert post(instance, body, kind).headers["X-Cache"] == "HIT"


def test_options_and_explanations_beside_predictions(served: Site, golden: archive.Golden) -> None:
    """All at once, so that they share batches; each gets what it gets alone, whatever headers a client invents."""
    instance, image = served.instance(), golden.images[3]
    predict, explain, old = "predictions/student", "explanations/student", "models/student/invoke"
    forged = {"describe": "True", "explain": "True", "Explain": "True"}
    asked: list[tuple[str, dict[str, str], str]] = [
        (predict, {}, "prediction"),
        (predict, forged, "prediction"),
        (explain, {}, "explanation"),
        (explain, {"explain": "False"}, "explanation"),
        (predict, {"X-Options": '{"top_k": 2, "logits": true, "features": true}'}, "top_k"),
        (predict, {"X-Options": '{"top_k": 0}'}, "bad_option"),
        (predict, {"Content-Type": "application/x-www-form-urlencoded", "describe": "True"}, "empty_body"),
        (old, {}, "prediction"),
        (old, {"explain": "True"}, "explanation"),
    ]

    def send(one: tuple[str, dict[str, str], str]) -> Any:
        route, headers, code = one
        body = b"" if code == "empty_body" else image.tobytes()
        return post(instance, body, route=route, **{"Content-Type": RAW, "Cache-Control": "no-store", **headers}).json()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, asked * 4))
    expected = send(asked[0])
    for (route, _, key), found in zip(asked * 4, answers, strict=True):
        assert key in found or key == found["code"], (route, found)
        if "prediction" in found:
            assert found["prediction"] == [pytest.approx(expected["prediction"][0], abs=1e-6)]
        if "explanation" in found:
            assert np.array(found["explanation"]).shape == (1, 28, 28) and found["label"] == expected["label"]


def test_the_model_describes_itself_to_the_management(served: Site, packed: Path) -> None:
    management = served.instance().management()
    answer = management._session.get(f"{management.url}/models/student?customized=true", timeout=30)
    [model] = answer.json()
    found = model["customizedMetadata"]
    assert answer.status_code == 200 and found["model"]["digest"] == archive.read(packed).digest
    assert (found["contract"]["network"], found["engine"]["name"]) == ("separable", "onnx")
    assert found["evidence"]["accuracy"] == 0.9 and found["explanations"] is True


def test_predict_asks_for_files_and_test_images(served: Site, golden: archive.Golden) -> None:
    (served.folder / "in").mkdir()
    (served.folder / "in" / "good.png").write_bytes(picture(Image.fromarray(golden.images[5][:, :, 0])))
    (served.folder / "in" / "text.png").write_text("no image")
    found = served.serving("predict", "in", "--index", "5", "--json")
    assert found.status == 1, "one of them was refused"
    good, bad, test = found.json
    assert good["label"] == test["label"] and test["truth"] == "Sandal"
    assert good["probability"] == pytest.approx(test["probability"], abs=1e-6)
    assert "\n" not in bad["error"] and bad["code"] == "unsupported_media"
    assert served.serving("predict", "in/good.png").status == 0


def test_starting_again_says_so_and_another_archive_is_an_error(served: Site, packed: Path) -> None:
    again = served.serving("start")
    assert again.status == 0 and again.out.startswith("already running")
    remade(packed, served.folder / "model_store" / "other.mar", lambda root: None, sealed=True)
    other = served.serving("start", "--models", "other.mar")
    assert other.status == 1 and "start with --replace" in other.error and other.error.count("\n") == 1
    assert served.serving("status").status == 0


def test_the_log_is_quiet_about_requests_that_go_well(served: Site, golden: archive.Golden) -> None:
    logs = [served.folder / "logs" / str(served.port) / name for name in ("model_log.log", "ts_log.log", "console.log")]
    before = [path.stat().st_size for path in logs]
    for image in golden.images[:20]:
        assert post(served.instance(), image.tobytes(), RAW).status_code == 200
    assert [path.stat().st_size for path in logs] == before
    assert "engine onnx" in logs[0].read_text()
    assert "TorchServe 0.12.0: its frames are read and written in one pass" in logs[0].read_text()


GREY = np.arange(784, dtype=np.uint8).reshape(28, 28)
PNG = picture(Image.fromarray(GREY))
JSON = "application/json"
HOSTILE: dict[str, tuple[bytes, str | None, int]] = {
    "empty": (b"", None, 400),
    "truncated PNG": (PNG[:-30], "image/png", 400),
    "783 numbers": (json.dumps({"features": [1] * 783}).encode(), JSON, 400),
    "784 strings": (json.dumps({"features": ["1"] * 784}).encode(), JSON, 400),
    "NaN": (b'{"features": [' + b"NaN," * 783 + b"1]}", JSON, 400),
    "1e400": (b'{"features": [' + b"1e400," * 783 + b"1]}", JSON, 400),
    "wrongly nested": (json.dumps({"features": [[[1] * 784]]}).encode(), JSON, 400),
    "deeply nested": (b"[" * 100_000 + b"]" * 100_000, JSON, 400),
    "not JSON": (b'{"features": ', JSON, 400),
    "huge PNG": (picture(Image.new("1", (20_000, 20_000))), "image/png", 413),
    "GIF": (picture(Image.fromarray(GREY), "GIF"), "image/gif", 415),
    "text": (b"hello, student", "text/plain", 415),
}
GOOD: dict[str, tuple[bytes, str | None]] = {
    "raw": (GREY.tobytes(), RAW),
    "PNG": (PNG, None),
    "16-bit PNG": (picture(Image.fromarray(GREY.astype(np.uint16) << 8)), "image/png"),
    "CMYK JPEG": (picture(Image.new("CMYK", (40, 30), (10, 200, 30, 0)), "JPEG"), "image/jpeg"),
    "features": (json.dumps({"features": GREY.flatten().tolist()}).encode(), JSON),
}


def test_hostile_requests_hurt_nobody_but_themselves(served: Site) -> None:
    """All of them among good ones, at once: each its own 4xx in our words, no 5xx, the same worker before and after."""
    instance, before = served.instance(), served.pids()
    good = cycle(GOOD.items())
    work: list[tuple[str, tuple[bytes, str | None], int]] = []
    for name, (body, kind, status) in [*HOSTILE.items()] * 3:
        work += [(name, (body, kind), status)] + [(label, one, 200) for label, one in (next(good), next(good))]

    def send(item: tuple[str, tuple[bytes, str | None], int]) -> tuple[str, requests.Response, int]:
        name, (body, kind), status = item
        # Headers that once made upstream's BaseHandler describe or explain instead of predicting.
        return name, post(instance, body, kind, describe="True", explain="True"), status

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, work))
    for name, answer, status in answers:
        assert answer.status_code == status, f"{name}: {answer.status_code} {answer.text[:200]}"
        if status == 200:
            assert len(answer.json()["prediction"][0]) == 10
        else:
            found = answer.json()
            assert set(found) == {"error", "code", "request_id"}, name
            assert found["request_id"] == answer.headers["x-request-id"] and "\n" not in found["error"]
    assert served.pids() == before


def test_a_body_beyond_the_limit_gets_torchserves_own_413(served: Site) -> None:
    before = served.pids()
    answer = post(served.instance(), b"\0" * 50_000_000, RAW)
    assert (answer.status_code, answer.content) == (413, b"")
    assert served.pids() == before and post(served.instance(), PNG).status_code == 200


def test_the_metrics_port_tells_everything(served: Site) -> None:
    """Each metric in the form that docs/metrics.md says, after a miss, a hit, a bypass and a refusal."""
    for headers in ({}, {}, {"Cache-Control": "no-cache"}):
        assert post(served.instance(), PNG, **headers).status_code == 200
    assert post(served.instance(), b"no image").status_code == 415

    def scraped() -> dict[str, dict[str, float]]:
        text = requests.get(f"http://127.0.0.1:{served.port + 2}/metrics", timeout=5).text
        lines = re.findall(r'(?m)^(\w+)\{([^}]*ModelName="student"[^}]*)\} ([0-9.eE+-]+)$', text)
        found: dict[str, dict[str, float]] = {}
        for name, labels, value in lines:
            found.setdefault(name, {})[labels] = float(value)
        return found

    forms = {name: ("_bucket", "_sum", "_count") if metric.buckets else ("",) for name, metric in METRICS.items()}
    expected = {name + end for name, ends in forms.items() for end in ends}

    def settled() -> bool:
        """What a worker emits at once, the server reads line by line."""
        found = scraped()
        if not expected <= found.keys() or "unsupported_media" not in str(found["distillery_refusals_total"]):
            return False
        sums = {name: sum(values.values()) for name, values in found.items()}
        counted = sums["distillery_batch_requests_sum"] == sums["distillery_requests_total"] >= 4
        infinite = [n for labels, n in found["distillery_batch_seconds_bucket"].items() if 'le="+Inf"' in labels]
        return counted and infinite == list(found["distillery_batch_seconds_count"].values())

    until(settled, "all metrics, of all requests")
    found = scraped()
    for name, metric in METRICS.items():
        label = "le" if metric.buckets else metric.label
        assert all(f'{label}="' in labels for labels in found[name + forms[name][0]]), name
    for name in ("hits", "misses", "bypassed"):
        assert sum(found[f"distillery_cache_{name}_total"].values()) >= 1
    assert next(iter(found["distillery_resident_bytes"].values())) > 5e7


@contextlib.contextmanager
def in_hand(site: Site, golden: archive.Golden) -> Iterator[list[Future[requests.Response]]]:
    """Requests of 256 images each, all of them sent; the server needs a second or more to answer them."""
    body = json.dumps({"features": golden.images.reshape(64, -1).tolist() * 4})
    instance, count, fresh = site.instance(), 60, {"Cache-Control": "no-store"}
    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(post, instance, body, JSON, **fresh) for _ in range(count)]
        until(lambda: (instance.clients() or 0) + sum(map(Future.done, answers)) >= count, "all of them sent")
        assert not all(map(Future.done, answers))
        yield answers


def test_scaling_up_and_down_loses_no_request(served: Site, golden: archive.Golden) -> None:
    first = served.pids()
    assert served.serving("scale", "2").status == 0
    assert ready(served, 2)()
    assert first[0] in served.pids(), "the worker that was there stays"
    with in_hand(served, golden) as answers:
        down = served.serving("scale", "1", "--drain", "90")
    assert down.status == 0 and "busy" not in down.error
    assert ready(served, 1)()
    assert [answer.result().status_code for answer in answers] == [200] * len(answers)
    again = served.serving("scale", "1")
    assert again.status == 0 and "1 workers READY" in again.out


def test_the_plain_management_call_gives_two_ready_workers(served: Site) -> None:
    management = served.instance().management()
    url = f"{management.url}/models/student?min_worker=2&synchronous=true"
    answer = management._session.put(url, timeout=60)
    assert answer.status_code == 200
    assert management.describe("student").ready == 2
    assert served.serving("status").status == 0
    assert served.serving("scale", "1").status == 0


def test_a_worker_that_dies_is_seen_and_comes_back(served: Site) -> None:
    pid = served.pids()[0]
    os.kill(pid, signal.SIGKILL)
    found = until(lambda: (one := served.serving("status", "--json")).status == 1 and one.json, "status not ready")
    assert found["running"] and not found["ready"] and found["problems"]
    until(ready(served, 1), "a new worker READY")
    assert served.pids() != [pid]
    assert served.serving("predict", "--index", "0").status == 0


def test_what_replacing_and_stopping_leave(fresh: Site, packed: Path, golden: archive.Golden) -> None:
    """Requests in hand are answered, then all is gone: processes, ports, keys. Twice is as good as once."""
    remade(packed, fresh.folder / "model_store" / "other.mar", lambda root: None, sealed=True)
    assert fresh.serving("start", "--models", "other.mar").status == 0
    other = fresh.serving("status", "--json").json
    replaced = fresh.serving("start", "--replace", "--no-token")
    assert replaced.status == 0 and replaced.out.startswith("started: "), replaced.error
    assert not alive(other["pid"])
    instance = fresh.instance()
    status = fresh.serving("status", "--json").json
    assert status["digest"] == archive.read(packed).digest != other["digest"]
    pids = [status["pid"], *(worker["pid"] for worker in status["workers"])]
    assert requests.post(f"{instance.inference}/predictions/student", PNG, timeout=10).status_code == 200, "no token"

    with in_hand(fresh, golden) as answers:
        stopped = fresh.serving("stop", "--drain", "90")
    assert [answer.result().status_code for answer in answers] == [200] * len(answers)
    assert (stopped.status, stopped.out) == (0, "stopped\n")
    assert not any(psutil.pid_exists(pid) and alive(pid) for pid in pids)
    assert not instance.key_file.exists()
    with pytest.raises(requests.ConnectionError):
        requests.get(instance.inference, timeout=5)
    again = fresh.serving("stop")
    assert (again.status, again.out) == (0, "not running\n")
    assert fresh.serving("status").status == 1


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_commands_of_torchserve_itself(fresh: Site) -> None:
    """As the README gives them; our `status` and `predict` work on that server, too."""
    flags = ("--start", "--ncs", "--model-store", "model_store", "--models", "student.mar")
    assert fresh.torchserve(*flags, "--ts-config", "config.properties").status == 0
    until(ready(fresh, 1, default=True), "READY")
    assert (fresh.folder / "key_file.json").is_file() and (fresh.folder / "logs" / "ts_log.log").is_file()
    assert fresh.serving("predict", "--index", "0", "1", default=True).status == 0
    assert fresh.serving("start", default=True).out.startswith("already running")
    pids = fresh.pids(default=True)
    assert "TorchServe has stopped." in fresh.torchserve("--stop").out
    until(lambda: not any(map(alive, pids)), "the workers gone")
    until(lambda: fresh.serving("stop", default=True).status == 0, "the ports free again")

    bare = fresh.torchserve("--start", "--models", "student.mar", TS_CONFIG_FILE="config.properties")
    assert bare.status == 0, bare.out
    until(ready(fresh, 1, default=True), "READY")
    assert fresh.serving("stop", default=True).out == "stopped\n"

    assert fresh.serving("start", default=True).status == 0
    pid = fresh.serving("status", "--json", default=True).json["pid"]
    assert "TorchServe has stopped." in fresh.torchserve("--stop").out
    until(lambda: not alive(pid), "ours ended by theirs")


def test_a_touched_archive_is_refused_by_the_worker_itself(fresh: Site, packed: Path) -> None:
    touched(packed, fresh.folder / "model_store" / "student.mar")
    ours = fresh.serving("start")
    assert ours.status == 1 and "student.pt was touched" in ours.error and ours.error.count("\n") == 1
    check = fresh.serving("check", "model_store/student.mar", default=True)
    assert check.status == 1 and "student.pt was touched" in check.error and check.error.count("\n") == 1

    flags = ("--start", "--ncs", "--model-store", "model_store", "--models", "student.mar")
    fresh.torchserve(*flags, "--ts-config", "config.properties")
    log = fresh.folder / "logs" / "model_log.log"
    until(lambda: log.is_file() and "student.pt was touched" in log.read_text(), "the worker's refusal in its log")
    assert "refused to serve: " in log.read_text()
    status = fresh.serving("status", "--json", default=True)
    assert status.status == 1 and not status.json["ready"]
    assert fresh.serving("stop", default=True).status == 0


def broken(code: str) -> Callable[[Path], None]:
    """A change that puts code above the handler's."""

    def change(root: Path) -> None:
        entry = root / "student_handler.py"
        entry.write_text(code + "\n" + entry.read_text())

    return change


@pytest.fixture
def failing(fresh: Site, packed: Path) -> Iterator[Callable[[str], str]]:
    """`start` with an archive whose code fails; its error."""

    def start(code: str) -> str:
        remade(packed, fresh.folder / "model_store" / "student.mar", broken(code), sealed=True)
        done = fresh.serving("start")
        assert done.status == 1
        error = [line for line in done.error.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        return error[0]

    yield start
    assert not [process for process in fresh.folder.rglob(".model_server.pid") if alive(int(process.read_text()))]
    assert not (fresh.folder / "logs" / str(fresh.port) / "key_file.json").exists()


def test_start_fails_at_once_with_the_workers_own_error(failing: Callable[[str], str]) -> None:
    assert "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'" in failing("import no_such_module")
    assert "without a word" in failing("import os; os._exit(7)")


def test_a_taken_port_is_one_line(fresh: Site) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", fresh.port + 1))
        holder.listen()
        done = fresh.serving("start")
        assert done.status == 1
        assert (
            done.error
            == f"error: port {fresh.port + 1} is taken: stop what holds it, or choose other ports with --port\n"
        )
        assert fresh.serving("stop").status == 1, "what holds it is not ours to end"
