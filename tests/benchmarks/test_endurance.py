"""benchmarks/endurance: the commands in short, and that each bound is seen when it is broken."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.endurance import faults, hostile, mix, soak
from benchmarks.endurance.__main__ import main
from serving import archive as archives
from tests.harness import Worker, post

GOOD_SOAK: dict[str, Any] = {
    "statuses": {"200": 9, "400": 1}, "lost": 0, "refused_unlike_sent": 0, "wrong": 0,
    "workers": {"before": [1, 2], "after": [1, 2]}, "log": [], "resident": {"1": {"growth": 0.02}},
}  # fmt: skip
GOOD_HOSTILE: dict[str, Any] = {
    "in_process": {"statuses": {"200": 1, "499": 1}, "neighbours_changed": 0, "slowest_batch_s": 0.9},
    "http": {"statuses": {"400": 1}, "slowest_s": 1.0, "workers": {"before": [1], "after": [1]}, "log": []},
}
PHASE = {"p99_ms": 10.0, "not_200": 0, "wrong": 0}
GOOD_FAULT: dict[str, Any] = {"before": PHASE, "during": PHASE | {"p99_ms": 30.0}, "after": dict(PHASE)}
GOOD_FAULT["used_again_after_s"] = 10.0


def changed(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    made: dict[str, Any] = copy.deepcopy(tree)
    *way, last = path.split("/")
    at = made
    for step in way:
        at = at[step]
    at[last] = value
    return made


@pytest.mark.parametrize(
    ("path", "value"),
    [("statuses/503", 1), ("lost", 1), ("refused_unlike_sent", 1), ("wrong", 1), ("workers/after", [1, 3]),
     ("log", ["Traceback"]), ("resident/2", {"growth": 0.021}), ("resident/2", {"growth": None})],
)  # fmt: skip
def test_the_soak_sees_what_is_broken(path: str, value: Any) -> None:
    assert soak.broken(GOOD_SOAK) == []
    assert len(soak.broken(changed(GOOD_SOAK, path, value))) == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [("in_process/statuses/500", 1), ("http/statuses/0", 1), ("http/statuses/500", 1), ("http/slowest_s", 1.1),
     ("in_process/neighbours_changed", 1), ("in_process/slowest_batch_s", 1.1), ("http/workers/after", [2]),
     ("http/log", ["Traceback"])],
)  # fmt: skip
def test_what_hostile_bodies_break_is_seen(path: str, value: Any) -> None:
    assert hostile.broken(GOOD_HOSTILE) == []
    assert len(hostile.broken(changed(GOOD_HOSTILE, path, value))) == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [("during/not_200", 1), ("after/wrong", 1), ("during/p99_ms", 30.1), ("after/p99_ms", 31.0),
     ("used_again_after_s", 10.1), ("used_again_after_s", None)],
)  # fmt: skip
def test_what_a_fault_breaks_is_seen(path: str, value: Any) -> None:
    assert faults.broken(GOOD_FAULT) == []
    assert len(faults.broken(changed(GOOD_FAULT, path, value))) == 1


def test_what_is_meant_to_be_bad_is_refused_and_every_form_is_answered(packed: Path) -> None:
    with archives.unpacked(packed) as root, Worker(root) as worker:
        image = archives.golden(root).images[0]
        bad = [worker.ask(post(body, kind))[0].status for kind, body in mix.bad(image)]
        good = [worker.ask(post(body, kind))[0].status for kind, body in (form(image) for form in mix.FORMS)]
    assert {status // 100 for status in bad} == {4} and set(good) == {200}


def run(bundle: Path, out: Path, kind: str, *flags: str) -> Any:
    missing = [tool for tool in ("wrk", "redis-server") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    status = main([kind, "--bundle", str(bundle), "--out", str(out / "found.json"), *flags])
    found = json.loads((out / "found.json").read_text())
    assert status == int(bool(found["broken"]))
    return found


@pytest.mark.e2e
def test_a_short_soak(bundle: Path, tmp_path: Path) -> None:
    found = run(bundle, tmp_path, "soak", "--requests", "3000", "--settled", "1", "--leg", "2", "--clients", "8")
    assert found["requests"] >= 3000 and found["judged"] > 10
    assert found["refused"] == sum(n for status, n in found["statuses"].items() if status != "200") > 0
    memory = {bound for bound in found["broken"] if "memory" in bound}  # the caches are still filling
    assert set(found["broken"]) == memory


@pytest.mark.e2e
def test_some_hostile_bodies(bundle: Path, tmp_path: Path) -> None:
    found = run(bundle, tmp_path, "hostile", "--bodies", "1500")
    late = {bound for bound in found["broken"] if "an answer after" in bound}  # other tests run beside this one
    assert set(found["broken"]) == late
    inside, http = found["in_process"], found["http"]
    assert sum(inside["statuses"].values()) == 1500 == sum(http["statuses"].values())
