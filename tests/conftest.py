"""What tests of both sides stand on: one random bundle, the archive made of it, and that archive unpacked."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from serving import archive as archives
from tests.bundles import random_bundle, random_source
from training.export import FORMATS
from training.processes import turn

# A busy machine is no failure: examples are bounded in number, not in time.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as training writes it, of a student that has learned nothing."""
    return random_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def packed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That bundle as an archive; tests that touch it work on a copy."""
    return archives.pack(bundle, tmp_path_factory.mktemp("store")).path


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of that bundle compiled, once for all processes, as it takes half a minute; needs a C++ compiler."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    path = root / "compiled" / "student.aoti.pt2"
    path.parent.mkdir(exist_ok=True)
    with turn(root / "compiled.lock"):
        if not path.exists():
            FORMATS["compiled"].write(random_source(), path)
    return path
