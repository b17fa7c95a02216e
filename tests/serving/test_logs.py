"""The one line that says why: from logs as TorchServe 0.12 writes them."""

from pathlib import Path

import pytest

from serving.logs import Tail, load_failure

HEAD = "2026-11-21T08:29:04,890 [INFO ] W-9000-student_1.0-stdout MODEL_LOG - "
DIED = "Backend worker process died."
TRACE = ["Traceback (most recent call last):", '  File "worker.py", line 301, in <module>', "    worker.run_server()"]
WARNED = "2026-11-21T08:29:04,892 [WARN ] W-9000 BatchAggregator - Load model failed: student, error: Worker died.\n"


def log(*lines: str) -> str:
    return "".join(f"{HEAD}{line}\n" for line in lines)


def test_a_worker_that_loads_has_no_failure() -> None:
    assert load_failure(log("[PID]1", "Torch worker started.", "model_name: student, batchSize: 4"), "") is None


def test_a_traceback_that_did_not_end_the_worker_is_none() -> None:
    assert load_failure(log("redis is away", *TRACE, "ConnectionError: refused"), "") is None


def test_the_errors_line_is_found_with_its_module() -> None:
    error = "handler.errors.BundleError: /tmp/x: refused: student.pt was touched"
    assert load_failure(log(DIED, *TRACE, error), WARNED) == error


def test_an_unfinished_traceback_is_waited_for() -> None:
    assert load_failure(log(DIED, *TRACE), WARNED) is None


def test_torchserves_second_try_after_an_import_does_not_hide_the_first() -> None:
    first, second = "ModuleNotFoundError: No module named 'yaml'", "No module named 'ts.torch_handler.student_handler'"
    between = ("", "During handling of the above exception, another exception occurred:", "")
    text = log(DIED, *TRACE, first, *between, *TRACE, f"ModuleNotFoundError: {second}")
    assert load_failure(text, WARNED) == first


def test_a_runtime_error_that_torchserve_renames_is_shown() -> None:
    text = log("Failed to load model student, exception rt", *TRACE, "RuntimeError: rt", DIED, *TRACE)
    assert load_failure(text + log("RuntimeError: 500 - Unknown exception"), WARNED) == "RuntimeError: rt"


def test_the_cause_that_was_chained_on_purpose_is_the_last() -> None:
    between = ("", "The above exception was the direct cause of the following exception:", "")
    text = log(DIED, *TRACE, "OSError: no", *between, *TRACE, "handler.errors.BundleError: cannot be read")
    assert load_failure(text, "") == "handler.errors.BundleError: cannot be read"


def test_a_silent_death_is_believed_the_second_time() -> None:
    assert load_failure(log("[PID]1"), WARNED) is None
    assert "without a word" in (load_failure(log("[PID]1"), WARNED * 2) or "")


def test_an_archive_that_the_server_itself_refuses_is_told() -> None:
    line = "2026-11-21T08:29:04,892 [WARN ] main ModelServer - Failed to load model: student.mar\n"
    assert "Failed to load model: student.mar" in (load_failure("", line) or "")


@pytest.mark.parametrize("before", [None, "old\n"])
def test_a_tail_begins_where_the_file_ended(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "log"
    if before:
        path.write_text(before)
    tail = Tail(path)
    assert tail.text() == ""
    with path.open("a") as stream:
        stream.write("new\n")
    assert tail.text() == "new\n"


def test_a_file_that_was_rolled_over_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a long old text\n")
    tail = Tail(path)
    path.write_text("new\n")
    assert tail.text() == "new\n"
