"""Where a server lives: ports, files and the process behind a pid file that may be anyone's."""

import itertools
import os
import socket
import stat
from pathlib import Path

import pytest

from handler.errors import DistilleryError
from serving.archive import ServeSettings
from serving.instance import Instance, Record, java, locate, read_properties, taken
from serving.server import environment, java_home

CONFIG = Path(__file__).parents[2] / "config.properties"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may see a server that runs on this machine."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def test_the_default_instance_is_that_of_config_properties(tmp_path: Path) -> None:
    instance = locate(CONFIG)
    assert instance.inference == "http://127.0.0.1:8080"
    assert instance.ports() == (8080, 8081, 8082, 7070, 7071)
    assert instance.key_file == tmp_path / "key_file.json"
    assert instance.management().url == "http://127.0.0.1:8081"


def test_a_port_of_its_own_means_five_and_a_folder_of_its_own(tmp_path: Path) -> None:
    instance = locate(CONFIG, 9080)
    assert instance.ports() == (9080, 9081, 9082, 9083, 9084)
    assert instance.key_file == tmp_path / "logs" / "9080" / "key_file.json"
    assert instance.properties["metrics_mode"] == "prometheus"  # all else is the file's


def test_an_open_address_is_called_on_the_loopback(tmp_path: Path) -> None:
    instance = Instance(tmp_path, tmp_path, {"inference_address": "http://0.0.0.0:8443/"})
    assert instance.inference == "http://127.0.0.1:8443"


def test_a_missing_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DistilleryError, match=r"nowhere: no such file: run from the project's root"):
        locate(tmp_path / "nowhere")


def test_properties_are_read_as_torchserve_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text("# a=b\n\n one = 1\nvmargs=-Xmx1g -Da=b\nnot a setting\n")
    assert read_properties(path) == {"one": "1", "vmargs": "-Xmx1g -Da=b"}


def test_every_setting_of_ours_has_its_reason() -> None:
    lines = CONFIG.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        pair = above.startswith("number_of_netty_threads") and line.startswith("netty_client_threads")
        assert line.startswith("#") or above.startswith("# ") or pair, line


def test_the_settings_are_safe_by_default() -> None:
    found = read_properties(CONFIG)
    assert all(found[key].startswith("http://127.0.0.1:") for key in found if key.endswith("_address"))
    assert found["disable_token_authorization"] == "false" and found["enable_model_api"] == "false"
    assert found["allowed_urls"] == "file://.*" and found["install_py_dep_per_model"] == "false"
    assert "load_models" not in found


@pytest.mark.parametrize("text", ["", "text", "999999999", pytest.param(str(os.getpid()), id="our own")])
def test_a_pid_file_that_names_no_torchserve_is_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / ".model_server.pid").write_text(text)
    assert java(tmp_path) is None


def test_no_pid_file_is_nobody(tmp_path: Path) -> None:
    assert java(tmp_path) is None
    assert locate(CONFIG).process() is None


def test_a_record_of_a_process_that_is_gone_counts_for_nothing(tmp_path: Path) -> None:
    instance = Instance(tmp_path, tmp_path, {})
    record = Record(os.getpid(), "1.0", "d" * 64, ServeSettings(batch_size=3).to_yaml())
    instance.write_record(record)
    assert record.settings.batch_size == 3
    assert instance.record() is None
    instance.forget()
    instance.forget()
    assert not (tmp_path / "server.json").exists()


def test_taken_ports_are_found() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        assert taken((port,)) == [port]
    assert taken((port,)) == []


def test_java_is_that_of_java_home_or_jdk4pys(tmp_path: Path) -> None:
    own = Path(java_home({})) / "bin" / "java"
    assert own.is_file() and own.stat().st_mode & stat.S_IXUSR
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").touch()
    assert java_home({"JAVA_HOME": str(tmp_path)}) == str(tmp_path)
    with pytest.raises(DistilleryError, match=r"JAVA_HOME is /nowhere, where there is no bin/java"):
        java_home({"JAVA_HOME": "/nowhere"})


def test_the_servers_environment_has_no_pythonpath_and_folders_of_its_own(tmp_path: Path) -> None:
    instance = locate(CONFIG, 9080)
    found = environment(instance, {"PYTHONPATH": "/repo", "TS_CONFIG_FILE": "other", "TMPDIR": "/tmp", "HOME": "/h"})
    assert "PYTHONPATH" not in found and found["HOME"] == "/h"
    assert found["TMPDIR"] == found["TEMP"] == str(tmp_path / "logs" / "9080" / "tmp")
    assert found["TS_CONFIG_FILE"] == str(tmp_path / "logs" / "9080" / "config.properties")


def test_the_default_servers_pid_file_is_where_torchserve_stop_looks(tmp_path: Path) -> None:
    found = environment(locate(CONFIG), {})
    assert found["TMPDIR"] == str(tmp_path / "tmp")  # this test's temporary folder
    assert found["TEMP"] == str(tmp_path / "logs" / "tmp")
