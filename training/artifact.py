"""The bundle: the folder of named files that serving packs and the worker verifies."""

import json
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from handler.bundle import FILES, atomic, seal
from handler.contract import Contract
from handler.engines import ENGINES, INT8, Setup
from training.data import Split
from training.evaluate import logits_of

GOLDEN = 64  # payloads that every worker replays before it is ready


def save_weights(network: nn.Module, path: Path) -> None:
    """The bare state dict, on the CPU and in plain layout, loadable with `weights_only=True`; same bits, same bytes."""
    plain = torch.contiguous_format  # `contiguous()` would leave ambiguous strides as they are
    state = {name: value.detach().cpu().clone(memory_format=plain) for name, value in network.state_dict().items()}
    # Given a path, torch writes its name into the file.
    with atomic(path) as temporary, temporary.open("wb") as stream:
        torch.save(state, stream)


def save_json(value: Any, path: Path) -> None:
    """Indented JSON; a number that is not finite is an error (ValueError), for JSON has none."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """What the run was made with."""
    packages = {name: version(name) for name in ("torch", "torchvision", "onnx", "onnxruntime", "numpy")}
    return {"python": platform.python_version(), **packages}


def write_bundle(
    folder: Path,
    *,
    student: nn.Module,
    engines: Mapping[str, Path],
    contract: Contract,
    golden: Split,
    report: Mapping[str, Any],
    evidence: Mapping[str, Any],
) -> str:
    """Write the bundle whole or not at all, in place of an earlier one; returns its digest.

    `engines` are the exported files by engine. `golden` are the images whose payloads go along, with the logits of the
    eager network on the CPU, and of int8, which rounds.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    try:
        save_weights(student, temporary / FILES.weights)
        for name, path in engines.items():
            shutil.copyfile(path, temporary / ENGINES[name].file)
        (temporary / FILES.contract).write_text(contract.to_json())
        save_json(report, temporary / FILES.report)
        _save_golden(student, engines.get(INT8), contract, golden, temporary / FILES.golden)
        digest = seal(temporary, {**evidence, "versions": versions()})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest


def _save_golden(student: nn.Module, int8: Path | None, contract: Contract, golden: Split, path: Path) -> None:
    part = golden.take(torch.arange(min(GOLDEN, len(golden))))
    logits: dict[str, Any] = {"logits": logits_of(student.cpu(), part.images).numpy()}
    if int8:
        logits[f"logits_{INT8}"] = ENGINES[INT8].load(int8, Setup(contract))(part.images.numpy())
    pixels = part.images.permute(0, 2, 3, 1).contiguous()
    np.savez_compressed(path, images=pixels.numpy(), labels=part.labels.numpy(), **logits)
