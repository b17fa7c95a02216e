"""`check`: an archive that answers what training saw passes; any other fails with its real reason."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from handler.bundle import FILES
from handler.errors import BundleError
from serving import preflight
from tests.bundles import remade

ENTRY = "student_handler.py"


def prefixed(code: str) -> Callable[[Path], None]:
    """A change that puts code above the handler's."""

    def change(root: Path) -> None:
        (root / ENTRY).write_text(code + "\n" + (root / ENTRY).read_text())

    return change


def test_a_good_archive_passes_with_figures(packed: Path) -> None:
    found = preflight.check(packed)
    assert (found.name, found.version, found.forms, found.payloads) == ("student", "1.0", ("raw", "png"), 128)
    assert found.max_difference < 1e-4
    assert found.load_s > 0 and found.replay_s > 0


def test_a_touched_archive_is_refused_before_its_code_runs(packed: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    path = remade(packed, tmp_path / "touched.mar", prefixed(code), sealed=False)
    with pytest.raises(BundleError, match=r"student_handler\.py was touched"):
        preflight.check(path)
    assert not (tmp_path / "ran").exists()


def test_other_weights_than_the_golden_payloads_are_found(packed: Path, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        with np.load(root / FILES.golden) as file:
            arrays = dict(file)
        arrays["logits"][3, 2] += 1  # one number of 640
        np.savez_compressed(root / FILES.golden, **arrays)

    path = remade(packed, tmp_path / "other.mar", change, sealed=True)
    with pytest.raises(preflight.CheckFailed):
        preflight.check(path)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise KeyError('told so')", "KeyError: 'told so'"),
        ("raise RuntimeError('told so')", "RuntimeError: told so"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os._exit(3)", "the worker ended with status 3"),
        ("class Second: ...", "ValueError: Expected only one class in custom service code"),
    ],
)
def test_the_real_reason_is_told(packed: Path, tmp_path: Path, code: str, reason: str) -> None:
    path = remade(packed, tmp_path / "broken.mar", prefixed(code), sealed=True)
    with pytest.raises(preflight.CheckFailed) as caught:
        preflight.check(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)
    if "Error" in reason:
        assert "Traceback (most recent call last):" in caught.value.output


@pytest.mark.parametrize("module", ["training.config", "serving.client", "tests.bundles"])
def test_code_of_the_repository_cannot_fill_a_gap(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    path = remade(packed, tmp_path / "gap.mar", prefixed(f"import {module}"), sealed=True)
    with pytest.raises(preflight.CheckFailed, match=f"No module named '{module.split('.')[0]}'"):
        preflight.check(path)


def test_the_archives_own_code_runs_whatever_pythonpath_says(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "handler").mkdir()
    (tmp_path / "handler" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert preflight.check(packed).payloads == 128


def test_a_worker_that_hangs_is_given_up(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "WAIT_S", 0.5)
    path = remade(packed, tmp_path / "hangs.mar", prefixed("import time; time.sleep(60)"), sealed=True)
    with pytest.raises(Exception, match=r"neither loaded nor failed within 0\.5 s"):
        preflight.check(path)


def test_the_workers_environment_is_clean(tmp_path: Path) -> None:
    found = preflight.clean({"PYTHONPATH": "/repo", "HOME": "/h"}, tmp_path)
    assert found["PYTHONPATH"] == str(tmp_path) and found["HOME"] == "/h"
    assert set(os.environ) <= set(preflight.clean(os.environ, tmp_path))
