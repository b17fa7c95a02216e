"""Typed settings out of YAML, environment and flags: the loader that both sides of the house use.

A tree of settings is a frozen dataclass whose fields are numbers, strings, booleans, literals, tuples, or
further such dataclasses, or a choice or mapping of these. `load` merges mappings, the later one winning, and
names the key of whatever is wrong. `HandlerSettings` is the `handler:` section of the archive's model-config.yaml.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import yaml

from handler.errors import SettingsError, unknown

T = TypeVar("T")
PREFIX = "DISTILLERY__"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How many answers a worker keeps, and for how long; with `redis_url` the workers share them, too.

    A round trip to Redis takes 0.1 to 1 ms. One that takes `redis_timeout_s` is worth no more waiting: it is longer
    than most batches take to compute. A worker that has claimed an answer has `lease_s` to give it before it is taken
    for dead; the others wait for it for at most `wait_s`.
    """

    enabled: bool = True
    entries: int = 10_000
    size_bytes: int = 64 * 1024 * 1024
    ttl_s: float = 3600.0
    redis_url: str = field(default="", repr=False)  # there may be a password in it
    redis_timeout_s: float = 0.02
    lease_s: float = 2.0
    wait_s: float = 0.25

    def __post_init__(self) -> None:
        for name in ("ttl_s", "redis_timeout_s", "lease_s", "wait_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise SettingsError(f"cache.{name}: expected a number of seconds above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """What one request may ask for at most."""

    pixels: int = 16_000_000
    rows: int = 256


@dataclass(frozen=True, kw_only=True)
class HandlerSettings:
    """The worker's own settings; `threads` 0 means cores / minWorkers, and 1 with batches of 1.

    `engine` auto is the one that was measured fastest on the worker's kind of device, among those whose accuracy is
    at most `accuracy_loss` (0..1) below eager's. `fallback` lets eager serve where that engine cannot be loaded.
    It is given `micro_batch` images at a time, however many the server hands over; 0 is the size measured as best.
    `precision` bf16 and fp16 have eager multiply in formats of 16 bits; no other engine has the choice.
    """

    engine: Literal["auto", "eager", "onnx", "onnx-int8", "tensorrt", "exported", "compiled", "torchscript"] = "auto"
    accuracy_loss: float = 0.003
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fallback: bool = False
    threads: int = 0
    micro_batch: int = 0
    cache: CacheSettings = field(default_factory=CacheSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)


def load(kind: type[T], *sources: Mapping[str, Any]) -> T:
    """An instance of the dataclass `kind` from nested mappings; a later source wins over an earlier one.

    Raises SettingsError for an unknown key (naming the nearest one) and for a value of the wrong type.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        if not isinstance(source, Mapping):
            raise SettingsError(f"settings: expected a mapping, got {source!r}")
        merged = _merge(merged, source)
    return typing.cast(T, _build(kind, merged, ""))


def environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """`DISTILLERY__SECTION__KEY=value` as a nested mapping in lower case, values parsed as YAML."""
    tree: dict[str, Any] = {}
    for name, text in environ.items():
        if name.startswith(PREFIX):
            tree = _merge(tree, nested(name.removeprefix(PREFIX).lower().split("__"), parse(name, text)))
    return tree


def nested(path: list[str], value: Any) -> dict[str, Any]:
    """`["a", "b"], 1` → `{"a": {"b": 1}}`."""
    for key in reversed(path):
        value = {key: value}
    return typing.cast(dict[str, Any], value)


def parse(name: str, text: str) -> Any:
    """The YAML value of a flag's or variable's text; SettingsError names the flag when it is not YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"{name}: expected a YAML value, got {text!r}") from None


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{path.rstrip('.') or 'settings'}: expected a mapping of settings, got {value!r}")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    for key in value:
        if key not in names:
            raise SettingsError(unknown("setting", f"{path}{key}", (path + name for name in names)))
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in value
    ]
    if missing:
        raise SettingsError(f"{path}{missing[0]}: a value is required")
    return kind(**{key: _convert(hints[key], item, path + key) for key, item in value.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`; numbers may widen (1 → 1.0, "1e-3" → 0.001), nothing else is guessed."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path + ".")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args:
            return value
        raise SettingsError(f"{path}: expected one of {', '.join(map(str, args))}, got {value!r}")
    if origin is types.UnionType:
        return _convert_union(args, value, path)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind is float:
        return _number(value, path)
    if isinstance(value, kind if origin is None else origin) and (kind is bool or not isinstance(value, bool)):
        return value
    raise SettingsError(f"{path}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def _convert_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    """None where that is allowed; a mapping as the one dataclass among `kinds`; all else as the first plain kind."""
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        if dataclasses.is_dataclass(kind) == isinstance(value, Mapping) and kind is not types.NoneType:
            return _convert(kind, value, path)
    return _convert(kinds[0], value, path)


def _number(value: Any, path: str) -> float:
    """YAML reads `1e-3` (no dot) as a string, so text that is a number counts as one."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{path}: expected a number, got {value!r}") from None
