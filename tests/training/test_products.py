"""The chain of compression as a run: each product from the one before it, taught, exported, measured, served."""

import dataclasses
import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch

from handler.bundle import FILES, verify
from handler.contract import Contract
from handler.engines import INT8
from handler.errors import DistilleryError, SettingsError
from handler.model import load_model
from handler.networks import build
from handler.settings import HandlerSettings
from handler.widths import fit
from tests.training.conftest import stages_run
from training import report
from training.config import CompressSettings, Experiment, PruneSettings, QuantizeSettings, SparsifySettings
from training.evaluate import macs
from training.pipeline import DistillationPipeline

CHAIN = CompressSettings(
    prune=PruneSettings(macs=0.5, rounds=2, epochs=1, learning_rate=0.02),
    sparsify=SparsifySettings(zeros=0.8, epochs=1, learning_rate=0.02),
    quantize=QuantizeSettings(bits=8, epochs=1, learning_rate=0.02),
    formats=("onnx", "onnx-int8"),
    calibration=64,
    serve="quantized",
)


@pytest.fixture
def run(experiment: Experiment, tmp_path: Path, finished: Path) -> DistillationPipeline:
    """A finished run of the chain, each test's own copy."""
    wanted = dataclasses.replace(experiment, compress=CHAIN)
    DistillationPipeline(wanted, finished).run()
    shutil.copytree(finished, tmp_path / "runs")
    return DistillationPipeline(wanted, tmp_path / "runs")


def test_products_are_made_in_the_order_of_the_chain(run: DistillationPipeline) -> None:
    products = ["pruned1", "pruned", "sparse", "quantized"]
    assert stages_run(run) == ["teacher", "student", *products, "export", "evaluate", "bundle"]
    names = {path.name for path in run.folder.iterdir()}
    assert {"student.onnx", "pruned.onnx", "sparse.onnx", "quantized.onnx", "quantized.int8.onnx.xz"} <= names
    assert "pruned1.onnx" not in names and "trade_off.png" in names


def test_each_is_what_it_says(run: DistillationPipeline) -> None:
    shape = run.dataset.shape
    whole, first, half, quantized = (macs(run.load(r), shape) for r in ("student", "pruned1", "pruned", "quantized"))
    assert half <= first <= 0.71 * whole and half <= 0.5 * whole
    assert quantized == half, "made of the pruned student"
    weights = [value.flatten() for name, value in run.load("sparse").state_dict().items() if value.ndim > 1]
    assert (torch.cat(weights[2:]) == 0).float().mean().item() == pytest.approx(0.8, abs=0.01)


def test_the_report_has_every_product_in_every_engine(run: DistillationPipeline) -> None:
    found = report.read(run.folder)
    jsonschema.validate(found, json.loads(Path("training/report.schema.json").read_text()))
    assert list(found["models"]) == list(found["engines"]) == ["teacher", "student", "pruned", "sparse", "quantized"]
    for role in ("student", "pruned", "sparse", "quantized"):
        engines = found["engines"][role]
        assert list(engines) == ["eager", "onnx", INT8]
        assert engines["onnx"]["agreement_with_eager"] == 1
        assert engines["onnx"]["probability_difference_max"] < 1e-4
        assert engines["eager"]["accuracy"] == found["models"][role]["accuracy"]
        assert engines[INT8]["size_bytes"] == (run.folder / f"{role}.int8.onnx.xz").stat().st_size
        assert engines[INT8]["rss_bytes"] > 10_000_000
    sizes = {role: found["engines"][role]["onnx"]["packed_bytes"] for role in ("student", "sparse")}
    assert sizes["sparse"] < 0.5 * sizes["student"]
    assert "quantized onnx-int8" in report.products_table(found)


def test_the_bundle_holds_the_product_that_is_to_be_served(run: DistillationPipeline) -> None:
    bundle = run.folder / "bundle"
    verify(bundle)
    served, quantized = (torch.load(path) for path in (bundle / FILES.weights, run.folder / "quantized.pt"))
    assert served.keys() == quantized.keys() and all(torch.equal(served[name], quantized[name]) for name in served)
    assert (bundle / FILES.onnx_int8).read_bytes() == (run.folder / "quantized.int8.onnx.xz").read_bytes()
    contract = Contract.read(bundle / FILES.contract)
    threads = torch.get_num_threads()  # which loading a model sets, and the bits of a later training depend on
    for engine in ("eager", "onnx", INT8):
        model, _ = load_model(bundle, contract, HandlerSettings(engine=engine), threads, None, 1)  # type: ignore[arg-type]
        assert model.predict(run.dataset.test.images[:3].numpy()).shape == (3, 4)


def test_a_change_of_the_grid_leaves_what_does_not_stand_on_it(run: DistillationPipeline) -> None:
    done = len(stages_run(run))
    how = dataclasses.replace(CHAIN, quantize=dataclasses.replace(CHAIN.quantize, bits=4))
    changed = DistillationPipeline(dataclasses.replace(run.experiment, compress=how), run.folder.parent)
    for role in ("teacher", "student", *CHAIN.products()):
        changed.run(role)
    assert stages_run(changed)[done:] == ["quantized"]
    state = changed.load("quantized").state_dict()
    for name, value in state.items():
        if value.ndim == 4 and "normalize" not in name:
            assert max(len(row.unique()) for row in value.flatten(1)) <= 15


def test_compress_makes_and_measures_products_of_a_finished_run(experiment: Experiment, tmp_path: Path) -> None:
    DistillationPipeline(experiment, tmp_path).run()
    left_out = {"prune": PruneSettings(), "sparsify": SparsifySettings(), "formats": ("onnx",), "serve": "student"}
    how = dataclasses.replace(CHAIN, **left_out)  # type: ignore[arg-type]
    pipeline = DistillationPipeline(dataclasses.replace(experiment, compress=how), tmp_path)
    pipeline.run("compress")
    ran = ["teacher", "student", "export", "evaluate", "bundle", "quantized", "export", "evaluate", "bundle"]
    assert stages_run(pipeline) == ran
    assert list(report.read(pipeline.folder)["engines"]) == ["teacher", "student", "quantized"]


def test_compress_needs_the_run(experiment: Experiment, tmp_path: Path) -> None:
    pipeline = DistillationPipeline(dataclasses.replace(experiment, compress=CHAIN), tmp_path)
    with pytest.raises(DistilleryError, match=r"pruned1: .*teacher.pt is missing; run the stages before it first"):
        pipeline.run("compress")


def test_more_calibration_images_than_there_are_is_refused_before_any_training(
    experiment: Experiment, tmp_path: Path
) -> None:
    how = dataclasses.replace(CHAIN, calibration=257)
    pipeline = DistillationPipeline(dataclasses.replace(experiment, compress=how), tmp_path)
    with pytest.raises(SettingsError, match="expected at most the 256 training images, got 257"):
        pipeline.run()
    assert not pipeline.folder.exists()


def test_a_product_of_another_run_is_refused_or_made_again(run: DistillationPipeline) -> None:
    """Its digest is not the one in the history: a stage that reads it refuses; a whole run makes it again."""
    (run.folder / "student.int8.onnx.xz").write_bytes((run.folder / "quantized.int8.onnx.xz").read_bytes())
    with pytest.raises(DistilleryError, match=r"evaluate: .*int8\.onnx\.xz: not what this run made"):
        run.run("evaluate")
    other = build("separable", channels=1, size=(8, 8), classes=4)
    torch.save(other.state_dict(), run.folder / "pruned.pt")
    with pytest.raises(DistilleryError, match=r"pruned\.pt: not the pruned of this experiment"):
        run.load("pruned")
    with pytest.raises(DistilleryError, match=r"quantized: .*pruned\.pt: not what this run made"):
        run.run("quantized")
    done = len(stages_run(run))
    run.run()
    assert stages_run(run)[done:] == ["pruned", "export"]
    fit(build("seed_student", channels=1, size=(8, 8), classes=4), torch.load(run.folder / "pruned.pt"))
