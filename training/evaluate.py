"""What a network is worth: pure functions of logits and labels, and the cost of a forward pass.

Shapes: N images, K classes; logits float32 `[N, K]`, labels int64 `[N]`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BINS = 15
Key = TypeVar("Key")


def logits_of(network: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """Logits float32 `[N, K]` on the CPU of uint8 `[N, C, H, W]`; the network's mode is as before afterwards."""
    training, device = network.training, next(network.parameters(), images).device
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(part.to(device)).float().cpu() for part in torch.split(images, batch)])
    network.train(training)
    return logits.clone()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's, 0..1."""
    return (logits.argmax(1) == labels).float().mean().item()


def agreement(logits: Tensor, other: Tensor) -> float:
    """Share of images for which both networks say the same class, 0..1."""
    return (logits.argmax(1) == other.argmax(1)).float().mean().item()


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials (Wilson 1927, JASA 22:209, eq. for p̂)."""
    z = 1.959964
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # Rounding must not push a share of exactly 0 or 1 out of range.
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> dict[str, list[float]]:
    """Per equal-width bin of confidence: share of the images, mean confidence, accuracy (0 where a bin is empty)."""
    confidence, predicted = F.softmax(logits, dim=1).max(1)
    # Bin b holds confidences in (b / bins, (b + 1) / bins].
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(index, minlength=bins).double()
    right = torch.bincount(index, (predicted == labels).double(), minlength=bins)
    sure = torch.bincount(index, confidence.double(), minlength=bins)
    filled = count.clamp(min=1)
    return {
        "share": (count / len(labels)).tolist(),
        "confidence": (sure / filled).tolist(),
        "accuracy": (right / filled).tolist(),
    }


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error, 0..1: Σ_b share_b · |accuracy_b − confidence_b| over 15 bins.

    Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    bins = reliability(logits, labels)
    rows = zip(bins["share"], bins["accuracy"], bins["confidence"], strict=True)
    return sum(share * abs(right - sure) for share, right, sure in rows)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 `[K, K]`: row = label, column = prediction."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def quality(logits: Tensor, labels: Tensor, names: Sequence[str], teacher: Tensor) -> dict[str, Any]:
    """All that logits and labels tell; `teacher` are the teacher's logits for the same images."""
    table = confusion(logits, labels)
    hits = table.diagonal().double()
    precision, recall = hits / table.sum(0).clamp(min=1), hits / table.sum(1).clamp(min=1)
    share = accuracy(logits, labels)
    return {
        "images": len(labels),
        "accuracy": share,
        "accuracy_interval_95": interval(share, len(labels)),
        "agreement": agreement(logits, teacher),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": calibration_error(logits, labels),
        "per_class": [
            {"label": name, "precision": p, "recall": r, "images": n}
            for name, p, r, n in zip(names, precision.tolist(), recall.tolist(), table.sum(1).tolist(), strict=True)
        ],
        "confusion": table.tolist(),
        "reliability": reliability(logits, labels),
    }


def macs(network: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of one image of `shape` (channels, height, width): half of torch's count of operations."""
    image = torch.zeros(1, *shape, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.eval()(image)
    return int(counter.get_total_flops()) // 2


def latency_ms(
    runs: Mapping[Key, Callable[[], object]], repetitions: int = 15, seconds: float = 0.2
) -> dict[Key, dict[str, float]]:
    """p50 and p99 in milliseconds of each call; the calls take turns, so that a noisy machine is noisy for all.

    Each of the `repetitions` rounds calls each one for `seconds / repetitions` or once, whichever is longer.
    """
    times: dict[Key, list[float]] = {name: [] for name in runs}
    for call in runs.values():
        call()
    for _ in range(repetitions):
        for name, call in runs.items():
            end = time.perf_counter() + seconds / repetitions
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                times[name].append(1000 * (now - start))
                if now > end:
                    break
    return {
        name: {f"p{q}": torch.tensor(values).quantile(q / 100).item() for q in (50, 99)}
        for name, values in times.items()
    }
