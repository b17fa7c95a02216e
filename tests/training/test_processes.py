"""One process or several: who is first, and what is refused. Two at work: tests/training/test_main.py."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from handler.errors import DistilleryError
from training.processes import Processes, arithmetic, together


def test_alone_one_is_first_and_its_mean_is_its_own() -> None:
    with together("cpu") as (processes, device):
        assert processes == Processes(rank=0, count=1)
        assert processes.first
        assert device == torch.device("cpu")
        assert processes.mean(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]
        processes.wait()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
    ],
    ids=["imitated", "real"],
)
def test_bfloat16_is_for_processors_that_have_it(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one that has it not, the quickstart's teacher had not ended its first epoch after seven minutes."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    arithmetic.cache_clear()
    assert arithmetic("bfloat16", torch.device("cpu")) == expected
    assert arithmetic("bfloat16", torch.device("cuda", 0)) == torch.bfloat16
    assert arithmetic("float32", torch.device("cpu")) == torch.float32
    arithmetic.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_cuda_where_there_is_none_is_an_error() -> None:
    with pytest.raises(DistilleryError, match="device=cuda: no CUDA device is available here"), together("cuda"):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_auto_takes_the_gpu() -> None:
    with together("auto") as (_, device):
        assert device.type == "cuda"


FAULTS = """
import resource, sys, torch
from training.__main__ import main

def step():
    return [torch.ones(2_000_000) for _ in range(8)]

if sys.argv[1] == "trained":
    main(["data", "no such file.yaml"])
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_training_keeps_the_memory_that_a_step_frees() -> None:
    # Left to itself glibc would settle, by chance, in one of its two ways.
    hasty = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", FAULTS]
    plain, trained = (
        int(subprocess.run([*command, who], env=hasty, capture_output=True, check=True, timeout=120).stdout)
        for who in ("plain", "trained")
    )
    assert plain > 50_000  # pages of the 64 MB that each of ten steps allocates
    assert trained < 1_000
