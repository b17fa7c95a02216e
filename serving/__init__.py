"""Everything outside the worker: pack, check, start, scale, predict. `python -m serving --help`."""
