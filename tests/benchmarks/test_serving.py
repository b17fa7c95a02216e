"""benchmarks/serving: what is sent, what is counted from when, what is compared with what."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving import closed, generator, heavy, payloads, render, rounds, summary
from benchmarks.serving.__main__ import main
from benchmarks.serving.bench import Bench, Point
from benchmarks.serving.contestants import CONTESTANTS, Contestant, nothing
from benchmarks.serving.environments import PEERS
from benchmarks.serving.payloads import WIRES, Pool
from benchmarks.serving.processes import Alive
from benchmarks.serving.stage import Stage
from benchmarks.serving.traffic import Traffic
from handler.bundle import verify
from handler.choice import read_evidence
from handler.errors import DistilleryError
from serving import driver
from serving.driver import Drive
from training import measure


@contextmanager
def answering(answer: Callable[[bytes], bytes | None], protocol: str = "HTTP/1.1", status: int = 200) -> Iterator[int]:
    """The port of a server that answers each body with another one, or breaks the connection (None)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol
        wbufsize = 65536  # head and body leave together

        def do_POST(self) -> None:
            body = answer(self.rfile.read(int(self.headers["Content-Length"])))
            if body is None:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def requests(count: int) -> list[bytes]:
    return [driver.request("/", "text/plain", str(i).encode()) for i in range(count)]


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
def test_every_request_gets_its_own_answer(protocol: str) -> None:
    with answering(lambda body: b"re: " + body, protocol) as port:
        found = driver.drive(port, requests(200), np.zeros(200), connections=7, wait_s=60)
    assert found.status.tolist() == [200] * 200
    assert found.bodies == [b"re: %d" % i for i in range(200)]
    assert (found.sent <= found.done).all() and (found.done <= found.ended).all()


def test_a_broken_connection_loses_its_own_request_only() -> None:
    with answering(lambda body: None if int(body) % 10 == 3 else body) as port:
        found = driver.drive(port, requests(50), np.zeros(50), connections=4, wait_s=60)
    assert [i for i in range(50) if found.status[i] != 200] == [3, 13, 23, 33, 43]
    assert np.isnan(found.done[[3, 13]]).all()
    assert found.ended < 60, "nobody waits for what is lost"


def test_no_request_leaves_before_its_time_and_all_are_waited_for() -> None:
    times = driver.arrivals(rate=500, seconds=1, seed=0)
    with answering(lambda body: body) as port:
        found = driver.drive(port, requests(len(times)), times, connections=20, wait_s=60)
    assert (found.status == 200).all()
    assert (found.sent >= times).all()


def drive(times: list[float], sent: list[float], done: list[float], ended: float) -> Drive:
    arrays = [np.array(values) for values in (times, sent, done)]
    status = np.where(np.isnan(arrays[2]), driver.LOST, 200)
    return Drive(arrays[0], arrays[1], arrays[2], status, [b""] * len(times), ended, 0.0)


def test_latency_counts_from_the_scheduled_time_and_the_lost_wait_to_the_end() -> None:
    nan = float("nan")
    found = drive([0.0, 0.1, 0.2], [0.0, 0.9, nan], [0.8, 1.0, nan], ended=5.2)
    assert found.latencies.tolist() == pytest.approx([0.8, 0.9, 5.0])
    figures = summary.open_loop(found)
    assert figures["p50_ms"] == pytest.approx(900) and figures["requests_per_s"] == pytest.approx(2 / 5.2)
    assert figures["late_ms_p99"] > 4000
    found.status[1] = 503
    assert summary.open_loop(found)["requests_per_s"] == pytest.approx(1 / 5.2), "a refusal is no answer"


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_a_refusal_does_not_count_as_speed(traffic: Traffic) -> None:
    files = traffic.bodies_file("raw"), traffic.order_file("unique")
    with answering(lambda body: b"no", status=503) as port:
        probes = requests(len(closed.probe_times(2)))
        figures, _ = closed.measure(f"http://127.0.0.1:{port}/", port, 2, 2, ("text/plain", *files, 0), probes)
    assert figures["requests"] == figures["refused"] > 0 and figures["requests_per_s"] == 0


def test_arrivals_are_a_poisson_process() -> None:
    times = driver.arrivals(rate=1000, seconds=50, seed=3)
    gaps = np.diff(times)
    assert (gaps > 0).all() and times[-1] < 50
    assert len(times) == pytest.approx(50_000, rel=0.02)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.02)
    assert driver.arrivals(1000, 50, 3).tolist() == times.tolist()


@given(st.binary(max_size=200), st.integers(0, 300), st.booleans(), st.lists(st.integers(1, 50), max_size=5))
def test_an_answer_is_read_once_it_is_whole(body: bytes, cut: int, chunked: bool, sizes: list[int]) -> None:
    if chunked:
        places = np.cumsum([0, *sizes]).tolist()
        parts = [part for part in (body[a:b] for a, b in zip(places, [*places[1:], len(body)], strict=True)) if part]
        framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        head = b"HTTP/1.1 503 No\r\ntransfer-encoding: Chunked\r\n\r\n"
    else:
        framed, head = body, b"HTTP/1.1 503 No\r\nContent-Length: %d\r\nconnection: Close\r\n\r\n" % len(body)
    whole = head + framed
    assert driver.read(whole) == driver.Reply(503, b"".join(parts) if chunked else body, chunked)
    assert driver.read(whole[: min(cut, len(whole) - 1)]) is None


def test_the_pool_holds_no_image_twice_and_changes_only_a_corner() -> None:
    images = np.full((10_000, 4, 5, 1), 200, np.uint8)
    pool = payloads.stamped(images)
    assert len(np.unique(pool.reshape(len(pool), -1), axis=0)) == len(pool) == 30_000
    assert (pool[:, :-1] == 200).all() and (pool[:, -1, :-4] == 200).all()
    assert pool[:, -1, -4:].max() < 16


def test_repeats_follow_zipfs_law() -> None:
    trace = payloads.zipf(1000, 50_000, 1.0, seed=1)
    counts = np.sort(np.bincount(trace, minlength=1000))[::-1]
    assert counts.sum() == 50_000 and trace.max() < 1000
    share = 1 / (1 / np.arange(1, 1001)).sum()
    assert counts[0] / 50_000 == pytest.approx(share, rel=0.1)
    assert counts[9] / counts[0] == pytest.approx(0.1, rel=0.2)
    assert trace.tolist() == payloads.zipf(1000, 50_000, 1.0, seed=1).tolist()
    assert trace.tolist() != payloads.zipf(1000, 50_000, 1.0, seed=2).tolist()


@pytest.fixture
def traffic(tmp_path: Path) -> Traffic:
    images = payloads.stamped(np.zeros((30, 28, 28, 1), np.uint8))
    return Traffic(Pool(images, np.arange(90) % 10), tmp_path, 1.0, seed=0)


def test_answers_are_judged_by_the_class_they_tell(traffic: Traffic) -> None:
    bodies = [b'{"class_id": [0]}', b'{"class_id":[7]}', b"{}", b"no", b""]
    found = drive([0.0] * 5, [0.0] * 5, [1.0] * 4 + [float("nan")], 1.0)
    found.bodies[:], found.status[3] = bodies, 503
    verdict = traffic.judge(found, np.arange(5), ceiling=False)
    assert verdict == {"refused": 1, "lost": 1, "judged": 3, "wrong": 2}
    assert traffic.judge(found, np.arange(5), ceiling=True)["judged"] == 0
    traffic.pool.classes[1] = payloads.LEVEL
    assert traffic.judge(found, np.arange(5), ceiling=False)["wrong"] == 1


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_so_many_requests_are_repeats_and_the_others_come_once_a_lap(share: float) -> None:
    trace = payloads.repeats(4000, share, seed=1)
    known = trace < payloads.HOT
    assert known.mean() == pytest.approx(share, abs=1e-3) and len(np.unique(trace[known])) == payloads.HOT
    fresh = trace[~known].tolist()
    assert sorted(fresh) == (list(range(payloads.HOT, 4000)) if share < 1 else [])


@pytest.mark.parametrize("kind", ["unique", "zipf"])
def test_wrk_sends_the_pool_in_the_order_given(traffic: Traffic, kind: str) -> None:
    seen: list[bytes] = []

    def record(body: bytes) -> bytes:
        if body != b"probe":
            seen.append(body)
        return b'{"class_id":[0]}'

    files = traffic.bodies_file("png"), traffic.order_file(kind)
    with answering(record) as port:
        probes = [driver.request("/", "text/plain", b"probe")] * len(closed.probe_times(2))
        arguments = ("image/png", *files, 85)
        figures, judged = closed.measure(f"http://127.0.0.1:{port}/", port, 1, 2, arguments, probes)
    assert figures["requests"] <= len(seen) <= figures["requests"] + 1 and seen
    assert figures["refused"] == figures["lost"] == 0 and (judged.status == 200).all()
    wanted = [WIRES["png"][1](traffic.pool.images[place]) for place in traffic.places(kind, 85, len(seen))]
    assert seen == wanted


def record(name: str, number: int, speed: float, clients: int = 8, **more: float) -> dict[str, object]:
    point = {"contestant": name, "round": number, "form": "raw", "traffic": "unique", "clients": clients, "rate": 0.0}
    figures = {"p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0, "client_cpu": 0.1}
    counts = {"requests": 10, "refused": 0, "lost": 0, "judged": 5, "wrong": 0}
    return {**point, **figures, **counts, "requests_per_s": speed, **more}


RECORDS = [
    *(record("mosec", i, speed) for i, speed in enumerate((100.0, 10.0, 40.0))),
    *(record("distillery-throughput", i, speed, refused=1) for i, speed in enumerate((200.0, 30.0, 40.0))),
    *(record("nothing", i, 1000.0, clients=64) for i in range(2)),
]


def test_ratios_are_of_the_same_round() -> None:
    """Medians of the speeds would say 1.0: the rounds differ more than the contestants do."""
    [found] = summary.ratios(RECORDS, "distillery-throughput")
    assert found["contestant"] == "mosec" and found["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert summary.ratios(RECORDS, "fastapi") == []


def test_points_hold_medians_and_sums() -> None:
    mosec = summary.points(RECORDS)[0]
    assert mosec["requests_per_s"] == {"median": 40.0, "min": 10.0, "max": 100.0}
    assert (mosec["rounds"], mosec["requests"], mosec["judged"]) == (3, 30, 15)


def test_open_loops_stay_below_what_one_can_bear() -> None:
    capacities = summary.capacities(RECORDS)
    assert capacities == {"mosec": 40.0, "distillery-throughput": 40.0, "nothing": 1000.0}
    capacities["mosec"] = 20.0
    found = rounds.open_points(capacities, [Point("raw", "unique", n) for n in (1, 8)], [0.2, 0.5, 0.8])
    assert [point.rate for point in found["mosec"]] == [8.0]
    assert [point.rate for point in found["distillery-throughput"]] == [8.0, 20.0, 32.0]
    assert all(point.clients == 0 for points in found.values() for point in points)


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_together_all_are_up_at_once_and_who_falls_is_left_out(
    traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up: set[str] = set()

    @contextmanager
    def seen(stage: Stage, name: str) -> Iterator[Alive]:
        with nothing(stage) as alive:
            up.add(name)
            yield alive
            up.remove(name)

    def absent(stage: Stage) -> AbstractContextManager[Alive]:
        raise DistilleryError("not here")

    for name in ("one", "other", "falling"):
        monkeypatch.setitem(CONTESTANTS, name, Contestant(name, "/", partial(seen, name=name), ceiling=True))
    monkeypatch.setitem(CONTESTANTS, "absent", Contestant("absent", "/", absent))
    stage = Stage(tmp_path, "onnx", 0, tmp_path, tmp_path / "absent", tmp_path, 1)

    class Watched(Bench):
        def measure(self, port: int, contestant: Contestant, point: Point, number: int) -> dict[str, Any]:
            assert up == {"one", "other", "falling"}
            if contestant.title == "falling" and number == 1:
                raise DistilleryError("gone")
            return super().measure(port, contestant, point, number)

    points = [Point("raw", "unique", n) for n in (1, 2)]
    found = rounds.together(Watched(traffic, stage, 1, 0), ["one", "absent", "falling", "other"], points, 2)
    assert found.left_out == {"absent": "not here", "falling": "round 2: gone"}
    measured = [(record["round"], record["clients"], record["contestant"]) for record in found.records]
    assert sorted(measured, key=str) == sorted(
        ((number, n, name) for number in (0, 1) for n in (1, 2) for name in ("one", "other", "falling")
         if name != "falling" or number == 0), key=str,
    )  # fmt: skip
    assert [(number, n) for number, n, _ in measured] == sorted((number, n) for number, n, _ in measured)
    assert all(record["requests_per_s"] > 0 for record in found.records) and not up


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_what_is_due_of_stalls_is_what_chance_gives(share: float) -> None:
    arrivals = np.random.default_rng(0).uniform(0, generator.EVERY_MS, 1_000_000)
    waits = np.maximum(0, generator.STALL_MS - arrivals)
    assert generator.due(share) == pytest.approx(np.quantile(waits, share), abs=1)


def test_the_table_of_contestants_is_sound() -> None:
    for name, contestant in CONTESTANTS.items():
        assert set(contestant.wires.values()) <= set(WIRES), name
        if contestant.environment:
            pins = (PEERS / contestant.environment / "requirements.txt").read_text().split()
            assert pins and all("==" in pin for pin in pins), name


def test_wrong_usage_is_told_apart() -> None:
    for wrong in (["--peers", "nobody"], ["--seconds", "0"], ["--forms", "jpeg"]):
        with pytest.raises(SystemExit) as error:
            main(wrong)
        assert error.value.code == 2


def test_a_missing_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path / "none"), "--peers", "nothing"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_tables_say_what_was_measured(tmp_path: Path) -> None:
    result = {
        "command": "python -m benchmarks.serving",
        "machine": {"cpu": "a processor", "cores": 2, "load_before": 0.0},
        "student": {"network": "separable", "digest": "0123456789abcdef"},
        "settings": {"table": "same-runtime", "rounds": 3, "seconds": 1, "reference": "distillery-throughput"},
        "contestants": {name: CONTESTANTS[name].title for name in ("distillery-throughput", "mosec", "flask")},
        "left_out": {"flask": "round 1: it did not start"},
        "points": summary.points(RECORDS),
        "ratios": summary.ratios(RECORDS, "distillery-throughput"),
        "generator": {
            "closed": {},
            "open": {},
            "stalls": {"stall_ms": 1, "every_ms": 2}
            | {key: {f"p{p}_ms": 0.0 for p in (50, 90, 99)} for key in ("due", "open", "closed")},
        },
    }
    render.write(result, tmp_path / "found.json")
    text = (tmp_path / "found.md").read_text()
    assert "| mosec, batches to 128 | 40 (10–100) |" in text
    assert "| Distillery, a worker a core | 40 (30–200) * |" in text
    assert "| mosec, batches to 128 | 2.00 (1.00–3.00) |" in text
    assert "| mosec, batches to 128 | 30 | 0 | 0 | 15 | 0 |" in text
    assert "Flask, our first service is left out: round 1: it did not start" in text
    assert (tmp_path / "found.raw.unique.png").stat().st_size > 10_000


def test_the_heavy_bundle_is_sound_and_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The handler chooses its micro-batch by what was measured."""
    monkeypatch.setattr(heavy, "SIDE", 8)
    assert heavy.main([str(tmp_path / "bundle")]) == 0
    assert capsys.readouterr().out.strip() == verify(tmp_path / "bundle")["digest"]
    evidence = read_evidence(tmp_path / "bundle")
    assert evidence["onnx"]["latency_ms"]["cpu"].keys() == {str(size) for size in measure.BATCHES}


def test_a_folder_that_is_there_is_not_replaced_by_the_heavy_bundle(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "kept").write_text("kept")
    assert heavy.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: exists already; expected a new folder\n"
    assert (tmp_path / "kept").read_text() == "kept"
