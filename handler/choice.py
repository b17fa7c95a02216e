"""Which engine computes, on what device, in how large batches: from the settings and from what was measured."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.bundle import FILES
from handler.engines import ENGINES
from handler.errors import BundleError, SettingsError, line
from handler.networks import NETWORKS
from handler.settings import HandlerSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which engine, where, in which precision, how many images it is given at a time, and why."""

    engine: str
    device: str
    precision: str
    micro_batch: int
    why: str


def device_of(gpu_id: int | None, gpus: int) -> str:
    """The device of a worker that the server gave the GPU `gpu_id`, where torch sees `gpus` of them.

    The CPU when it sees none, which the log tells; BundleError when it sees others.
    """
    if gpu_id is None:
        return "cpu"
    if gpus == 0:
        log.warning("the server gave this worker GPU %d, but torch sees none: it runs on the CPU", gpu_id)
        return "cpu"
    if not 0 <= gpu_id < gpus:
        raise BundleError(f"GPU {gpu_id}: torch sees {gpus}, counted from 0; check deviceIds and CUDA_VISIBLE_DEVICES")
    return f"cuda:{gpu_id}"


def choose(settings: HandlerSettings, evidence: Mapping[str, Any], network: str, device: str, batch: int) -> Choice:
    """The engine for the settings, and its micro-batch: the size up to `batch` at which an image took it least.

    Auto is the engine that was measured fastest on this kind of device, per image at its best such size, of those
    that compute in the precision asked for and whose accuracy is at most `settings.accuracy_loss` below eager's; the
    first that can use the device where nothing was measured. An engine that cannot use it runs on the CPU.
    `evidence` is the report's part on engines. A `network` that is none of ours cannot run in eager.
    """
    kind = device.partition(":")[0]

    def choice(name: str, why: str) -> Choice:
        size = speeds[name][1] if name in speeds else batch
        usable = kind in ENGINES[name].devices
        why += "" if usable else f"; it cannot use {device}"
        where = device if usable else "cpu"
        return Choice(name, where, settings.precision, settings.micro_batch or size, why)

    latencies = {name: found.get("latency_ms", {}).get(kind, {}) for name, found in evidence.items()}
    speeds = {name: best for name, found in latencies.items() if (best := _ms_an_image(found, batch))}
    precise = [name for name, engine in ENGINES.items() if settings.precision in engine.precisions]
    if settings.engine != "auto":
        if settings.engine not in precise:
            text = f"expected fp32 with engine {settings.engine}, or {', '.join(precise)} as the engine"
            raise SettingsError(f"handler.precision {settings.precision}: {text}")
        return choice(settings.engine, "the settings name it")
    least = evidence.get("eager", {}).get("accuracy", 0) - settings.accuracy_loss
    able = [name for name, found in evidence.items() if name in precise and found["accuracy"] >= least]
    able = [name for name in able if name != "eager" or network in NETWORKS]
    measured = [name for name in able if name in speeds]
    if not measured:
        able.sort(key=lambda name: kind not in ENGINES[name].devices)
        return choice(next(iter(able), "eager"), f"auto: no engine was measured on {kind}")
    text = ", ".join(f"{name} {speeds[name][0]:.3f}" for name in measured)
    return choice(min(measured, key=speeds.__getitem__), f"auto: the fastest of {text} ms an image")


def read_evidence(root: Path) -> dict[str, Any]:
    """What was measured of the served network's engines, by their names; BundleError when there is nothing."""
    try:
        report = json.loads((root / FILES.report).read_text())
        found: dict[str, Any] = report["engines"][report["served"]]
    except (OSError, ValueError, LookupError) as error:
        raise BundleError(f"{root / FILES.report}: no report of the engines in it: {line(error)}") from error
    return found


def _ms_an_image(latencies: Mapping[str, Mapping[str, float]], batch: int) -> tuple[float, int] | None:
    """Milliseconds an image at the measured batch size, of those up to `batch`, where it is least, and that size."""
    return min(((found["p50"] / int(n), int(n)) for n, found in latencies.items() if int(n) <= batch), default=None)
