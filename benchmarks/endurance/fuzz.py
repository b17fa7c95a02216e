"""Codecs and forms under a fuzzer that looks for new branches, Pillow's too: only refusals may come out, in a second.

atheris is no requirement of this project: `pip install atheris`, where it has a wheel for this Python.

example: python -m benchmarks.endurance.fuzz --runs 100000
"""

import argparse
import contextlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["handler.codecs", "handler.forms", "PIL"]):
    from handler import codecs, forms

from handler.contract import Contract
from handler.errors import ServeError
from handler.settings import LimitSettings
from tests.handler.hostile import TYPES, hostile

CONTRACTS = [Contract(network="any", channels=channels, height=28, width=28, labels=("a", "b")) for channels in (1, 3)]
SEEDS = 2000  # generated bodies to begin with
LONGEST = 8192
BOUNDARY = "x"  # that of the generated forms


def one(data: bytes) -> None:
    """Read a body as what its first two bytes say; whatever is raised but a refusal ends the fuzzer."""
    kind, contract = TYPES[data[0] % len(TYPES)] if data else "", CONTRACTS[data[1] % 2 if len(data) > 1 else 0]
    with contextlib.suppress(ServeError):
        codecs.decode(codecs.kind_of(data[2:], kind or "", contract), data[2:], contract, LimitSettings())
    with contextlib.suppress(ServeError):
        forms.parts(data[2:], BOUNDARY)


def main() -> None:
    """Fuzz; exit status 0 when so many runs found nothing, else the fuzzer's own, and the body lies in crash-…."""
    about, _, example = (__doc__ or "").rpartition("\n\n")
    p = argparse.ArgumentParser("python -m benchmarks.endurance.fuzz", description=about, epilog=example)
    p.add_argument("--runs", type=int, default=100_000, help="default: %(default)s")
    options = p.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(SEEDS):
            body, kind = hostile(number)
            first = TYPES.index(kind) if kind in TYPES else 0
            (Path(folder) / str(number)).write_bytes(bytes([first, number % 2]) + body[:LONGEST])
        bounds = [f"-runs={options.runs}", f"-max_len={LONGEST}", "-timeout=1", "-print_final_stats=1"]
        child = os.fork()
        if not child:
            atheris.Setup([sys.argv[0], *bounds, folder], one)
            atheris.Fuzz()  # ends the process
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
