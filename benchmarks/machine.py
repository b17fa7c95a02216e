"""The machine that a benchmark runs on."""

import os
from typing import Any

from training.report import processor


def machine() -> dict[str, Any]:
    """Where this runs; the load is that of others, so it is asked for before the first start."""
    return {"cpu": processor(), "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
