"""What the documents say is so: figures, paths, commands."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from handler.metrics import METRICS
from handler.settings import load
from training.config import Experiment
from training.reading import read_experiment
from training.report import products_table, table

README = Path("README.md").read_text()
RESULTS = sorted(Path("docs/results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_results_keep_the_schema(path: Path) -> None:
    jsonschema.validate(json.loads(path.read_text()), json.loads(Path("training/report.schema.json").read_text()))


def test_the_readmes_table_is_the_committed_reports() -> None:
    report = json.loads(Path("docs/results/full.json").read_text())
    assert table(report) in README


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [("best", "over five seeds:", "Labels alone"), ("few_labels", "With one label", "figures")],
)
def test_the_readmes_gains_are_the_committed_comparisons(name: str, begin: str, end: str) -> None:
    labels, distilled = json.loads(Path(f"docs/results/compare/{name}.json").read_text())["experiments"]
    assert len(distilled["seeds"]) == len(labels["seeds"]) == 5
    gain = distilled["difference"]["accuracy"]
    figures = [gain["mean"], *gain["interval_95"]]
    if name == "best":
        figures += [row["summary"][key]["mean"] for key in ("accuracy", "ece") for row in (distilled, labels)]
    stated = README.split(begin)[1].split(end)[0]
    for share in figures:
        assert f"{100 * share:.2f}" in stated


def test_the_readmes_methods_are_the_committed_comparisons() -> None:
    found = json.loads(Path("docs/results/compare/standing.json").read_text())["experiments"]
    gains = {row["name"]: 100 * row["difference"]["accuracy"]["mean"] for row in found[1:]}
    stated = README.split("All methods side by side")[1].split("## ")[0]
    for name in ("kd", "best", "dist", "dkd"):
        assert f"{gains[name]:.2f}" in stated
    assert gains["label_smoothing"] < 0.05


def committed(name: str) -> dict[str, Any]:
    """A committed report."""
    found: dict[str, Any] = json.loads(Path(f"docs/results/{name}.json").read_text())
    return found


@pytest.fixture(scope="module")
def chain() -> dict[str, Any]:
    """Of the chain to half of the multiply-accumulates."""
    return committed("chain")


def test_the_smallest_is_as_small_as_accurate_and_as_fast_as_is_said(chain: dict[str, Any]) -> None:
    """Beside the reference teacher alone, the first of the three."""
    smallest, full = committed("smallest"), committed("full")
    teacher, best = smallest["engines"]["teacher1"]["eager"], smallest["engines"]["quantized"]["onnx-int8"]
    for key in ("accuracy", "size_bytes"):
        assert teacher[key] == full["engines"]["teacher"]["eager"][key]
    one = [found["latency_ms"]["cpu"]["1"]["p50"] for found in (teacher, best)]
    assert 100 * best["size_bytes"] <= teacher["size_bytes"]
    assert best["accuracy"] >= 0.99 * teacher["accuracy"]
    assert 20 * one[1] <= one[0]
    stated = README.split("## Smaller still")[1].split("## ")[0]
    figures = [f"{teacher['size_bytes'] / best['size_bytes']:.0f} × smaller", f"{one[0] / one[1]:.0f} × faster"]
    figures += [f"{100 * best['accuracy'] / teacher['accuracy']:.1f} % of its", f"{best['size_bytes']:,}"]
    figures += [f"{100 * found['accuracy']:.2f} %" for found in (best, chain["engines"]["quantized"]["onnx-int8"])]
    figures += [f"{100 * smallest['models'][role]['accuracy']:.2f}" for role in ("teacher", "student", "baseline")]
    for figure in (*figures, *(f"{ms:.3f}" for ms in one), smallest["command"]):
        assert figure in stated
    guide = Path("docs/guide/compression.md").read_text()
    for found in (chain, smallest):
        assert products_table(found) in guide and found["command"] in guide


@pytest.mark.parametrize("name", ["chain", "smallest"])
def test_int8_loses_little(name: str) -> None:
    """After training on its grid, and without it; beside the same network in floating point."""
    engines = committed(name)["engines"]
    for role, found in engines.items():
        if "onnx-int8" in found:
            allowed = 0.003 if role == "quantized" else 0.007
            assert found["onnx-int8"]["accuracy"] >= found["eager"]["accuracy"] - allowed, role
    assert engines["quantized"]["onnx-int8"]["accuracy"] >= engines["pruned"]["eager"]["accuracy"] - 0.003


def test_every_engine_of_the_chain_answers_as_pytorch_does(chain: dict[str, Any]) -> None:
    found = {role: engines for role, engines in chain["engines"].items() if len(engines) > 1}
    assert list(found) == ["student", "pruned", "sparse", "quantized"]
    for role, engines in found.items():
        assert list(engines) == ["eager", "onnx", "onnx-int8", "exported", "compiled", "torchscript"]
        for name, figures in engines.items():
            if name != "onnx-int8":
                assert figures["agreement_with_eager"] >= 0.9999, (role, name)
                assert figures["probability_difference_max"] <= 1e-4, (role, name)


def test_half_of_the_multiply_accumulates_are_gone_and_it_is_faster(chain: dict[str, Any]) -> None:
    student, pruned = (chain["models"][role] for role in ("student", "pruned"))
    assert pruned["macs"] <= 0.5 * student["macs"]
    assert pruned["accuracy"] >= student["accuracy"] - 0.005
    whole, half = (chain["engines"][role]["onnx"]["latency_ms"]["cpu"]["1"]["p50"] for role in ("student", "pruned"))
    assert half <= whole / 1.5


COMPARISONS = {
    "standing": ("compare", {path.stem for path in Path("training/experiments/compare").glob("*.yaml")}),
    "best": ("best", {"labels", "distilled"}),
    "few_labels": ("few_labels", {"labels", "distilled"}),
}


@pytest.mark.parametrize(("name", "folder", "files"), [(name, *found) for name, found in COMPARISONS.items()])
def test_committed_comparisons_are_of_the_committed_experiments(name: str, folder: str, files: set[str]) -> None:
    found = json.loads(Path(f"docs/results/compare/{name}.json").read_text())
    assert found["equal_budget"] and {len(row["seeds"]) for row in found["experiments"]} == {5}
    made = {row["name"]: load(Experiment, row["experiment"]) for row in found["experiments"]}
    paths = [Path(f"training/experiments/{folder}/{file}.yaml") for file in files]
    assert made == {(e := read_experiment(path, [], {})).name: e for path in paths}


def test_every_path_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert Path(target).exists(), target


def test_every_file_in_the_readmes_tree_exists() -> None:
    tree = README.split("```\nhandler/ ")[1].split("```")[0]
    folder = Path("handler")
    for line in tree.splitlines():
        if match := re.match(r"(\w+)/ ", line):
            folder = Path(match[1])
        for name in re.findall(r"\b[a-z_*]+\.(?:py|properties|yaml)\b", line):
            where = [folder, Path(), folder / "codecs", folder / "experiments"]
            assert any(list(place.glob(name)) for place in where), f"{folder}/{name}"


def test_every_error_code_is_documented() -> None:
    sources = "".join(path.read_text() for path in Path("handler").rglob("*.py"))
    codes = set(re.findall(r'(?:BadInput|TooLarge|Unsupported|__init__)\("(\w+)"', sources))
    assert {"empty_body", "too_many_pixels", "unsupported_media", "internal", "unsupported"} <= codes
    documented = set(re.findall(r"`(\w+)`", Path("docs/wire.md").read_text()))
    assert codes <= documented


def test_the_changelog_begins_with_the_version() -> None:
    version = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.M)
    first = re.search(r"^## (\S+)", Path("CHANGELOG.md").read_text(), re.M)
    assert version and first and version[1] == first[1]


def test_every_dependency_has_its_reason() -> None:
    reasons = Path("CONTRIBUTING.md").read_text().split("Why each dependency is there")[1]
    names = re.findall(r"^([a-z0-9-]+)==", Path("requirements.txt").read_text(), re.M)
    assert names
    for name in names:
        wanted = "types-*" if name.startswith("types-") else name
        assert wanted in reasons, name


def test_the_settings_that_the_readme_shows_are_valid() -> None:
    flags = re.findall(r"(?:teacher|student|objective|data)\.\w+=\w+", README)
    assert len(flags) >= 3
    for flag in flags:
        read_experiment(Path("training/experiments/quickstart.yaml"), [flag], {})


@pytest.mark.parametrize("module", ["training", "serving"])
def test_help_works_as_a_command(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "example" in done.stdout


@pytest.mark.parametrize("path", sorted(Path("scripts").iterdir()), ids=lambda p: p.name)
def test_scripts_are_short_executable_and_valid(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    assert len(lines) <= 35
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_every_metric_is_declared_and_described() -> None:
    declared = yaml.safe_load(Path("metrics.yaml").read_text())["model_metrics"]
    found = {row["name"]: row["dimensions"] for row in declared["counter"] + declared["gauge"]}
    expected: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        ends = {"_bucket": "le", "_sum": "", "_count": ""} if metric.buckets else {"": metric.label}
        expected |= {name + end: ["ModelName", "Level", *([label] if label else [])] for end, label in ends.items()}
        assert f"| `{name}{'{' + metric.label + '}' if metric.label else ''}` |" in Path("docs/metrics.md").read_text()
    assert found == expected
    assert [row["name"] for row in declared["gauge"]] == [name for name, metric in METRICS.items() if metric.gauge]


def test_the_figures_under_load_in_the_readme_are_those_measured() -> None:
    stated = README.split("## Under load")[1].split("## ")[0]
    found = json.loads(Path("benchmarks/results/serving/same_runtime.json").read_text())
    assert found["settings"]["rounds"] >= 5 and not any(point["wrong"] for point in found["points"])
    for one in found["ratios"]:
        assert f"{one['ratio']['median']:.2f} ×" in stated, one
    soak = json.loads(Path("benchmarks/results/endurance/soak.json").read_text())
    assert f"{soak['requests']:,}" in stated and not soak["broken"]
