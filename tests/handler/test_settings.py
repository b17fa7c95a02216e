"""The handler's settings, from YAML and from the environment."""

from dataclasses import dataclass
from typing import Any

import pytest

from handler.errors import SettingsError
from handler.settings import CacheSettings, HandlerSettings, environment, load


def test_defaults_and_what_wins_over_them() -> None:
    found = load(HandlerSettings, {"threads": 2, "cache": {"ttl_s": 5}}, {"cache": {"entries": 7}}, {"threads": 3})
    assert found == HandlerSettings(threads=3, cache=CacheSettings(entries=7, ttl_s=5.0))


def test_the_environment_is_a_tree_of_yaml_values() -> None:
    found = environment({"DISTILLERY__HANDLER__CACHE__ENABLED": "false", "DISTILLERY__A": "[1]", "PATH": "/"})
    assert found == {"handler": {"cache": {"enabled": False}}, "a": [1]}


def test_a_value_that_is_no_yaml_is_refused_with_its_variable() -> None:
    with pytest.raises(SettingsError, match="DISTILLERY__A: expected a YAML value"):
        environment({"DISTILLERY__A": "[1"})


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"engine": "tensorrt"}, "engine: expected one of auto, eager, onnx, got 'tensorrt'"),
        ({"threads": "2"}, "threads: expected int, got '2'"),
        ({"threads": True}, "threads: expected int, got True"),
        ({"cache": 5}, "cache: expected a mapping of settings, got 5"),
        ({"cache": {"ttl": 5}}, "unknown setting 'cache.ttl': did you mean 'cache.ttl_s'"),
        ({"cache": {"enabled": 1}}, "cache.enabled: expected bool, got 1"),
        ({"cache": {"ttl_s": True}}, "cache.ttl_s: expected a number, got True"),
    ],
)
def test_what_cannot_be_used_is_named(tree: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=f"^{text}"):
        load(HandlerSettings, tree)


@dataclass(frozen=True, kw_only=True)
class Other:
    maybe: int | None = None
    numbers: tuple[float, ...] = ()


def test_optional_values_and_lists() -> None:
    assert load(Other, {"maybe": None, "numbers": [1, "2e-1"]}) == Other(numbers=(1.0, 0.2))
    assert load(Other, {"maybe": 3}) == Other(maybe=3)
    with pytest.raises(SettingsError, match=r"numbers\[1\]: expected a number"):
        load(Other, {"numbers": [1, "x"]})


def test_a_source_that_is_no_mapping_is_an_error() -> None:
    with pytest.raises(SettingsError, match="expected a mapping, got 5"):
        load(HandlerSettings, environment({"DISTILLERY__HANDLER": "5"})["handler"])
