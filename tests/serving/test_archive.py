"""The archive: the same bytes for the same content, complete, and refused once a byte of it is another."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import handler
from handler.bundle import FILES, file_digest, verify
from handler.errors import BundleError, DistilleryError, SettingsError
from handler.settings import HandlerSettings
from serving import archive
from serving.archive import ServeSettings
from tests.bundles import remade

CODE = Path(handler.__file__).parent
ROOT = Path(__file__).parents[2]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*")) if folder.is_dir() else []


def test_packing_twice_gives_the_same_bytes(bundle: Path, packed: Path, tmp_path: Path) -> None:
    assert archive.pack(bundle, tmp_path).path.read_bytes() == packed.read_bytes()


def test_neither_place_nor_clock_nor_umask_nor_hash_seed_matters(bundle: Path, packed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    command = [sys.executable, "-m", "serving", "pack", str(bundle), "--model-store", "here", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, umask=0o077, capture_output=True, text=True, check=True
    )
    made = json.loads(done.stdout)
    path = tmp_path / made["path"]
    assert path.read_bytes() == packed.read_bytes()
    assert made == {"path": "here/student.mar", "size_bytes": path.stat().st_size, "digest": archive.read(path).digest}


def test_the_archive_holds_bundle_and_code_and_nothing_else(bundle: Path, packed: Path) -> None:
    with archive.unpacked(packed) as root:
        found = {path.relative_to(root).as_posix(): path for path in files(root) if path.is_file()}
        code = {path.relative_to(CODE.parent).as_posix(): path for path in CODE.rglob("*.py")}
        code["student_handler.py"] = code.pop("handler/student_handler.py")
        sources = code | {path.name: path for path in bundle.iterdir() if path.name != FILES.passport}
        assert set(found) == {*sources, FILES.passport, archive.CONFIG, archive.MANIFEST}
        for name, source in sources.items():
            assert found[name].read_bytes() == source.read_bytes(), name


def test_the_passport_lists_every_file_and_keeps_the_bundles_evidence(bundle: Path, packed: Path) -> None:
    with archive.unpacked(packed) as root:
        passport, before = verify(root), verify(bundle)
        names = {path.relative_to(root).as_posix() for path in files(root) if path.is_file()}
        assert set(passport["files"]) == names - {FILES.passport}
    assert passport["evidence"] == {**before["evidence"], "bundle": before["digest"]}
    assert passport["digest"] == archive.read(packed).digest != before["digest"]


def test_the_manifest_is_what_torchserve_reads(packed: Path) -> None:
    with zipfile.ZipFile(packed) as made:
        model = json.loads(made.read(archive.MANIFEST))["model"]
    assert model == {
        "modelName": "student",
        "handler": "student_handler.py",
        "modelVersion": "1.0",
        "configFile": "model-config.yaml",
    }


def test_settings_name_and_version_travel(bundle: Path, packed: Path, tmp_path: Path) -> None:
    own = HandlerSettings(threads=5)
    settings = ServeSettings(batch_size=8, max_workers=3, device_type="gpu", device_ids=(2, 0), handler=own)
    made = archive.pack(bundle, tmp_path, name="other-1", version="2.1", settings=settings)
    assert made == archive.read(tmp_path / "other-1.mar")
    assert (made.name, made.version, made.settings) == ("other-1", "2.1", settings)
    assert made.digest != archive.read(packed).digest
    with zipfile.ZipFile(made.path) as zipped:
        tree = yaml.safe_load(zipped.read(archive.CONFIG))
    assert (tree["batchSize"], tree["maxWorkers"], tree["handler"]["threads"]) == (8, 3, 5)
    assert (tree["deviceType"], tree["deviceIds"]) == ("gpu", [2, 0])


def test_the_defaults_are_those_of_the_documents() -> None:
    tree = ServeSettings().to_dict()
    assert tree.keys().isdisjoint({"deviceType", "deviceIds"})  # TorchServe chooses
    expected = {"minWorkers": 1, "maxWorkers": 2, "batchSize": 32, "maxBatchDelay": 1}
    assert {key: tree[key] for key in expected} == expected
    assert ServeSettings.from_yaml(ServeSettings().to_yaml()) == ServeSettings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_workers": 0}, "min_workers: expected 1 or more, got 0"),
        ({"max_batch_delay": 0}, "max_batch_delay: expected 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size: expected 1 or more, got -1"),
        ({"response_timeout": 0}, "response_timeout"),
        ({"startup_timeout": 0}, "startup_timeout"),
        ({"min_workers": 3}, "max_workers: expected min_workers or more, got 2 < 3"),
        (
            {"device_type": "gpu", "device_ids": (0, 0)},
            r"device_ids: expected different .* from 0, got \[0, 0\]",
        ),
        ({"device_type": "gpu", "device_ids": (1, -1)}, r"device_ids: expected different .* got \[1, -1\]"),
        ({"device_ids": (0,)}, "device_ids: expected device_type gpu with them, got auto"),
        ({"device_type": "cpu", "device_ids": (0,)}, "device_ids: expected device_type gpu with them, got cpu"),
    ],
)
def test_settings_that_torchserve_would_misread_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ServeSettings(**settings)


@pytest.mark.parametrize("text", ["minWorker: 1", "[]", "batchSize: many"])
def test_a_model_config_that_is_not_ours_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        ServeSettings.from_yaml(text)


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to break."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", [FILES.weights, FILES.onnx, FILES.contract, FILES.golden, FILES.report])
def test_a_touched_or_incomplete_bundle_leaves_no_file(copied: Path, tmp_path: Path, name: str) -> None:
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name} was touched") as touched:
        archive.pack(copied, tmp_path / "store")
    assert str(copied) in str(touched.value) and "\n" not in str(touched.value)
    (copied / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is in the passport and missing"):
        archive.pack(copied, tmp_path / "store")
    assert files(tmp_path / "store") == []


def test_a_stowaway_in_the_bundle_is_refused_but_editors_leavings_are_not(copied: Path, tmp_path: Path) -> None:
    (copied / ".DS_Store").write_bytes(b"x")
    archive.pack(copied, tmp_path / "store")
    (copied / "extra.py").write_text("print()")
    with pytest.raises(BundleError, match=r"extra\.py is not in the passport"):
        archive.pack(copied, tmp_path / "store")


def test_a_failure_keeps_the_archive_that_was_there(copied: Path, tmp_path: Path) -> None:
    before = archive.pack(copied, tmp_path / "store").path.read_bytes()
    (copied / FILES.weights).write_bytes(b"x")
    with pytest.raises(BundleError):
        archive.pack(copied, tmp_path / "store")
    assert [path.name for path in files(tmp_path / "store")] == ["student.mar"]
    assert (tmp_path / "store" / "student.mar").read_bytes() == before


@pytest.mark.parametrize("name", ["", "a/b", "../a", "-x", "a b", "ä", "a.b"])
def test_names_that_are_no_names_are_wrong_usage(bundle: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="name '"):
        archive.pack(bundle, tmp_path / "store", name=name)
    assert files(tmp_path / "store") == []


@pytest.mark.parametrize("version", ["", "v1", "1.", "1/2"])
def test_versions_that_torchserve_cannot_address_are_wrong_usage(bundle: Path, tmp_path: Path, version: str) -> None:
    with pytest.raises(SettingsError, match="version '"):
        archive.pack(bundle, tmp_path / "store", version=version)


def test_a_store_that_cannot_be_written_is_one_line(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file, not a folder")
    with pytest.raises(DistilleryError, match=r"store.*: cannot be packed: \w+") as caught:
        archive.pack(bundle, tmp_path / "store")
    assert "\n" not in str(caught.value)


def test_no_bundle_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        archive.pack(tmp_path / "nowhere", tmp_path / "store")


def test_a_failing_archiver_is_told(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DistilleryError, match="torch-model-archiver failed: no message"):
        archive.pack(bundle, tmp_path / "store")
    assert files(tmp_path / "store") == []


@pytest.mark.parametrize("name", ["student.pt", "student_handler.py", "handler/bundle.py", "model-config.yaml"])
def test_a_touched_archive_is_refused(packed: Path, tmp_path: Path, name: str) -> None:
    def append(root: Path) -> None:
        with (root / name).open("ab") as stream:
            stream.write(b"\n")

    path = remade(packed, tmp_path / "touched.mar", append, sealed=False)
    with pytest.raises(BundleError, match=f"{name} was touched") as caught:
        archive.read(path)
    assert str(caught.value).startswith(str(path))


def test_an_added_or_a_missing_file_is_refused(packed: Path, tmp_path: Path) -> None:
    added = remade(packed, tmp_path / "added.mar", lambda root: touch(root / "yaml.py"), sealed=False)
    with pytest.raises(BundleError, match=r"yaml\.py is not in the passport"):
        archive.read(added)
    missing = remade(packed, tmp_path / "missing.mar", lambda root: (root / FILES.golden).unlink(), sealed=False)
    with pytest.raises(BundleError, match=r"golden\.npz is in the passport and missing"):
        archive.read(missing)


def touch(path: Path) -> None:
    path.write_text("")


def test_what_is_no_archive_is_one_line(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such archive"):
        archive.read(tmp_path / "nowhere.mar")
    (tmp_path / "text.mar").write_text("text")
    with pytest.raises(BundleError, match="not an archive"):
        archive.read(tmp_path / "text.mar")
    (tmp_path / "short.mar").write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(BundleError):  # golden.npz, a zip too, is the last whole one in there
        archive.read(tmp_path / "short.mar")
    other = remade(packed, tmp_path / "other.mar", lambda root: (root / archive.MANIFEST).unlink(), sealed=True)
    with pytest.raises(BundleError, match="not an archive of ours"):
        archive.read(other)


def test_golden_images_and_their_labels(packed: Path) -> None:
    with archive.unpacked(packed) as root:
        golden = archive.golden(root)
    assert golden.images.shape == (64, 28, 28, 1) and golden.images.dtype == "uint8"
    assert golden.truth.tolist() == [i % 10 for i in range(64)]
    assert golden.labels[9] == "Ankle boot"


def test_packing_leaves_nothing_behind_and_takes_nothing_away(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp" / "student").mkdir(parents=True)  # torch-model-archiver would delete it
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    digest = file_digest(archive.pack(bundle, tmp_path / "store").path)
    assert files(tmp_path / "tmp") == [tmp_path / "tmp" / "student"]
    assert [path.name for path in files(tmp_path / "store")] == ["student.mar"]
    assert len(digest) == 64
