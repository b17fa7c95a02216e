"""The handler's settings, from YAML and from the environment."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from handler.errors import SettingsError
from handler.settings import CacheSettings, HandlerSettings, environment, load


def test_defaults_and_what_wins_over_them() -> None:
    found = load(HandlerSettings, {"threads": 2, "cache": {"ttl_s": 5}}, {"cache": {"entries": 7}}, {"threads": 3})
    assert found == HandlerSettings(threads=3, cache=CacheSettings(entries=7, ttl_s=5.0))
    assert load(HandlerSettings, {"engine": "onnx"}) == HandlerSettings(engine="onnx")


def test_the_environment_is_a_tree_of_yaml_values() -> None:
    found = environment({"DISTILLERY__HANDLER__CACHE__ENABLED": "false", "DISTILLERY__A": "[1]", "PATH": "/"})
    assert found == {"handler": {"cache": {"enabled": False}}, "a": [1]}


def test_the_address_of_redis_comes_whole_and_is_not_shown() -> None:
    found = environment({"DISTILLERY__HANDLER__CACHE__REDIS_URL": "rediss://me:s3cret@host:6379/0?ssl_ca_certs=/ca"})
    loaded = load(HandlerSettings, found["handler"])
    assert loaded.cache.redis_url == "rediss://me:s3cret@host:6379/0?ssl_ca_certs=/ca"
    assert "s3cret" not in repr(loaded)


def test_a_value_that_is_no_yaml_is_refused_with_its_variable() -> None:
    with pytest.raises(SettingsError, match="DISTILLERY__A: expected a YAML value"):
        environment({"DISTILLERY__A": "[1"})


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"engine": "caffe"}, "engine: expected one of auto, eager, onnx, .*, torchscript, got 'caffe'"),
        ({"threads": "2"}, "threads: expected int, got '2'"),
        ({"threads": True}, "threads: expected int, got True"),
        ({"cache": 5}, "cache: expected a mapping of settings, got 5"),
        ({"cache": {"ttl": 5}}, "unknown setting 'cache.ttl': did you mean 'cache.ttl_s'"),
        ({"cache": {"enabled": 1}}, "cache.enabled: expected bool, got 1"),
        ({"cache": {"wait_s": 0}}, "cache.wait_s: expected a number of seconds above 0, got 0"),
        ({"cache": {"lease_s": -1}}, "cache.lease_s: expected a number of seconds above 0, got -1"),
        ({"cache": {"ttl_s": "inf"}}, "cache.ttl_s: expected a number of seconds above 0, got inf"),
        ({"cache": {"redis_timeout_s": "nan"}}, "cache.redis_timeout_s: expected a number of seconds above 0, got nan"),
        ({"cache": {"redis_url": 6379}}, "cache.redis_url: expected str, got 6379"),
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


@dataclass(frozen=True, kw_only=True)
class Ramp:
    end: float
    start: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Unions:
    value: float | Ramp = 1.0
    perhaps: float | Ramp | None = None
    section: Ramp | None = None
    count: int | None = None
    shares: dict[str, float] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    ramps: tuple[float | Ramp, ...] = ()


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"value": 3}, Unions(value=3.0)),
        ({"value": "1e-3"}, Unions(value=0.001)),
        ({"value": {"end": "2"}}, Unions(value=Ramp(end=2.0))),
        ({"perhaps": None}, Unions(perhaps=None)),
        ({"perhaps": 0}, Unions(perhaps=0.0)),
        ({"perhaps": {"end": 2, "start": 1}}, Unions(perhaps=Ramp(end=2.0, start=1.0))),
        ({"section": None}, Unions()),
        ({"section": {"end": 1}}, Unions(section=Ramp(end=1.0))),
        ({"shares": {"a": 1, "b": "1e-1", 3: 2}}, Unions(shares={"a": 1.0, "b": 0.1, "3": 2.0})),
        ({"paths": {"stem.0": "layer1", 4: "layer2"}}, Unions(paths={"stem.0": "layer1", "4": "layer2"})),
        ({"ramps": [1, {"end": 2}]}, Unions(ramps=(1.0, Ramp(end=2.0)))),
    ],
    ids=str,
)
def test_choices_and_mappings(tree: dict[str, Any], expected: Unions) -> None:
    found = load(Unions, tree)
    assert found == expected
    for name in ("value", "perhaps"):
        assert not isinstance(getattr(found, name), int)  # a number has widened


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"value": None}, "value: expected a number, got None"),
        ({"value": "warm"}, "value: expected a number, got 'warm'"),
        ({"value": True}, "value: expected a number, got True"),
        ({"value": [1]}, r"value: expected a number, got \[1\]"),
        ({"value": {"end": 1, "begin": 2}}, r"unknown setting 'value\.begin': did you mean 'value\.\w+'"),
        ({"value": {"start": 1}}, "value.end: a value is required"),
        ({"value": {"end": "x"}}, "value.end: expected a number, got 'x'"),
        ({"perhaps": {"end": None}}, "perhaps.end: expected a number, got None"),
        ({"section": 5}, "section: expected a mapping of settings, got 5"),
        ({"count": {"end": 1}}, "count: expected int, got {'end': 1}"),
        ({"count": 1.5}, "count: expected int, got 1.5"),
        ({"shares": {"a": "x"}}, "shares.a: expected a number, got 'x'"),
        ({"shares": 5}, "shares: expected dict, got 5"),
        ({"shares": ["a"]}, r"shares: expected dict, got \['a'\]"),
        ({"paths": {"a": 3}}, "paths.a: expected str, got 3"),
        ({"ramps": [1, {"stop": 2}]}, r"unknown setting 'ramps\[1\]\.stop'"),
    ],
    ids=str,
)
def test_choices_and_mappings_that_cannot_be_used_are_named(tree: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=f"^{text}"):
        load(Unions, tree)


def test_a_later_source_takes_the_place_of_a_number_and_adds_to_a_section() -> None:
    assert load(Unions, {"value": 3}, {"value": {"end": 1}}) == Unions(value=Ramp(end=1.0))
    assert load(Unions, {"value": {"end": 1}}, {"value": 3}) == Unions(value=3.0)
    assert load(Unions, {"value": {"end": 1}}, {"value": {"start": 5}}) == Unions(value=Ramp(end=1.0, start=5.0))
    assert load(Unions, {"shares": {"a": 1}}, {"shares": {"b": 2}}) == Unions(shares={"a": 1.0, "b": 2.0})


def test_a_source_that_is_no_mapping_is_an_error() -> None:
    with pytest.raises(SettingsError, match="expected a mapping, got 5"):
        load(HandlerSettings, environment({"DISTILLERY__HANDLER": "5"})["handler"])
