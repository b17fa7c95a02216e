"""What tests of both sides stand on: one random bundle, the archive made of it, and that archive unpacked."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coverage import Coverage
from hypothesis import HealthCheck, settings

from serving import archive as archives
from tests.bundles import random_bundle, random_source
from training.export import FORMATS
from training.processes import turn

# A busy machine is no failure: examples are bounded in number, not in time.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


TRAINING = Path(__file__).parent / "training"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What is measured is handler/, which has tests of its own; it would slow those of training by a fifth."""
    stopped = []  # pytest-cov has begun two in each process of pytest-xdist, one over the other
    while item.path.is_relative_to(TRAINING) and (measured := Coverage.current()):
        measured.stop()
        stopped.append(measured)
    try:
        return (yield)
    finally:
        for measured in reversed(stopped):
            measured.start()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` as `make` fills it: once for all processes that test side by side."""
    own = factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with turn(root / f"{name}.lock"):
        if not (root / name).exists():
            partial = Path(tempfile.mkdtemp(dir=root))
            make(partial)
            partial.rename(root / name)
    return root / name


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as training writes it, of a student that has learned nothing."""
    return once(tmp_path_factory, "random", random_bundle) / "bundle"


@pytest.fixture(scope="session")
def packed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That bundle as an archive; tests that touch it work on a copy."""
    return once(tmp_path_factory, "store", functools.partial(archives.pack, bundle)) / "student.mar"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of that bundle compiled, which takes half a minute and a C++ compiler."""

    def make(folder: Path) -> None:
        FORMATS["compiled"].write(random_source(), folder / "student.aoti.pt2")

    return once(tmp_path_factory, "compiled", make) / "student.aoti.pt2"
