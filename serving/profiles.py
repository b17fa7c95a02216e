"""Profiles, and an archive with other settings than those it was packed with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from handler.bundle import seal, verify
from handler.errors import DistilleryError
from serving.archive import CONFIG, Archive, ServeSettings, camel, read, unpacked, write

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "throughput": {"batch_size": 32, "max_batch_delay": 1},
    "latency": {"batch_size": 1},
}
"""Defaults of ServeSettings by name; its own are those of throughput."""


def with_settings(path: Path, changes: Mapping[str, Any], target: Path) -> Archive:
    """The archive at `path` with some settings changed, sealed anew and written to `target`, which may be `path`.

    `changes` are fields of ServeSettings, the handler's in a mapping of their own. Nothing else is written, for the
    code in an older archive refuses settings that it does not know. Without a change the bytes are those of before.
    """
    with unpacked(path) as root:
        evidence, config = verify(root)["evidence"], root / CONFIG
        tree = yaml.safe_load(config.read_text())
        for name, value in changes.items():
            key = camel(name)
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, Mapping) else value
        config.write_text(yaml.safe_dump(tree, sort_keys=False))
        ServeSettings.from_yaml(config.read_text())
        seal(root, evidence)
        try:
            write(root, target)
        except OSError as error:
            raise DistilleryError(f"{target}: cannot be written: {error.strerror or error}") from error
    return read(target)
