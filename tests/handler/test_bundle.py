"""A passport vouches for every file, and for itself; writing is whole or not at all."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from handler.bundle import FILES, atomic, file_digest, seal, text_digest, verify
from handler.errors import BundleError


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    (tmp_path / "student.pt").write_bytes(b"weights")
    seal(tmp_path, {"seed": 7})
    return tmp_path


def test_what_was_sealed_is_verified(sealed: Path) -> None:
    passport = verify(sealed)
    assert passport["evidence"] == {"seed": 7}
    assert passport["files"] == {name: file_digest(sealed / name) for name in ("code/a.py", "student.pt")}
    assert passport["digest"] == seal(sealed, {"seed": 7})


def test_the_digest_stands_for_content_and_evidence(sealed: Path) -> None:
    digest = verify(sealed)["digest"]
    assert seal(sealed, {"seed": 8}) != digest
    (sealed / "student.pt").write_bytes(b"other")
    assert seal(sealed, {"seed": 7}) != digest


def test_byte_code_does_not_count(sealed: Path) -> None:
    (sealed / "code" / "__pycache__").mkdir()
    (sealed / "code" / "__pycache__" / "a.pyc").write_bytes(b"x")
    verify(sealed)


def retouch(root: Path) -> None:
    """Change a file and the passport's entry for it, but not the passport's own digest."""
    (root / "student.pt").write_bytes(b"other")
    passport = json.loads((root / FILES.passport).read_text())
    passport["files"]["student.pt"] = file_digest(root / "student.pt")
    (root / FILES.passport).write_text(json.dumps(passport))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: (root / "code" / "a.py").write_text("2"), "code/a.py was touched"),
        (lambda root: (root / "student.pt").unlink(), r"student\.pt is in the passport and missing"),
        (lambda root: (root / "code" / "b.py").write_text(""), r"code/b\.py is not in the passport"),
        (lambda root: (root / FILES.passport).unlink(), "no readable passport"),
        (lambda root: (root / FILES.passport).write_text("[]"), "no readable passport"),
        (lambda root: (root / FILES.passport).write_text("{}"), "no readable passport"),
        (retouch, "the passport itself was touched"),
    ],
)
def test_what_was_touched_is_refused_by_name(sealed: Path, change: Callable[[Path], None], text: str) -> None:
    change(sealed)
    with pytest.raises(BundleError, match=text):
        verify(sealed)


def test_the_order_of_keys_does_not_matter_to_a_digest() -> None:
    assert text_digest({"a": 1, "b": [2]}) == text_digest({"b": [2], "a": 1}) != text_digest({"a": 1, "b": [3]})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Of the same file only, and not while the process that writes it lives."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    lost, strange = tmp_path / f".a.json.{ended.pid}.part", tmp_path / ".a.json.part"
    written, other = tmp_path / f".a.json.{os.getppid()}.part", tmp_path / f".b.json.{ended.pid}.part"
    for path in (lost, strange, written, other):
        path.write_text("half")
    with atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.json", written, other])
