"""The archive under load, in two workers with a Redis between them: is it as good at the end as at the beginning?

example: python -m benchmarks.endurance soak --bundle runs/full/bundle --requests 1000000 --out soak.json
"""

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.endurance import faults, hostile, soak
from benchmarks.machine import machine
from benchmarks.serving import environments
from handler.bundle import atomic, verify
from handler.errors import DistilleryError

NEEDED = {"soak": ("wrk", "redis-server"), "hostile": ("redis-server",), "faults": ("redis-server",)}


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 on wrong usage."""
    about, _, example = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser("python -m benchmarks.endurance", description=about, epilog=example)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--bundle", type=Path, default=Path("runs/full/bundle"), help="default: %(default)s")
    shared.add_argument("--out", type=Path, metavar="FILE.json")
    kinds = p.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("soak", parents=[shared], help="good and bad bodies of every form, for a long time")
    one.add_argument("--requests", type=int, default=1_000_000, help="at least so many (default: %(default)s)")
    one.add_argument("--settled", type=int, default=100_000, help="memory counts from here (default: %(default)s)")
    one.add_argument("--clients", type=int, default=48)
    one.add_argument("--leg", type=int, default=10, metavar="SECONDS", help="default: %(default)s")
    two = kinds.add_parser("hostile", parents=[shared], help="generated bodies that nobody means well with")
    two.add_argument("--bodies", type=int, default=100_000, help="default: %(default)s")
    two.add_argument("--clients", type=int, default=32)
    two.add_argument("--seed", type=int, default=1, help="of the first body (default: %(default)s)")
    three = kinds.add_parser("faults", parents=[shared], help="Redis stopped, paused and full in the midst of it")
    three.add_argument("--rate", type=float, default=800.0, help="requests a second (default: %(default)s)")
    three.add_argument("--seconds", type=int, default=15, help="before, during and after (default: %(default)s)")
    found = p.parse_args(arguments)
    if any(value < 1 for value in vars(found).values() if isinstance(value, int | float)):
        p.error("expected numbers of at least 1")
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the command is for, and which bounds are broken."""
    bundle = options.bundle.resolve()
    missing = [tool for tool in NEEDED[options.kind] if not shutil.which(tool)]
    if missing:
        raise DistilleryError(f"{missing[0]} is not installed: expected it on PATH; Debian has it")
    about = {"machine": machine(), "student": verify(bundle)["digest"]}
    match options.kind:
        case "soak":
            lengths = {"requests": options.requests, "settled": options.settled}
            return about | soak.run(bundle, folder, **lengths, clients=options.clients, leg_s=options.leg)
        case "hostile":
            return about | hostile.run(bundle, bodies=options.bodies, clients=options.clients, seed=options.seed)
        case _:
            return about | faults.run(bundle, rate=options.rate, seconds=options.seconds)


def main(arguments: list[str] | None = None) -> int:
    """Run, print and write. Status 0, 1 when a bound is broken or nothing could be measured, 130 when interrupted."""
    options = options_of(arguments)
    environments.clean()
    about = {"command": shlex.join(["python", "-m", "benchmarks.endurance", *(arguments or sys.argv[1:])])}
    try:
        with tempfile.TemporaryDirectory(prefix="load") as folder:
            result = about | measure(options, Path(folder))
    except KeyboardInterrupt:
        return 130
    except (DistilleryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.out:
        with atomic(options.out) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "legs"}, indent=1))
    for bound in result["broken"]:
        print(f"broken: {bound}", file=sys.stderr)
    return int(bool(result["broken"]))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # ended politely, it ends its servers too
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
