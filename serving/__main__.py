"""Serving's command line: `python -m serving pack | check | start | status | predict | scale | stop | bench`."""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from handler import settings as typed
from handler.errors import DistilleryError, SettingsError
from serving import archive, operate, predict, preflight, server, tune
from serving.archive import ServeSettings
from serving.arguments import ARGUMENTS, DIMENSIONS, EXAMPLES, FLAGS
from serving.bench import Load
from serving.client import Client, token
from serving.instance import Instance, locate
from serving.profiles import PROFILES, with_settings


def pack_command(options: argparse.Namespace) -> int:
    """Make an archive of a bundle: verified, byte for byte reproducible."""
    flags = {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    if options.engine:
        flags["handler"] = {"engine": options.engine}
    environment = {"handler": typed.environment(os.environ).get("handler", {})}
    tree = typed.load(ServeSettings, PROFILES[options.profile], environment, flags, *map(_setting, options.settings))
    made = archive.pack(options.bundle, options.model_store, name=options.name, version=options.version, settings=tree)
    found = {"path": str(made.path), "size_bytes": made.size_bytes, "digest": made.digest}
    return _show(options, found, f"{made.path}  {made.size_bytes:,} bytes  digest {made.digest}")


def check_command(options: argparse.Namespace) -> int:
    """Load an archive as a worker does, without TorchServe, and replay its golden payloads."""
    try:
        found = preflight.check(options.archive)
    except preflight.CheckFailed as error:
        print(error.output, file=sys.stderr)
        raise
    text = (
        f"{options.archive}: ok: {found.payloads} golden payloads ({', '.join(found.forms)}), probabilities within "
        f"{found.max_difference:.1e}, loaded in {found.load_s} s, replayed in {found.replay_s} s"
    )
    return _show(options, dataclasses.asdict(found), text)


def start_command(options: argparse.Namespace) -> int:
    """Start TorchServe and wait until every worker is READY with what the archive asks for."""
    instance, path = _instance(options), options.model_store / options.models
    if options.profile:
        target = instance.home / options.profile / path.name
        path = with_settings(path, PROFILES[options.profile], target).path
    began = server.start(instance, path, config=options.config, tokens=not options.no_token, replace=options.replace)
    found = operate.status(instance, archive.read(path).name)
    return _show(options, dataclasses.asdict(found), f"{'started' if began else 'already running'}: {_line(found)}")


def token_command(options: argparse.Namespace) -> int:
    """Print the token that requests need, new at each start: Authorization: Bearer TOKEN."""
    instance = _instance(options)
    found = token(instance.key_file, "management" if options.management else "inference")
    if found is None:
        raise DistilleryError(f"{instance.key_file}: no such file: no server runs here, or it asks for no token")
    return _show(options, {"token": found}, found)


def stop_command(options: argparse.Namespace) -> int:
    """Drain, stop TorchServe, and wait until it and its workers are gone."""
    ended = server.stop(_instance(options), options.drain)
    return _show(options, {"stopped": ended}, "stopped" if ended else "not running")


def status_command(options: argparse.Namespace) -> int:
    """Tell what really runs; exit status 0 only when every worker is READY with the settings asked for."""
    found = operate.status(_instance(options), options.name)
    workers = [
        f"\n  worker {worker.id}  pid {worker.pid}  {worker.status}  {worker.memory_bytes / 2**20:.0f} MiB"
        + (f"  GPU {worker.gpu}" if worker.gpu else "")
        for worker in found.workers
    ]
    _show(options, dataclasses.asdict(found), _line(found) + "".join(workers))
    return 0 if found.ready else 1


def scale_command(options: argparse.Namespace) -> int:
    """Change the number of workers, and wait until exactly so many are READY."""
    model = operate.scale(_instance(options), options.name, options.workers, drain_s=options.drain)
    return _show(options, {"workers": model.ready}, f"{model.name}: {model.ready} workers READY")


def predict_command(options: argparse.Namespace) -> int:
    """Send images, print what the server makes of each; exit status 1 when one of them was refused."""
    if not options.paths and not options.index:
        raise SettingsError("nothing to predict: expected image files, folders, or --index")
    instance, inputs = _instance(options), predict.files(options.paths)
    labels: tuple[str, ...] = ()
    if options.index or options.archive.is_file():
        labels, tests = predict.test_images(options.archive, options.index)
        inputs += tests
    with Client(options.url or instance.inference, model=options.name, key_file=instance.key_file) as client:
        rows = predict.ask(client, inputs, labels, options.top)
    _show(options, rows, predict.table(rows))
    return 1 if any("error" in row for row in rows) else 0


def bench_command(options: argparse.Namespace) -> int:
    """Measure an archive under load, in a TorchServe of its own; with --tune, write what serves it best into it."""
    load = Load(options.clients, options.seconds)
    server.log.setLevel(logging.WARNING)  # that it starts is no news here
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it ends its server, too
    if options.tune:
        wanted = {name: values for name, values in vars(options).items() if name in DIMENSIONS}
        how = {"rounds": options.rounds, "objective": options.objective, "write": not options.dry_run}
        found = tune.tune(options.archive, load, options.config, wanted=wanted, **how)
    else:
        found = tune.measure(options.archive, load, options.config, options.rounds)
    return _show(options, dataclasses.asdict(found), found.text())


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The grammar of each command; separate ones, for only so may flags and other arguments be mixed."""
    found = {}
    for name, example in EXAMPLES.items():
        run: Callable[[argparse.Namespace], int] = globals()[f"{name}_command"]
        p = argparse.ArgumentParser(f"python -m serving {name}", description=run.__doc__, epilog=f"example: {example}")
        p.set_defaults(run=run)
        ARGUMENTS[name](p)
        p.add_argument("--json", action="store_true", help="print JSON")
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        found[name] = p
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line; exits with status 2 on wrong usage."""
    commands = parsers()
    lines = [f"  {name:8} {p.description}" for name, p in commands.items()]
    p = argparse.ArgumentParser(
        "python -m serving",
        description="Pack, check, serve, ask.\n\ncommands:\n" + "\n".join(lines),
        epilog="examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=commands, metavar="COMMAND", help="COMMAND --help tells more")
    command: str = p.parse_args(arguments[:1]).command
    return commands[command].parse_intermixed_args(arguments[1:])


def _instance(options: argparse.Namespace) -> Instance:
    return locate(options.config, options.port)


def _setting(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError(f"{text}: expected key=value, such as handler.cache.ttl_s=60")
    return typed.nested(name.split("."), typed.parse(name, value))


def _line(found: operate.Status) -> str:
    state = "ready" if found.ready else "running, not ready" if found.running else "not running"
    ready = sum(worker.status == "READY" for worker in found.workers)
    digest, size = (found.digest or "")[:12], found.batch_size
    model = f", {found.name} {found.version} {digest}, batchSize {size}, {ready} READY" if found.workers else ""
    return f"{found.address}: {state}{model}" + "".join(f"\n  {problem}" for problem in found.problems)


def _show(options: argparse.Namespace, found: Any, text: str) -> int:
    print(json.dumps(found, indent=2) if options.json else text)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True)
    rich = [RichHandler(console=console, show_time=False, show_level=False, show_path=False)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=rich if console.is_terminal else None)
    try:
        with console.status("working …"):  # a spinner on a terminal, nothing elsewhere
            return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except DistilleryError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
