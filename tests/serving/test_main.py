"""The commands as a user meets them: exit status, one-line errors, JSON."""

import json
from pathlib import Path

import pytest

from handler.errors import DistilleryError
from serving import __main__ as command
from serving import archive, predict, preflight
from serving.arguments import EXAMPLES
from serving.client import Client
from tests.serving.conftest import Stub
from tests.serving.test_client import GOOD, keys

CONFIG = str(Path(__file__).parents[2] / "config.properties")
NOWHERE = ["--config", CONFIG, "--port", "1"]  # ports that no TorchServe of ours has


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([name, "--help"])
    assert caught.value.code == 0
    assert f"example: python -m serving {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_right_usage(name: str) -> None:
    words = EXAMPLES[name].split()
    assert words[:3] == ["python", "-m", "serving"]
    assert command.parse(words[3:]).run.__name__ == f"{name}_command"


@pytest.mark.parametrize(
    "arguments",
    [[], ["nope"], ["pack"], ["scale", "many"], ["stop", "x"], ["pack", "b", "--batch-size", "x"]]
    + [["bench", flag, value] for flag, value in (("--clients", "0"), ("--seconds", "-1"), ("--threads", "x"))],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["pack", "nowhere"], 1, "no such bundle"),
        (["pack", "nowhere", "--name", "a/b"], 2, "name 'a/b'"),
        (["pack", "nowhere", "handler.cache.ttl=3"], 2, "did you mean 'handler.cache.ttl_s'?"),
        (["pack", "nowhere", "handler.cache.ttl_s"], 2, "expected key=value"),
        (["pack", "nowhere", "--engine", "onxx"], 2, "handler.engine: expected one of"),
        (["pack", "nowhere", "--max-batch-delay", "0"], 2, "max_batch_delay: expected 1 or more"),
        (["check", "nowhere.mar"], 1, "no such archive"),
        (["start", *NOWHERE], 1, "no such archive"),
        (["scale", "0", *NOWHERE], 1, "use `python -m serving stop`"),
        (["scale", "2", *NOWHERE], 1, "no TorchServe is listening there"),
        (["predict", *NOWHERE], 2, "expected image files, folders, or --index"),
        (["predict", ".", *NOWHERE], 1, "holds no .png, .jpg, .jpeg file"),
        (["status", "--config", "nowhere"], 1, "run from the project's root"),
        (["bench", "nowhere.mar"], 1, "no such archive"),
        (["bench", "--tune", "--engines", "onxx"], 2, "engine: expected one of"),
    ],
)
def test_errors_are_one_line(arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == status
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(DistilleryError, match="no such bundle"):
        command.main(["pack", "nowhere", "--debug"])


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "check", interrupt)
    assert command.main(["check", "x.mar"]) == 130
    assert capsys.readouterr() == ("", "")


def test_pack_takes_settings_from_flags_then_environment(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTILLERY__HANDLER__THREADS", "3")
    monkeypatch.setenv("DISTILLERY__HANDLER__CACHE__ENTRIES", "5")
    monkeypatch.setenv("DISTILLERY__STUDENT__EPOCHS", "9")  # training's
    arguments = ["pack", str(bundle), "--batch-size", "4", "handler.cache.entries=7", "--engine", "eager", "--json"]
    assert command.main([*arguments, "device_type=gpu", "device_ids=[1, 0]"]) == 0
    made = json.loads(capsys.readouterr().out)
    settings = archive.read(Path(made["path"])).settings
    assert (settings.batch_size, settings.handler.engine, settings.device_ids) == (4, "eager", (1, 0))
    assert (settings.handler.threads, settings.handler.cache.entries) == (3, 7)


def test_status_of_nothing_is_not_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["status", *NOWHERE]) == 1
    assert capsys.readouterr().out == (
        "http://127.0.0.1:1: not running\n  http://127.0.0.1:2: no TorchServe is listening there\n"
    )
    assert command.main(["status", *NOWHERE, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["running"], found["ready"], found["workers"]) == (False, False, [])


def test_stopping_nothing_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["stop", *NOWHERE]) == 0
    assert command.main(["stop", *NOWHERE, "--json"]) == 0
    assert capsys.readouterr().out == 'not running\n{\n  "stopped": false\n}\n'


def test_token_prints_the_token_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["token", "--config", CONFIG]) == 1
    assert "key_file.json: no such file" in capsys.readouterr().err
    keys(tmp_path / "key_file.json", "iii")
    assert command.main(["token", "--config", CONFIG]) == 0
    assert command.main(["token", "--management", "--config", CONFIG]) == 0
    assert capsys.readouterr().out == "iii\nmmm\n"


def test_predict_prints_a_row_for_each_image(
    stub: Stub, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers = [
        (200, GOOD),
        (415, {"error": "not a PNG", "code": "unsupported"}),
        (200, GOOD | {"source": "cache"}),
    ]
    for name in ("b.png", "a.jpg"):
        (tmp_path / "in" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "deep" / name).write_bytes(name.encode())
    arguments = ["predict", "in", "nowhere.png", "--index", "3", "--archive", str(packed), "--url", stub.url]
    assert command.main([*arguments, "--config", CONFIG]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "in/deep/a.jpg shoe 0.750 model 0 0.250",
        "in/deep/b.png error: not a PNG",
        "nowhere.png error: cannot be read: No such file or directory",
        "test image 3 shoe 0.750 cache WRONG: Dress 0 0.250",
    ]
    assert [asked.body for asked in stub.asked[:2]] == [b"a.jpg", b"b.png"]
    assert len(stub.asked[2].body) == 784
    assert "Content-Type" not in stub.asked[0].headers
    assert stub.asked[2].headers["Content-Type"] == "application/octet-stream"


def test_predict_prints_json(stub: Stub, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answers = [(200, GOOD)]
    arguments = ["predict", "--index", "0", "1", "--archive", str(packed), "--url", stub.url, "--config", CONFIG]
    assert command.main([*arguments, "--json", "--top", "1"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["label"], first["probability"], first["truth"]) == ("shoe", 0.75, "T-shirt/top")
    assert first["top"] == {"1": 0.75} and second["truth"] == "Trouser"


def test_an_index_beyond_the_archives_images_is_wrong_usage(packed: Path) -> None:
    assert command.main(["predict", "--index", "64", "--archive", str(packed), "--config", CONFIG]) == 2
    with pytest.raises(DistilleryError, match="holds 64 test images, 0 to 63"):
        predict.test_images(packed, [-1])


def test_labels_name_the_next_best_classes(stub: Stub) -> None:
    stub.answers = [(200, GOOD)]
    with Client(stub.url) as client:
        rows = predict.ask(client, [predict.Input("x", lambda: b"x", None, "shoe")], ("hat", "shoe"), 2)
    assert rows[0]["top"] == {"shoe": 0.75, "hat": 0.25}
    assert " ".join(predict.table(rows).split()) == "x shoe 0.750 model right hat 0.250"
