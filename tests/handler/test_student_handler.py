"""The wire, end to end but for Java: what each body is answered, alone and in company; and what may not be served."""

import importlib
import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from urllib3.filepost import encode_multipart_formdata

from handler import student_handler
from handler.bundle import FILES, seal
from handler.contract import probabilities
from handler.errors import BundleError, SettingsError
from handler.model import load_model
from handler.options import wishes
from serving.archive import describe
from tests.bundles import LABELS
from tests.handler.payloads import JSON, RAW, Golden, Pixels, b64, dumps, features, huge_png, jpeg, png
from tests.harness import Post, Reply, Worker, multipart, post

MEDIA = 415, "unsupported_media"


def form(*parts: tuple[str, str, bytes]) -> Post:
    """A form that the front end has left to the worker: name, type and value of each part."""
    body, kind = encode_multipart_formdata([(name, ("name.x", value, own)) for name, own, value in parts])
    return post(body, kind)


def forms(image: Pixels) -> dict[str, Post]:
    """All the ways to send one image; the answer must not depend on which."""
    numbers = image.ravel().tolist()
    return {
        "png": post(png(image), "image/png"),
        "png of no type": post(png(image)),
        "png as text": post(png(image), "text/plain"),
        "png as jpeg": post(png(image), "image/jpeg"),
        "png as bytes": post(png(image), RAW),
        "raw": post(image.tobytes(), RAW),
        "raw, type in capitals": post(image.tobytes(), "Application/Octet-Stream; x=y"),
        "part png": multipart(data=("image/png", png(image))),
        "part raw": multipart(data=(RAW, image.tobytes())),
        "part json": multipart(data=(JSON, features(image))),
        "part of no type": multipart(data=("", png(image))),
        "form, png": form(("note", "", b"x"), ("data", "image/png", png(image))),
        "form, raw": form(("data", RAW, image.tobytes())),
        "form, json": form(("data", JSON, features(image))),
        "form, png of no type": form(("data", "", png(image))),
        "form, type in capitals": form(("data", "Application/Octet-Stream; x=y", image.tobytes())),
        "png as curl sends it": post(png(image), "application/x-www-form-urlencoded"),
        "features": post(features(image), JSON),
        "features, charset": post(features(image), "application/json; charset=utf-8"),
        "features, type in lower case": Post(
            {"content-type": JSON + "; charset=utf-8"}, {"body": ("", features(image))}
        ),
        "features, fractions": post(dumps({"features": [n + 0.2 if n < 255 else n - 0.2 for n in numbers]}), JSON),
        "features, rows": post(dumps({"features": [numbers]}), JSON),
        "bare": post(dumps(numbers), JSON),
        "bare, rows": post(dumps([numbers]), JSON),
        "b64 png": post(dumps({"instances": [b64(png(image))]}), JSON),
        "b64 raw": post(dumps({"instances": [b64(image.tobytes())]}), JSON),
        "instances, flat": post(dumps({"instances": [numbers]}), JSON),
        "instances, nested": post(dumps({"instances": [image.tolist()]}), JSON),
        "instances, nested with channel": post(dumps({"instances": [image[:, :, None].tolist()]}), JSON),
        "describe": post(png(image), "image/png", describe="True"),
        "explain": post(png(image), "image/png", explain="False", Explain="True"),  # the first is TorchServe's
        "a header of the part's name": Post({"Data": "x"}, {"data": ("", png(image))}),
    }


def bad() -> dict[str, tuple[Post, tuple[int, str]]]:
    """Bodies that get no prediction, each with its status and code."""
    image = np.zeros((28, 28), np.uint8)
    numbers = [0] * 784
    return {
        "empty": (post(b""), (400, "empty_body")),
        "empty json": (post(b"", JSON), (400, "empty_body")),
        "no row": (Post(), (400, "empty_body")),
        "form": (Post({"Content-Type": "application/x-www-form-urlencoded"}), (400, "empty_body")),
        "other part": (multipart(image=("image/png", png(image))), (400, "empty_body")),
        "form, empty": (form(), (400, "empty_body")),
        "form, other part": (form(("image", "image/png", png(image))), (400, "empty_body")),
        "form, part with nothing": (form(("data", "image/png", b"")), (400, "empty_body")),
        "form of no boundary": (post(b"--x--", "multipart/form-data"), (400, "bad_form")),
        "form of another boundary": (post(b"--y\r\n\r\n--y--", "multipart/form-data; boundary=x"), (400, "bad_form")),
        "form in a form": (form(("data", "multipart/form-data", b"--x--")), MEDIA),
        "urlencoded": (post(b"data=1", "application/x-www-form-urlencoded"), MEDIA),
        "truncated png": (post(png(image)[:-30], "image/png"), (400, "bad_image")),
        "truncated jpeg": (post(jpeg(image)[:-99], "image/jpeg"), (400, "bad_image")),
        "png magic only": (post(png(image)[:8]), (400, "bad_image")),
        "783 bytes": (post(bytes(783), RAW), (400, "bad_shape")),
        "huge png": (post(huge_png(20_000, 20_000), "image/png"), (413, "too_many_pixels")),
        "large png": (post(huge_png(4_001, 4_000), "image/png"), (413, "too_many_pixels")),
        "gif": (post(b"GIF89a" + bytes(20), "image/gif"), MEDIA),
        "gif as png": (post(b"GIF89a" + bytes(20), "image/png"), MEDIA),
        "text": (post(b"hello", "text/plain"), MEDIA),
        "text of no type": (post(b"hello"), MEDIA),
        "json of no type": (post(dumps(numbers)), MEDIA),
        "not json": (post(b'{"features": [', JSON), (400, "bad_json")),
        "not utf-8": (post(b'"\xff"', JSON), (400, "bad_json")),
        "deep": (post(b"[" * 100_000, JSON), (400, "bad_json")),
        "other key": (post(b'{"inputs": []}', JSON), (400, "bad_json")),
        "783 numbers": (post(dumps({"features": numbers[1:]}), JSON), (400, "bad_shape")),
        "strings": (post(dumps({"features": ["0"] * 784}), JSON), (400, "bad_type")),
        "bools": (post(dumps({"features": [True] * 784}), JSON), (400, "bad_type")),
        "NaN": (post(b'{"features": [' + b"0," * 783 + b"NaN]}", JSON), (400, "not_finite")),
        "1e400": (post(b'{"features": [' + b"0," * 783 + b"1e400]}", JSON), (400, "not_finite")),
        "256": (post(dumps({"features": [*numbers[1:], 256]}), JSON), (400, "out_of_range")),
        "nested features": (post(dumps({"features": image.tolist()}), JSON), (400, "bad_shape")),
        "many rows": (post(dumps({"features": [numbers] * 257}), JSON), (413, "too_many_rows")),
        "b64 of text": (post(dumps({"instances": [b64(b"hello")]}), JSON), (400, "bad_shape")),
    }


def key_of(name: str) -> str:
    return "predictions" if "instances" in name or "b64" in name else "prediction"


GOOD_NAMES, BAD = list(forms(np.zeros((28, 28), np.uint8))), bad()


def assert_predicts(reply: Reply, image_index: int, golden: Golden, key: str = "prediction") -> None:
    """The whole answer, key by key in order, against the eager logits that training wrote."""
    expected = probabilities(golden["logits"][image_index : image_index + 1])
    assert reply.status == 200, reply.body
    assert list(reply.json) == [key, "label", "class_id", "source", "model"]
    np.testing.assert_allclose(reply.scores, expected, atol=1e-5)
    assert reply.scores[0].sum() == pytest.approx(1, abs=1e-7)
    assert reply.json["class_id"] == [expected[0].argmax()]
    assert reply.json["label"] == [LABELS[expected[0].argmax()]]
    assert list(reply.json["model"]) == ["name", "version", "digest"]
    assert reply.content_type == reply.headers["content-type"] == JSON


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_every_form_of_an_image_gets_its_prediction(worker: Worker, images: Pixels, golden: Golden, name: str) -> None:
    [first] = worker.ask(forms(images[3])[name])
    assert_predicts(first, 3, golden, key_of(name))
    assert (first.phrase, first.json["source"], first.headers["X-Cache"]) == ("OK", "model", "MISS")
    [second] = worker.ask(forms(images[3])[name])
    assert (second.json["source"], second.headers["X-Cache"]) == ("cache", "HIT")
    assert second.body == first.body.replace(b'"source":"model"', b'"source":"cache"')


@pytest.mark.parametrize("name", BAD)
def test_every_bad_body_gets_its_status_and_code(worker: Worker, name: str) -> None:
    sent, expected = BAD[name]
    for _ in range(2):  # an error is not stored: the second time is as the first
        [reply] = worker.ask(sent)
        assert reply.error == expected
        assert list(reply.json) == ["error", "code", "request_id"]
        assert reply.json["request_id"] == reply.request_id == "id-0"
        assert "\n" not in reply.json["error"] and len(reply.json["error"]) < 250
        assert reply.content_type == JSON
        assert "X-Cache" not in reply.headers
    assert worker.handler.service.cache.counts.hits == 0


def test_a_mixed_batch_answers_each_as_if_it_were_alone(worker: Worker, images: Pixels, golden: Golden) -> None:
    """Every bad body stands between two good ones of different images."""
    sent: list[Post] = []
    for i, (item, _) in enumerate(BAD.values()):
        sent += [post(images[i % 8].tobytes(), RAW), item]
    replies = worker.ask(*sent)
    assert [reply.request_id for reply in replies] == [f"id-{i}" for i in range(len(sent))]
    for i, (good, failed) in enumerate(zip(replies[::2], replies[1::2], strict=True)):
        assert_predicts(good, i % 8, golden)
        assert failed.error == list(BAD.values())[i][1]
    assert worker.handler.service.cache.counts.misses == 2 * len(BAD) - sum(not keyed(item) for item, _ in BAD.values())


def keyed(item: Post) -> bool:
    """Whether a body is of a kind that a codec reads, so that it was looked up before it was decoded."""
    name, (media, body) = next(iter(item.parameters.items()), ("", ("", b"")))
    is_image = body.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
    return name in ("body", "data") and bool(body) and (media == JSON or is_image)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("783 numbers", "features: expected 784 numbers (28×28×1), got 783"),
        ("783 bytes", "expected 784 bytes (28×28×1) or a PNG or JPEG image, got 783 bytes"),
        ("256", "features: expected intensities 0–255, got 256"),
        ("strings", "features: expected 784 numbers (28×28×1), got a string among them"),
        ("many rows", "features: expected at most 256 rows a request, got 257"),
        ("large png", "the image has 4001×4000 pixels; expected at most 16000000 a request"),
        ("other part", "expected a part named 'data', got ['image']"),
    ],
)
def test_an_error_says_what_was_wrong_and_what_was_expected(worker: Worker, name: str, text: str) -> None:
    [reply] = worker.ask(BAD[name][0])
    assert reply.json["error"] == text


def test_several_images_in_one_request_get_an_answer_each(worker: Worker, images: Pixels, golden: Golden) -> None:
    rows = dumps({"features": images.reshape(8, 784).tolist()})
    mixed = dumps({"instances": [b64(png(images[0])), images[1].tolist(), b64(images[2].tobytes())]})
    for_rows, for_mixed = worker.ask(post(rows, JSON), post(mixed, JSON))
    np.testing.assert_allclose(for_rows.scores, probabilities(golden["logits"][:8]), atol=1e-5)
    np.testing.assert_allclose(for_mixed.scores, probabilities(golden["logits"][:3]), atol=1e-5)
    assert len(for_rows.json["label"]) == len(for_rows.json["class_id"]) == 8
    assert next(iter(for_mixed.json)) == "predictions"


@pytest.mark.parametrize("name", [name for name in GOOD_NAMES if "feat" in name or "bare" in name or "inst" in name])
def test_json_that_torchserve_decoded_already_is_answered_alike(
    worker: Worker, images: Pixels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    [as_bytes] = worker.ask(forms(images[0])[name])
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    [decoded] = worker.ask(forms(images[0])[name])
    np.testing.assert_array_equal(decoded.scores, as_bytes.scores)


@pytest.mark.parametrize("name", BAD)
def test_bodies_that_torchserve_could_decode_fail_alike(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    [reply] = worker.ask(BAD[name][0])
    assert reply.error == BAD[name][1]


@pytest.mark.parametrize("control", ["no-cache", "No-Cache", "max-age=0, no-store", "no-cache,no-transform"])
def test_cache_control_bypasses_the_lookup(worker: Worker, images: Pixels, control: str) -> None:
    body = images[0].tobytes()
    worker.ask(post(body, RAW))
    [reply] = worker.ask(Post({"cache-CONTROL": control, "Content-Type": RAW}, {"body": (RAW, body)}))
    assert (reply.json["source"], reply.headers["X-Cache"]) == ("model", "BYPASS")


@pytest.mark.parametrize(("control", "next_time"), [("no-cache", "HIT"), ("no-store", "MISS"), ("max-age=9", "HIT")])
def test_only_no_store_keeps_an_answer_out_of_the_cache(
    worker: Worker, images: Pixels, control: str, next_time: str
) -> None:
    worker.ask(post(images[0].tobytes(), RAW, Cache_Control=control))
    [reply] = worker.ask(post(images[0].tobytes(), RAW))
    assert reply.headers["X-Cache"] == next_time


def test_the_answer_names_the_archive(worker: Worker, root: Path, packed: Path, images: Pixels) -> None:
    archive = describe(root, packed)
    [reply] = worker.ask(post(images[0].tobytes(), RAW))
    assert reply.json["model"] == {"name": archive.name, "version": archive.version, "digest": archive.digest}


def test_the_archive_runs_on_its_own_code(root: Path, images: Pixels, golden: Golden) -> None:
    """The same answers from the code in the archive, and nothing of this repository's among its modules."""
    with Worker(root) as worker:
        module = sys.modules.get(type(worker.handler).__module__)
        for name, sent in forms(images[2]).items():
            assert_predicts(
                worker.ask(sent)[0], 2, golden, "predictions" if "inst" in name or "b64" in name else "prediction"
            )
        for sent, expected in BAD.values():
            assert worker.ask(sent)[0].error == expected
        file = Path(worker.handler.initialize.__code__.co_filename).resolve()
    assert file == root / "student_handler.py"
    assert module is None  # and ours are back


@pytest.mark.usefixtures("faulty")
def test_a_fault_of_ours_is_500_for_its_request_only(
    worker: Worker, images: Pixels, golden: Golden, caplog: Any
) -> None:
    replies = worker.ask(*[post(image.tobytes(), RAW) for image in images[:3]])
    assert [reply.status for reply in replies] == [200, 500, 200]
    assert replies[1].error == (500, "internal")
    assert_predicts(replies[2], 2, golden)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "id-1" in record.getMessage() and record.exc_info[1].args == ("told so",)


def test_a_row_that_cannot_be_read_is_500_for_itself_only(
    worker: Worker, images: Pixels, golden: Golden, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(headers: Any, own: str) -> Any:
        if "BOOM" in headers:
            raise RuntimeError("told so")
        return wishes(headers)

    monkeypatch.setattr(student_handler, "wishes", broken)
    sent = post(images[0].tobytes(), RAW)
    replies = worker.ask(Post({**sent.headers, "BOOM": "1"}, sent.parameters), sent)
    assert replies[0].error == (500, "internal")
    assert_predicts(replies[1], 0, golden)
    assert "id-0" in caplog.text and "told so" in caplog.text


def test_when_the_forward_fails_hits_are_still_answered(
    worker: Worker, images: Pixels, golden: Golden, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(_: Any) -> Any:
        raise MemoryError("CUDA out of memory")

    known, unknown = post(images[0].tobytes(), RAW), post(images[1].tobytes(), RAW)
    worker.ask(known)
    with monkeypatch.context() as patch:
        patch.setattr(worker.handler.service.model, "predict", broken)
        replies = worker.ask(known, unknown, BAD["text"][0])
    assert [reply.status for reply in replies] == [200, 500, 415]
    assert "id-1" in caplog.text and "CUDA out of memory" in caplog.text
    [reply] = worker.ask(unknown)  # and the failure was not stored
    assert_predicts(reply, 1, golden)
    assert reply.headers["X-Cache"] == "MISS"


def test_what_became_of_the_requests_is_counted(worker: Worker, images: Pixels, caplog: Any) -> None:
    """In one line a figure, however many batches there were."""
    caplog.set_level(logging.INFO)
    counted = worker.handler.service.metrics
    counted.scheduled = True  # emitted here, not by the clock
    good = post(images[0].tobytes(), RAW)
    bypass = post(images[0].tobytes(), RAW, Cache_Control="no-cache")
    worker.ask(good)
    worker.ask(good, good, post(images[1].tobytes(), RAW), bypass, post(b""))
    counted.flush()
    here = [record for record in caplog.records if record.thread == threading.get_ident()]  # not an earlier worker's
    lines = [record.getMessage() for record in here if "[METRICS]distillery" in record.getMessage()]
    found = {(line[9:].split(".")[0], line.split("|")[1]): float(line.split(":")[1].split("|")[0]) for line in lines}
    assert len(found) == len(lines)
    own = "#ModelName:student,Level:Model"
    expected = {"requests": 6, "cache_hits": 2, "cache_misses": 2, "cache_bypassed": 1, "cache_deduplicated": 0}
    assert {name: found[f"distillery_{name}_total", own] for name in expected} == expected
    assert found["distillery_refusals_total", f"{own},code:empty_body"] == 1
    classes = {key[1]: n for key, n in found.items() if key[0] == "distillery_predictions_total"}
    assert sum(classes.values()) == 3 and all(labels.startswith(f"{own},class:") for labels in classes)
    assert found["distillery_confidence_count", own] == 3
    for step in ("batch", "lookup", "decode", "inference", "encode"):
        assert found[f"distillery_{step}_seconds_sum", own] > 0
    assert found["distillery_batch_requests_bucket", f"{own},le:1"] == 1
    assert found["distillery_batch_requests_bucket", f"{own},le:8"] == 2
    [resident] = [n for (name, _), n in found.items() if name == "distillery_resident_bytes"]
    assert resident > 1e7


# What may not be served


def altered(root: Path, folder: Path, change: Callable[[Path], None], *, sealed: bool = True) -> Path:
    """A copy of the unpacked archive with a change, its passport made anew or not."""
    copy = folder / "copy"
    shutil.copytree(root, copy)
    change(copy)
    if sealed:
        (copy / FILES.passport).unlink()
        seal(copy, {})
    return copy


def touch(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def configured(root: Path, folder: Path, **settings: Any) -> Path:
    """A copy whose model-config.yaml says something else."""

    def change(copy: Path) -> None:
        path = copy / "model-config.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))

    return altered(root, folder, change)


@pytest.fixture
def in_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in_place, for an altered copy."""
    monkeypatch.setattr(student_handler, "_refuse_foreign_code", lambda root: None)
    return tmp_path


def test_a_touched_archive_is_refused_with_its_reason_in_the_log(root: Path, tmp_path: Path, caplog: Any) -> None:
    copy = altered(root, tmp_path, lambda copy: touch(copy / FILES.contract), sealed=False)
    with pytest.raises(Exception, match=r"contract\.json was touched") as caught, Worker(copy):
        pass
    assert type(caught.value).__name__ == "BundleError"
    assert any(
        r.message.startswith("refused to serve: ") and "contract.json was touched" in r.message for r in caplog.records
    )


def test_code_from_elsewhere_is_refused(root: Path, caplog: Any) -> None:
    with pytest.raises(BundleError, match="PYTHONPATH"), Worker(root, in_place=True):
        pass
    assert "refused to serve" in caplog.text


def test_an_entry_from_elsewhere_is_refused(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student_handler, "__file__", "/elsewhere/student_handler.py")
    with (
        pytest.raises(BundleError, match="student_handler was loaded from /elsewhere"),
        Worker(in_place, in_place=True),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_worker_with_a_gpu_that_torch_does_not_see_serves_on_the_cpu(
    in_place: Path, images: Pixels, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    with Worker(in_place, in_place=True, gpu=1) as worker:
        assert worker.ask(post(images[0].tobytes(), RAW))[0].status == 200
    assert "the server gave this worker GPU 1, but torch sees none: it runs on the CPU" in caplog.text
    assert "device cpu, precision fp32" in caplog.text


def test_a_gpu_beyond_those_that_torch_sees_is_refused(
    in_place: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BundleError, match=r"^GPU 2: torch sees 2"), Worker(in_place, in_place=True, gpu=2):
        pass
    assert "refused to serve: GPU 2: torch sees 2, counted from 0" in caplog.text


def test_a_precision_is_asked_for_in_the_archive(root: Path, in_copy: Path, images: Pixels, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    with Worker(configured(root, in_copy, handler={"precision": "bf16"}), in_place=True) as worker:
        assert worker.handler.service.model.engine == "eager"
        assert worker.ask(post(images[0].tobytes(), RAW))[0].status == 200
    assert "device cpu, precision bf16" in caplog.text


def test_when_memory_runs_out_each_image_that_fits_is_answered(
    worker: Worker, images: Pixels, golden: Golden, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Three at a time are too many, and the second is too large even alone."""
    model = worker.handler.service.model
    real = model.forward

    def forward(batch: Any) -> Any:
        if len(batch) > 2 or (batch == images[1]).all(axis=(1, 2, 3)).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(batch)

    monkeypatch.setattr(model, "micro_batch", 8)
    monkeypatch.setattr(model, "forward", forward)
    replies = worker.ask(*(post(image.tobytes(), RAW) for image in images[:4]))
    assert [reply.status for reply in replies] == [200, 500, 200, 200]
    assert replies[1].error == (500, "internal")
    for i in (0, 2, 3):
        assert_predicts(replies[i], i, golden)
    assert "no memory for 1 images at a time" in caplog.text and "request id-1: " in caplog.text
    assert [reply.status for reply in worker.ask(post(images[5].tobytes(), RAW))] == [200]


def test_other_golden_logits_are_refused(root: Path, in_copy: Path) -> None:
    def change(copy: Path) -> None:
        with np.load(copy / FILES.golden) as file:
            arrays = dict(file)
        arrays["logits"][-1, 2] += 5  # the last image: seen even if no batch is as large
        np.savez(copy / FILES.golden, **arrays)

    with (
        pytest.raises(BundleError, match="golden images differ"),
        Worker(altered(root, in_copy, change), in_place=True),
    ):
        pass


def test_an_unknown_setting_is_refused_by_name(root: Path, in_copy: Path) -> None:
    copy = configured(root, in_copy, handler={"engin": "onnx"})
    with pytest.raises(SettingsError, match="did you mean 'engine'"), Worker(copy, in_place=True):
        pass


def test_the_environment_wins_over_the_archive(
    root: Path, in_copy: Path, monkeypatch: pytest.MonkeyPatch, images: Pixels, caplog: Any
) -> None:
    monkeypatch.setenv("DISTILLERY__HANDLER__ENGINE", "eager")
    monkeypatch.setenv("DISTILLERY__HANDLER__LIMITS__ROWS", "1")
    monkeypatch.setenv("DISTILLERY__TEACHER__EPOCHS", "3")  # a setting of another part of the house
    caplog.set_level(logging.INFO)
    copy = configured(root, in_copy, handler={"engine": "onnx", "limits": {"rows": 9, "pixels": 99}})
    with Worker(copy, in_place=True) as worker:
        assert worker.handler.service.model.engine == "eager"
        assert (worker.handler.service.limits.rows, worker.handler.service.limits.pixels) == (1, 99)
        rows = dumps({"features": images[:2].reshape(2, 784).tolist()})
        assert worker.ask(post(rows, JSON))[0].error == (413, "too_many_rows")
    [line] = [record.getMessage() for record in caplog.records if record.name == "handler.student_handler"]
    assert "engine eager (the settings name it), device cpu" in line and str(worker.manifest) not in line


@pytest.mark.parametrize(
    ("cores", "batch", "config", "expected"),
    [(8, 2, {"minWorkers": 2, "maxWorkers": 4}, 4), (8, 8, {"minWorkers": 3}, 2), (2, 8, {"minWorkers": 4}, 1),
     (8, 8, {}, 8), (8, 8, {"minWorkers": 2, "handler": {"threads": 3}}, 3), (8, 1, {}, 1),
     (8, 1, {"handler": {"threads": 3}}, 3)],
)  # fmt: skip
def test_workers_share_the_cores(
    root: Path,
    in_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    batch: int,
    config: dict[str, Any],
    expected: int,
) -> None:
    asked: list[int] = []

    def spy(*arguments: Any) -> Any:
        root, contract, settings, threads, *others = arguments
        asked.append(threads)
        return load_model(root, contract, settings, 1, *others)

    def change(copy: Path) -> None:
        (copy / "model-config.yaml").write_text(yaml.safe_dump(config))

    monkeypatch.setattr(student_handler, "_cores", lambda: cores)
    monkeypatch.setattr(student_handler, "load_model", spy)
    with Worker(altered(root, in_copy, change), in_place=True, batch_size=batch):
        assert asked == [expected]


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5}, raising=False)
    assert student_handler._cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert student_handler._cores() == 7


def test_each_batch_size_is_warm_before_the_worker_is_ready(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    warmed: list[int] = []

    def spy(*arguments: Any) -> Any:
        model: Any
        model, why = load_model(*arguments)
        predict = model.predict

        def counted(images: Pixels) -> Any:
            seen.append(len(images))
            return predict(images)

        model.warm_up, model.predict = warmed.extend, counted
        return model, why

    monkeypatch.setattr(student_handler, "load_model", spy)
    with Worker(in_place, in_place=True, batch_size=20):
        assert warmed == [1, 2, 4, 8, 16]
        assert seen == [1, 2, 4, 8, 16, 64]  # the golden images, compared at each size and all at once


def test_a_disabled_cache_answers_from_the_model_only(root: Path, in_copy: Path, images: Pixels) -> None:
    copy = configured(root, in_copy, handler={"cache": {"enabled": False}})
    with Worker(copy, in_place=True) as worker:
        for _ in range(2):
            [reply] = worker.ask(post(images[0].tobytes(), RAW))
            assert (reply.json["source"], reply.headers["X-Cache"]) == ("model", "MISS")


def test_rows_of_other_servers_kinds_are_read(worker: Worker, images: Pixels) -> None:
    """Text, numbers and null, as TorchServe's decoding leaves them, and bytes that are no bytearray."""

    class Context:
        def get_request_id(self, index: int) -> str:
            return "id"

        def get_all_request_header(self, index: int) -> dict[str, Any]:
            return {"Content-Type": JSON}

    rows = [{"body": images[0].tobytes()}, {"body": "text"}, {"body": 5}, {"body": None}, {"body": {1}}, {}]
    requests = worker.handler.preprocess(rows, Context())
    assert [request.payload for request in requests] == [images[0].tobytes(), b'"text"', b"5", b"null", b"", b""]
    assert requests[4].error.code == "bad_json"
    assert [request.error for request in requests[:4]] == [None] * 4


def test_phone_photos_are_answered(worker: Worker) -> None:
    """A large colour JPEG on its side: decoded, turned, made grey, shrunk."""
    photo = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, upright = worker.ask(
        post(jpeg(photo, exif=exif)), post(jpeg(photo.transpose(Image.Transpose.ROTATE_270), quality=95))
    )
    np.testing.assert_allclose(turned.scores, upright.scores, atol=0.02)


def test_the_module_can_be_loaded_twice() -> None:
    """TorchServe looks for exactly one class that the module itself defines."""
    from ts.utils.util import list_classes_from_module

    assert [c.__name__ for c in list_classes_from_module(importlib.import_module("handler.student_handler"))] == [
        "StudentHandler"
    ]


def test_requests_ids_and_labels_survive_as_text(worker: Worker) -> None:
    [reply] = worker.ask(post(b"?", "text/\u00fcn"))
    assert "ün" in json.loads(reply.body)["error"]
