"""Profiles: defaults that flags overrule, and an archive with other settings, sealed anew."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.bundle import verify
from handler.errors import DistilleryError, SettingsError
from serving import __main__ as command
from serving import archive
from serving.archive import ServeSettings
from serving.profiles import PROFILES, with_settings
from tests.bundles import remade


def test_the_default_is_throughput_and_latency_takes_requests_one_by_one() -> None:
    assert ServeSettings(**PROFILES["throughput"]) == ServeSettings()
    assert ServeSettings(**PROFILES["latency"]).batch_size == 1


@pytest.mark.parametrize(
    ("arguments", "size"),
    [([], 32), (["--profile", "latency"], 1), (["--batch-size", "8"], 8)]
    + [(["--profile", "latency", *flag], 8) for flag in (["--batch-size", "8"], ["batch_size=8"])],
)
def test_flags_win_over_the_profile(bundle: Path, tmp_path: Path, arguments: list[str], size: int) -> None:
    assert command.main(["pack", str(bundle), "--model-store", str(tmp_path), *arguments]) == 0
    assert archive.read(tmp_path / "student.mar").settings == ServeSettings(batch_size=size)


def test_an_unknown_profile_is_wrong_usage() -> None:
    for words in (["pack", "x", "--profile", "fast"], ["start", "--profile", "fast"]):
        with pytest.raises(SystemExit) as caught:
            command.main(words)
        assert caught.value.code == 2


def test_only_the_settings_change_and_the_copy_is_sealed_anew(packed: Path, tmp_path: Path) -> None:
    before = archive.read(packed)
    made = with_settings(packed, {"batch_size": 1, "handler": {"threads": 3}}, tmp_path / "in" / "copy.mar")
    assert made == archive.read(tmp_path / "in" / "copy.mar")
    assert (made.name, made.version) == (before.name, before.version) and made.digest != before.digest
    assert (made.settings.batch_size, made.settings.handler.threads) == (1, 3)
    assert made.settings.handler.cache == before.settings.handler.cache
    with archive.unpacked(packed) as old, archive.unpacked(made.path) as new:
        files = verify(old)["files"], verify(new)["files"]
        assert {name for name in files[0] | files[1] if files[0].get(name) != files[1].get(name)} == {archive.CONFIG}
        assert verify(old)["evidence"] == verify(new)["evidence"]
    assert [path.name for path in tmp_path.rglob("*.mar")] == ["copy.mar"]


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "batch_size": st.integers(1, 256),
        "min_workers": st.integers(1, 2),
        "handler": st.fixed_dictionaries({}, optional={"threads": st.integers(0, 9), "engine": st.just("eager")}),
    },
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


@settings(max_examples=15)
@given(CHANGES)
def test_there_and_back_again_gives_the_same_bytes(packed: Path, room: Path, changes: dict[str, Any]) -> None:
    there = with_settings(packed, changes, room / "there.mar")
    assert with_settings(packed, changes, room / "twice.mar").digest == there.digest
    assert (room / "twice.mar").read_bytes() == (room / "there.mar").read_bytes()
    plain = ServeSettings()
    back = {name: getattr(plain, name) for name in changes if name != "handler"}
    back |= {"handler": {name: getattr(plain.handler, name) for name in changes.get("handler", {})}}
    with_settings(there.path, back, there.path)
    assert there.path.read_bytes() == packed.read_bytes()


def test_settings_that_older_code_does_not_know_are_not_written(packed: Path, tmp_path: Path) -> None:
    def older(root: Path) -> None:
        (root / archive.CONFIG).write_text("minWorkers: 1\nbatchSize: 4\nhandler: {engine: onnx}\n")

    path = remade(packed, tmp_path / "older.mar", older, sealed=True)
    with_settings(path, {"batch_size": 1, "handler": {"threads": 2}}, path)
    with archive.unpacked(path) as root:
        text = (root / archive.CONFIG).read_text()
    assert text == "minWorkers: 1\nbatchSize: 1\nhandler:\n  engine: onnx\n  threads: 2\n"


def test_what_cannot_be_served_or_written_is_refused_and_leaves_the_archive(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="batch_size: expected 1 or more, got 0"):
        with_settings(packed, {"batch_size": 0}, tmp_path / "copy.mar")
    with pytest.raises(SettingsError, match=r"handler\.engine: expected one of"):
        with_settings(packed, {"handler": {"engine": "onxx"}}, tmp_path / "copy.mar")
    (tmp_path / "file").write_text("")
    with pytest.raises(DistilleryError, match=r"file/copy.mar: cannot be written: \w+"):
        with_settings(packed, {"batch_size": 1}, tmp_path / "file" / "copy.mar")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pack_says_what_it_made(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pack", str(bundle), "--model-store", str(tmp_path), "--json"]
    assert command.main([*arguments, "--profile", "latency"]) == 0
    latency = json.loads(capsys.readouterr().out)["digest"]
    changed = with_settings(tmp_path / "student.mar", PROFILES["throughput"], tmp_path / "copy.mar")
    assert command.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == changed.digest != latency
