"""An environment for each peer, made once: its pinned requirements, and behind them the packages of the running one.

torch, NumPy, Pillow and ONNX Runtime are thus one copy for all: a .pth file puts our packages after the peer's own.
"""

import os
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from handler.errors import DistilleryError

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).parent / "peers"
LIMIT_S = 600  # to install one
FOREIGN = ("DISTILLERY__", "DIST_", "BATCH_SIZE", "PYTHONPATH", "TS_CONFIG_FILE")  # would change what is compared


def python(name: str, folder: Path) -> Path:
    """The Python of the environment `name` below `folder`, made or made anew where its requirements changed."""
    requirements = PEERS / name / "requirements.txt"
    home = folder / name
    wanted, mark = requirements.read_text(), home / "installed"
    found = home / "bin" / "python"
    if not mark.is_file() or mark.read_text() != wanted:
        print(f"installing {' '.join(wanted.split())} into {home}", file=sys.stderr)
        _run([sys.executable, "-m", "venv", "--clear", str(home)], name)
        # What a peer needs of what we have too is of our versions.
        limits = ["--constraint", str(ROOT / "requirements.txt")]
        pip = [str(found), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        _run([*pip, "--requirement", str(requirements), *limits], name)
        [packages] = home.glob("lib/python3*/site-packages")
        (packages / "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        mark.write_text(wanted)
    return found


def clean() -> None:
    """Take out of this process's environment what would change a contestant."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]


def _run(command: Sequence[str], name: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DistilleryError(f"{name}: no environment: {' '.join(str(error).split())[:200]}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise DistilleryError(f"{name}: no environment: {lines[-1].strip()[:200]}")
