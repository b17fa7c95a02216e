"""The C++ program answers as Python does, and fails in one line."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.bundles import LABELS, random_source
from training.evaluate import logits_of
from training.export import Source

pytestmark = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="no cmake or no compiler")


def ran(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built as its CMakeLists.txt says."""
    folder = tmp_path_factory.mktemp("build")
    for step in (["-S", "cpp", "-B", str(folder), f"-DTORCH={torch.__path__[0]}"], ["--build", str(folder)]):
        done = ran("cmake", *step)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "classify"


@pytest.fixture(scope="module")
def student() -> Source:
    return random_source()


def test_a_raw_image_gets_pythons_answer(classify: Path, compiled: Path, student: Source, tmp_path: Path) -> None:
    answers = logits_of(student.network, student.calibration)
    firsts = {int(index): i for i, index in reversed(list(enumerate(answers.argmax(1))))}
    assert len(firsts) > 1, "the images are all answered alike, which proves little"
    for i in firsts.values():
        image, logits = student.calibration[i], answers[i]
        (tmp_path / "image.raw").write_bytes(image.permute(1, 2, 0).contiguous().numpy().tobytes())
        done = ran(classify, compiled, tmp_path / "image.raw")
        assert done.returncode == 0, done.stderr
        label, probability = done.stdout.split()
        expected, index = logits.double().softmax(0).max(0)
        assert label == LABELS[int(index)]
        assert float(probability) == pytest.approx(expected.item(), abs=1e-5)


def test_what_it_cannot_read_is_one_line(classify: Path, compiled: Path, tmp_path: Path) -> None:
    image, garbage = tmp_path / "image.raw", tmp_path / "student.pt2"
    image.write_bytes(b"\0" * 783)
    garbage.write_bytes(b"garbage")
    for given, expected in (
        ((compiled, image), "image.raw: expected 784 bytes, got 783"),
        ((compiled, tmp_path / "none.raw"), "none.raw: cannot be read"),
        ((garbage, image), "error: "),
        ((tmp_path / "none.pt2", image), "error: "),
    ):
        done = ran(classify, *given)
        assert (done.returncode, done.stdout) == (1, "")
        assert expected in done.stderr and done.stderr.count("\n") == 1
    assert ran(classify).returncode == 2
