"""The archive: a bundle plus the code that serves it, in one file that any TorchServe 0.12 loads.

    student.mar = bundle files + handler/ + student_handler.py + model-config.yaml + MAR-INF/ + passport.json

The same bundle, code and settings give the same bytes, wherever and whenever they are packed.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

import handler
from handler.bundle import FILES, atomic, seal, verify
from handler.contract import Contract
from handler.errors import BundleError, DistilleryError, SettingsError
from handler.settings import HandlerSettings, load

ENTRY = "student_handler.py"
CONFIG = "model-config.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The archive's model-config.yaml: delay in milliseconds, timeouts in seconds. The profile is throughput.

    One worker by default, so that a repeated request finds the cache that answered it first;
    its threads are all cores'. More than `min_workers` run only where `serving scale` asks for them. `device_type` auto
    lets TorchServe take a GPU if it sees one; with gpu, `device_ids` are those among which it deals out the workers,
    in turn; none means all.
    """

    min_workers: int = 1
    max_workers: int = 2
    batch_size: int = 32
    max_batch_delay: int = 1
    response_timeout: int = 30
    startup_timeout: int = 120
    device_type: Literal["auto", "cpu", "gpu"] = "auto"
    device_ids: tuple[int, ...] = ()
    handler: HandlerSettings = field(default_factory=HandlerSettings)

    def __post_init__(self) -> None:
        for name in ("min_workers", "batch_size", "max_batch_delay", "response_timeout", "startup_timeout"):
            value = getattr(self, name)
            if value < 1:  # TorchServe takes a delay of 0 for 100 ms, and ignores the others
                raise SettingsError(f"{name}: expected 1 or more, got {value}")
        if self.max_workers < self.min_workers:
            raise SettingsError(
                f"max_workers: expected min_workers or more, got {self.max_workers} < {self.min_workers}"
            )
        ids = list(self.device_ids)
        if len({*ids}) < len(ids) or min(ids, default=0) < 0:
            raise SettingsError(f"device_ids: expected different numbers of GPUs, counted from 0, got {ids}")
        if ids and self.device_type != "gpu":
            raise SettingsError(f"device_ids: expected device_type gpu with them, got {self.device_type}")

    def to_dict(self) -> dict[str, Any]:
        """The settings in TorchServe's spelling, without what is left to TorchServe."""
        tree = {camel(key): value for key, value in dataclasses.asdict(self).items()}
        tree["deviceIds"] = list(self.device_ids)
        return {key: value for key, value in tree.items() if value not in ("auto", [])}

    def to_yaml(self) -> str:
        """The text of model-config.yaml."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "ServeSettings":
        """The settings of a model-config.yaml; SettingsError when it is not one of ours."""
        tree = yaml.safe_load(text)
        if not isinstance(tree, Mapping):
            raise SettingsError(f"expected a mapping of settings, got {tree!r}")
        return load(cls, {_snake(str(key)): value for key, value in tree.items()})


@dataclass(frozen=True)
class Archive:
    """What an archive says of itself; `digest` is its passport's and names the model everywhere."""

    path: Path
    name: str
    version: str
    digest: str
    size_bytes: int
    settings: ServeSettings


@dataclass(frozen=True)
class Golden:
    """Test images uint8 `[N, H, W, C]`, the index of each one's true label, and the labels."""

    images: NDArray[np.uint8]
    truth: NDArray[np.int64]
    labels: tuple[str, ...]


def pack(
    bundle: Path, store: Path, *, name: str = "student", version: str = "1.0", settings: ServeSettings | None = None
) -> Archive:
    """Verify a bundle, add the code, and write `store/name.mar` whole or not at all.

    Raises BundleError for a bundle that is incomplete or touched, DistilleryError for what cannot be written.
    """
    _check(NAME, "name", name, "letters, digits, - and _, such as student")
    _check(VERSION, "version", version, "numbers with dots, such as 1.0")
    path = store / f"{name}.mar"
    try:
        with tempfile.TemporaryDirectory(prefix="distillery-pack-") as folder:
            work = Path(folder)
            passport = _stage(bundle, work / "stage", settings or ServeSettings())
            content = _archive(work, name, version)
            seal(content, {**passport["evidence"], "bundle": passport["digest"]})
            write(content, path)
    except OSError as error:
        raise DistilleryError(f"{error.filename or path}: cannot be packed: {error.strerror or error}") from error
    return read(path)


def read(path: Path) -> Archive:
    """What an archive says of itself, once it is proven untouched."""
    with unpacked(path) as root:
        return describe(root, path)


def describe(root: Path, path: Path) -> Archive:
    """What the unpacked archive in `root`, which came from `path`, says of itself."""
    try:
        model = json.loads((root / MANIFEST).read_text())["model"]
        settings = ServeSettings.from_yaml((root / CONFIG).read_text())
        name, version = model["modelName"], model["modelVersion"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, SettingsError) as error:
        raise BundleError(f"{path}: not an archive of ours: {error}") from None
    return Archive(path, name, version, verify(root)["digest"], path.stat().st_size, settings)


def golden(root: Path) -> Golden:
    """The test images that travel in the unpacked archive in `root`."""
    with np.load(root / FILES.golden, allow_pickle=False) as file:
        return Golden(file["images"], file["labels"], Contract.read(root / FILES.contract).labels)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The archive in a temporary folder, proven untouched; BundleError says which file is not what it was."""
    with tempfile.TemporaryDirectory(prefix="distillery-archive-") as folder:
        root = Path(folder).resolve()
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(root)
        except FileNotFoundError:
            raise BundleError(f"{path}: no such archive: make it with `python -m serving pack`") from None
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise BundleError(f"{path}: not an archive: {error}") from None
        try:
            verify(root)
        except BundleError as error:
            raise BundleError(str(error).replace(str(root), str(path))) from None
        yield root


def write(content: Path, path: Path) -> None:
    """Zip a folder reproducibly: sorted names, one time, one mode, and no compression (zlibs differ)."""
    files = sorted(file for file in content.rglob("*") if file.is_file())
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(content).as_posix(), EPOCH)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, file.read_bytes())


def camel(name: str) -> str:
    """A field of ServeSettings in TorchServe's spelling."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _check(pattern: re.Pattern[str], what: str, value: str, expected: str) -> None:
    if not pattern.fullmatch(value):
        raise SettingsError(f"{what} '{value}': expected {expected}")


def _stage(bundle: Path, stage: Path, settings: ServeSettings) -> dict[str, Any]:
    """Copy bundle, code and settings to where the archiver takes them; returns the bundle's passport."""
    if not bundle.is_dir():
        raise BundleError(f"{bundle}: no such bundle: expected a folder that training made, such as runs/full/bundle")
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(bundle, stage, ignore=unwanted)
    try:
        passport = verify(stage)  # the copy, so that what was proven is what is packed
    except BundleError as error:
        raise BundleError(str(error).replace(str(stage), str(bundle))) from None
    (stage / FILES.passport).unlink()
    shutil.copytree(Path(handler.__file__).parent, stage / "handler", ignore=unwanted)
    (stage / "handler" / ENTRY).rename(stage.parent / ENTRY)
    (stage.parent / CONFIG).write_text(settings.to_yaml())
    return passport


def _archive(work: Path, name: str, version: str) -> Path:
    """Run torch-model-archiver over the stage and open what it made, with the time of day taken out."""
    for folder in ("tmp", "made"):
        (work / folder).mkdir()
    command = [sys.executable, "-P", "-m", "model_archiver.model_packaging", "--model-name", name, "--version", version]
    command += ["--handler", ENTRY, "--extra-files", "stage", "--config-file", CONFIG, "--export-path", "made"]
    # The archiver deletes <temporary folder>/<name>, so it gets a temporary folder of its own.
    env = {**os.environ, "PYTHONPATH": "", "TMPDIR": str(work / "tmp")}
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DistilleryError(f"torch-model-archiver failed: {reason}")
    content = work / "content"
    with zipfile.ZipFile(work / "made" / f"{name}.mar") as made:
        made.extractall(content)
    manifest = json.loads((content / MANIFEST).read_text())
    manifest["createdOn"] = "01/01/1980 00:00:00"
    (content / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return content


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda match: "_" + match.group().lower(), name)
