"""The files of a bundle and the passport that proves them.

A bundle is a folder that training writes; an archive is that folder plus the code. The passport lists the
SHA-256 of every other file and carries the evidence (experiment, seeds, versions, metrics). Its own digest
names the model everywhere: in answers, in cache keys, in logs.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.errors import BundleError


@dataclass(frozen=True)
class BundleFiles:
    """The file names of a bundle, which are those of the archive; of the engines' files some may not be there."""

    weights: str = "student.pt"
    onnx: str = "student.onnx"
    onnx_int8: str = "student.int8.onnx.xz"
    exported: str = "student.pt2"
    compiled: str = "student.aoti.pt2"
    torchscript: str = "student.torchscript.pt"
    contract: str = "contract.json"
    report: str = "report.json"
    golden: str = "golden.npz"
    passport: str = "passport.json"


FILES = BundleFiles()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path`, whole and on disk, or it is gone.

    What a killed process left of the same file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        if not _alive(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    try:
        with contextlib.suppress(PermissionError):  # another user's process
            os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    return True


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_digest(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def seal(root: Path, evidence: Mapping[str, Any]) -> str:
    """Write the passport of all that lies in `root` now; returns its digest."""
    body = {"version": 1, "evidence": dict(evidence), "files": _listing(root)}
    digest = text_digest(body)
    with atomic(root / FILES.passport) as path:
        path.write_text(json.dumps({**body, "digest": digest}, indent=2) + "\n")
    return digest


def verify(root: Path) -> dict[str, Any]:
    """The passport of `root`, once every file is what it says; BundleError names the first that is not."""
    path = root / FILES.passport
    try:
        passport = json.loads(path.read_text())
        digest, files = passport.pop("digest"), passport["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path}: refused: no readable passport") from None
    if text_digest(passport) != digest:
        raise BundleError(f"{path}: refused: the passport itself was touched")
    found = _listing(root)
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            raise BundleError(f"{root}: refused: {name} is in the passport and missing here")
        if name not in files:
            raise BundleError(f"{root}: refused: {name} is not in the passport")
        if files[name] != found[name]:
            raise BundleError(f"{root}: refused: {name} was touched: its SHA-256 is not the passport's")
    return {**passport, "digest": digest}


def _listing(root: Path) -> dict[str, str]:
    """Name → digest of every file but the passport; byte code that an importing worker left does not count."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {name: file_digest(path) for name, path in names.items() if name != FILES.passport}
