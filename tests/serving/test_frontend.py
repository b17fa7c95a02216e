"""The repaired frontend as far as files go; that TorchServe runs with it is tests/e2e/test_torchserve.py."""

import os
import subprocess
from pathlib import Path

import pytest

from serving import frontend


@pytest.fixture
def java_home(tmp_path: Path) -> Path:
    """A Java that prints its arguments, in a folder with a name that needs quotes."""
    java = tmp_path / "it's java" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    java.chmod(0o755)
    return java.parents[1]


def test_the_repaired_class_is_found_first_and_nothing_else_changes(java_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a 'b' $c"
    home = frontend.repaired(java_home, folder)
    words = ["-Dx=a b", "-Dy=.:z", "-cp", ".:/ts/frontend/*:/more", "org.pytorch.serve.ModelServer", "", "-f", "$HOME"]
    out = subprocess.run([home / "bin" / "java", *words], capture_output=True, text=True, check=True).stdout
    words[3] = f"{folder}/classes:/ts/frontend/*:/more"
    assert out == "".join(f"<{word}>" for word in words)


def test_only_the_names_of_the_forms_differ(java_home: Path, tmp_path: Path) -> None:
    home = frontend.repaired(java_home, tmp_path / "java")
    found = (home / "classes" / frontend.NAMES).read_bytes()
    assert len(found) < len(frontend._class())
    for form in frontend.FORMS:
        assert form.encode() not in found and form.encode() in frontend._class()
    assert found.count(b"\x01\x00\x01\v") == 2 and b"application/json" in found


@pytest.mark.parametrize("code", [b"", b"\x01\x00\x13multipart/form-data"])
def test_a_torchserve_that_is_not_as_expected_is_left_alone(
    java_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: bytes
) -> None:
    monkeypatch.setattr(frontend, "_class", lambda: code)
    assert frontend.repaired(java_home, tmp_path / "java") == java_home
    assert not (tmp_path / "java").exists()
    assert "TorchServe will take forms apart itself" in caplog.text


def test_where_nothing_may_be_run_the_given_java_is(
    java_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.X_OK)
    assert frontend.repaired(java_home, tmp_path / "java") == java_home
