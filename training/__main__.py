"""The command line of training: `python -m training <stage|run|compress|compare|search> EXPERIMENT.yaml [k=v …]`."""

import argparse
import json
import logging
import os
import shlex
import sys
from pathlib import Path

from handler.errors import DistilleryError, SettingsError
from training.config import Experiment
from training.loop import Interrupted
from training.pipeline import DistillationPipeline
from training.processes import keep_memory, together
from training.reading import read_experiment
from training.report import products_table, read, table

EXAMPLE = """examples:
  python -m training run training/experiments/quickstart.yaml
  python -m training run training/experiments/quickstart.yaml student.epochs=20 baseline=true --resume
  python -m training evaluate training/experiments/quickstart.yaml
  python -m training compress training/experiments/quickstart.yaml compress.prune.macs=0.5 compress.quantize.epochs=4
  python -m training compare training/experiments/compare/{baseline,kd,dist}.yaml --seeds 5
  python -m training search training/experiments/quickstart.yaml --minutes 30
  torchrun --standalone --nproc-per-node 2 -m training run training/experiments/quickstart.yaml
settings: flag > DISTILLERY__SECTION__KEY > file > default; DIST_TEMP, DIST_ALPHA, DIST_EPOCHS, BATCH_SIZE too"""
STAGE = """run: all stages; prepare: all before the student; compress: all that is made of the student; data:
only fetch it; compare: several experiments, seed by seed; search: the best T, α and weights; or a stage by its name:
teacher, student, baseline, export, evaluate, bundle, and where the experiment has them teacher2 …, ensemble,
assistant1 …, synthesize, pruned, sparse, quantized"""
WORDS = "an experiment file (compare: several, the baseline first), and settings over the file's"


def parser() -> argparse.ArgumentParser:
    """The command's grammar."""
    p = argparse.ArgumentParser(
        "python -m training",
        description="Train a teacher, distil a student, prove it, bundle it. Stages that are done are skipped.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("stage", help=STAGE)
    p.add_argument("words", nargs="+", metavar="EXPERIMENT.yaml | section.key=value", help=WORDS)
    p.add_argument("--resume", action="store_true", help="carry on from the checkpoint of an interrupted run")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    p.add_argument("--seeds", type=int, default=5, help="compare: how many seeds (default: 5)")
    p.add_argument("--minutes", type=float, default=30, help="search: the time it may take (default: 30)")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compare, search: trainings at a time")
    p.add_argument("--output", type=Path, help="compare, search: the JSON to write, .md and .png beside it")
    p.add_argument("--json", action="store_true", help="print the result as JSON when done")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def run(options: argparse.Namespace) -> None:
    """Do what the stage names, and print its result."""
    settings = [word for word in options.words if "=" in word]
    files = [Path(word) for word in options.words if "=" not in word]
    # Imported where they are used: what they stand on would cost every training a second.
    if options.stage == "compare":
        from training import compare

        found = compare.run(files, options.seeds, settings, options.runs, options.jobs, options.output)
        print(json.dumps(found, indent=2) if options.json else compare.table(found))
        return
    if len(files) != 1:
        raise SettingsError(f"{options.stage}: expected one experiment file, got {len(files)}")
    if options.stage == "search":
        from training import search

        found = search.run(files[0], settings, options.runs, options.minutes, options.jobs, options.output)
        print(json.dumps(found, indent=2) if options.json else search.table(found))
        return
    run_stages(read_experiment(files[0], settings, os.environ), options)


def run_stages(experiment: Experiment, options: argparse.Namespace) -> None:
    """Run a stage, or several, in this process or as one of those that torchrun started."""
    with together(experiment.device) as (processes, device):
        command = shlex.join(["python", "-m", "training", "run", *options.words])
        pipeline = DistillationPipeline(experiment, options.runs, options.resume, processes, device, command)
        if options.stage == "data":
            print(f"{pipeline.dataset.name}: {len(pipeline.dataset.train):,} images to train on")
            return
        if not processes.first:
            logging.getLogger("training").setLevel(logging.WARNING)
        pipeline.run(None if options.stage == "run" else options.stage)
        if options.stage in ("run", "evaluate", "compress") and processes.first:
            report = read(pipeline.folder)
            text = products_table(report) if options.stage == "compress" else table(report)
            print(json.dumps(report, indent=2) if options.json else text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = parser().parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("training").setLevel(logging.INFO)
    keep_memory()
    try:
        run(options)
    except Interrupted as error:
        print(f"{error}; the same command with --resume carries on", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        return 130
    except DistilleryError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
