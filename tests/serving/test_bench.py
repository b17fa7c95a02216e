"""`serving bench`: what is sent, what counts, and what becomes of the archive that is tuned."""

import json
from pathlib import Path

import numpy as np
import pytest

from handler.errors import BundleError, DistilleryError, SettingsError
from serving import archive, tune
from serving.archive import Archive
from serving.bench import Figures, Load, Unique, figures
from serving.driver import LOST, Drive
from serving.profiles import with_settings
from tests.bundles import remade

LOAD = Load(clients=2, seconds=1)
NAN = float("nan")


def drive(sent: list[float], done: list[float], status: list[int], body: bytes = b"") -> Drive:
    count = len(sent)
    return Drive(np.zeros(count), np.array(sent), np.array(done), np.array(status), [body] * count, 2.0, 0.5)


def test_requests_differ_in_the_last_four_bytes_alone(packed: Path) -> None:
    made = archive.read(packed)
    requests = Unique(made)
    sent = [requests[place] for place in range(200)]
    with archive.unpacked(packed) as root:
        images = archive.golden(root).images
    assert len(set(sent)) == 200
    for place, request in enumerate(sent):
        head, _, body = request.partition(b"\r\n\r\n")
        assert body[:-4] == images[place % 64].tobytes()[:-4] and len(body) == 784
        assert head.startswith(b"POST /predictions/student HTTP/1.1") and b"Content-Length: 784" in head


def test_latency_counts_from_the_sending_and_what_the_end_cut_off_does_not() -> None:
    found = figures(drive([0.0, 0.5, 1.9, NAN], [0.1, 0.8, NAN, NAN], [200, 200, LOST, LOST]), LOAD)
    assert (found.requests_per_s, found.client_cpu) == (1.0, 0.25)
    assert found.p50_ms == pytest.approx(200) and found.p99_ms == pytest.approx(298)


def test_an_answer_that_is_no_200_or_never_comes_is_an_error() -> None:
    with pytest.raises(DistilleryError, match="1 of 2 answers were no 200, the first: 503 full"):
        figures(drive([0.0, 0.0], [0.1, 0.1], [200, 503], b"full"), LOAD)
    with pytest.raises(DistilleryError, match="3 of 4 requests got no answer"):
        figures(drive([0.0] * 4, [0.1, NAN, NAN, NAN], [200, LOST, LOST, LOST]), LOAD)
    with pytest.raises(DistilleryError, match="2 of 2 requests got no answer"):
        figures(drive([0.0] * 2, [NAN] * 2, [LOST] * 2), LOAD)


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """An archive to tune."""
    return with_settings(packed, {}, tmp_path / "student.mar").path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Archive]:
    """Measurements as arithmetic in the place of a server; which archives were to be measured."""
    asked: list[Archive] = []

    def visit(made: Archive, load: Load, config: Path) -> Figures:
        assert archive.read(made.path) == made
        asked.append(made)
        speed = 1000.0 + (made.settings.batch_size == 8) + 10 * (made.settings.handler.engine == "onnx-int8")
        return Figures(speed, 1.0, 2.0, 0.1)

    monkeypatch.setattr(tune, "visit", visit)
    return asked


def tuned(path: Path, *, write: bool = True, **wanted: list[object]) -> tune.Report:
    return tune.tune(path, LOAD, Path("c"), wanted=wanted, rounds=2, objective="throughput", write=write)


def test_the_best_is_written_into_the_archive_and_the_table_beside_it(own: Path, computed: list[Archive]) -> None:
    before = archive.read(own)
    report = tuned(own)
    after = archive.read(own)
    assert (after.settings.batch_size, after.settings.handler.engine) == (8, "onnx-int8")
    assert report.digest == before.digest != after.digest == report.written
    found = json.loads((own.parent / "student.tune.json").read_text())
    assert found["best"] == {"batch_size": 8, "workers": 1, "threads": 0, "engine": "onnx-int8"}
    assert found["load"] == {"clients": 2, "seconds": 1} and len(found["rows"]) * 2 == len(computed)
    engines = {row["candidate"]["engine"] for row in found["rows"] if row["dimension"] == "engine"}
    assert engines == {"auto", "eager", "onnx", "onnx-int8", "exported", "torchscript"}
    assert {row["candidate"]["batch_size"] for row in found["rows"]} == {1, 8, 16, 32, 64}
    lines = report.text().splitlines()
    assert len(lines) == len(report.rows) + 3 and lines[-1].startswith("best: batchSize 8, workers 1, threads 0, ")
    assert after.digest[:12] in lines[-1]
    assert sorted(path.name for path in own.parent.iterdir()) == ["student.mar", "student.tune.json"]


def test_only_what_is_wanted_is_tried_and_a_dry_run_writes_nothing(own: Path, computed: list[Archive]) -> None:
    before = own.read_bytes()
    report = tuned(own, write=False, batch_size=[8], workers=[1], threads=[0], engine=["auto"])
    assert [made.settings.batch_size for made in computed] == [32, 8, 32, 8]
    assert report.text().endswith("student.mar: not written")
    assert own.read_bytes() == before and [path.name for path in own.parent.iterdir()] == ["student.mar"]


def test_what_is_packed_stays_where_nothing_is_better(own: Path, computed: list[Archive]) -> None:
    before = own.read_bytes()
    report = tuned(own, batch_size=[1, 32], workers=[1, 2], engine=["eager"])
    assert "kept as it is packed" in report.text() and report.written is None
    assert own.read_bytes() == before and json.loads((own.parent / "student.tune.json").read_text())["written"] is None


def test_an_engine_that_costs_accuracy_is_not_tried_unasked(own: Path, computed: list[Archive]) -> None:
    def worse(root: Path) -> None:
        report = json.loads((root / "report.json").read_text())
        report["engines"]["student"]["onnx-int8"]["accuracy"] = 0.85
        (root / "report.json").write_text(json.dumps(report))

    remade(own, own, worse, sealed=True)
    tuned(own, batch_size=[32])
    assert {made.settings.handler.engine for made in computed} == {"auto", "eager", "onnx", "exported", "torchscript"}
    tuned(own, batch_size=[32], engine=["onnx-int8"])
    assert archive.read(own).settings.handler.engine == "onnx-int8", "asked for, it is"


def test_errors_come_before_anything_is_measured(own: Path, computed: list[Archive]) -> None:
    with pytest.raises(SettingsError, match="engine: expected one of"):
        tuned(own, engine=["onxx"])

    def empty(root: Path) -> None:
        (root / "report.json").write_text("{}")

    remade(own, own, empty, sealed=True)
    with pytest.raises(BundleError, match="name some with --engines"):
        tuned(own)
    assert computed == [] and not (own.parent / "student.tune.json").exists()
