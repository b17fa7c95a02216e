"""What TorchServe's `GET models/MODEL?customized=true` hands on: who answers, by which contract, with what evidence."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import orjson

from handler.bundle import FILES
from handler.inside import Inside
from handler.model import Student
from handler.options import OFFERED

RUN = ("experiment", "seed", "data", "machine", "served")  # of a report, beside the figures of the engine


def describe(root: Path, model: Student, threads: int, why: str, identity: Mapping[str, str], inside: Inside) -> bytes:
    """One JSON object about the served `model`; of the report in `root` what was measured of its engine."""
    report = json.loads((root / FILES.report).read_text())
    figures = report["engines"][report["served"]].get(model.engine, {})
    engine = {"name": model.engine, "device": model.device, "micro_batch": model.micro_batch}
    return orjson.dumps(
        {
            "model": dict(identity),
            "contract": dataclasses.asdict(model.contract),
            "engine": {**engine, "threads": threads, "why": why},
            "evidence": {**{key: report[key] for key in RUN if key in report}, **figures},
            "options": [name for name in OFFERED if name != "features" or inside.open],
            "explanations": inside.explains,
        }
    )
