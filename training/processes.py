"""One process, or several that torchrun started: each takes its part of every batch, the first one writes.

torchrun --standalone --nproc-per-node 2 -m training run training/experiments/full.yaml

Processes that know nothing of each other take turns at what they both would write.
"""

import contextlib
import ctypes
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from handler.errors import DistilleryError

log = logging.getLogger(__name__)


def keep_memory() -> None:
    """Let the C library keep what one training step frees for the next.

    glibc hands blocks of megabytes back to the system, and each step pays for having them mapped in again: without
    that, a step of our student takes three quarters of the time on a CPU, and computes the same bits.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the largest it takes
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


@functools.cache
def arithmetic(precision: str, device: torch.device) -> torch.dtype:
    """The format that a network computes in: `precision`, or float32 where the CPU has no instructions for bfloat16.

    Without them bfloat16 takes fifteen times as long as float32 (a convolution, AVX2 only), not half as long.
    """
    if precision == "bfloat16" and device.type == "cpu":
        # torch 2.11 may not have it
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        if not any(found and "bf16" in name for name, found in capabilities.items()):
            log.info("this CPU has no instructions for bfloat16: float32 takes its place")
            return torch.float32
    return getattr(torch, precision)  # type: ignore[no-any-return]


@contextlib.contextmanager
def turn(lock: Path) -> Iterator[None]:
    """Have the file `lock` to oneself; waits, and says so, while another process has it, and ends with its end."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is at work on it; waiting until it ends", lock.parent)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Processes:
    """Which of how many this process is."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each value over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def together(wanted: str) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun started (else this one alone) and this one's device; `wanted`: auto, cpu or cuda.

    NCCL on GPUs, one each; gloo on CPUs. Raises DistilleryError when cuda is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DistilleryError("device=cuda: no CUDA device is available here; use device=cpu or auto")
    gpu = wanted != "cpu" and torch.cuda.is_available()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if count == 1:
        yield Processes(), device
        return
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), count), device
    finally:
        dist.destroy_process_group()
