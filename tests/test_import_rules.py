"""Each import contract catches its breach: a copy of the tree gets one wrong line, and lint-imports must name it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BREACHES = {
    "training imports serving": (
        "training/schedule.py",
        "import serving.client",
        "training and serving stand on handler, never on each other",
    ),
    "serving imports training": (
        "serving/client.py",
        "import training.schedule",
        "training and serving stand on handler, never on each other",
    ),
    "handler imports training": (
        "handler/errors.py",
        "import training.schedule",
        "training and serving stand on handler, never on each other",
    ),
    "an upward import in the archive": (
        "handler/contract.py",
        "import handler.service",
        "inside the archive, code points downward",
    ),
    "a stray file in the archive": (
        "handler/stray.py",
        "",
        "inside the archive, code points downward",
    ),
    "a library that a worker lacks": (
        "handler/networks.py",
        "import torchvision",
        "the archive carries no library a bare worker lacks",
    ),
    "captum outside of explanations": (
        "handler/engines.py",
        "import captum",
        "the archive carries no library a bare worker lacks",
    ),
    "torch outside the model layer": (
        "handler/cache.py",
        "import torch",
        "only the model layer knows torch",
    ),
    "a circle": (
        "serving/management.py",
        "import serving.operate",
        "no package has a circle inside",
    ),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    shutil.copy("pyproject.toml", folder)
    for top in ("handler", "training", "serving"):
        shutil.copytree(top, folder / top, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_tree_keeps_them(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_caught(tree: Path, breach: str) -> None:
    name, line, contract = BREACHES[breach]
    path = tree / name
    before = path.read_text() if path.exists() else None
    path.write_text((before or "") + f"\n{line}\n")
    try:
        done = lint(tree)
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert done.returncode == 1
    # Either the contract is shown as broken, or (exhaustive layers) its configuration no longer fits.
    assert f"{contract} BROKEN" in " ".join(done.stdout.split()) or "stray" in done.stdout + done.stderr, done.stdout
