"""The experiment: a typed tree of settings, all of them with a default but the networks' names.

How it is read from files, flags and the environment, and which values are refused: training/reading.py.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from training.schedule import Value


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data set by name, where its files may lie, and how many images are held out for validation.

    `folder` reads `path`/{train,val,test}/CLASS/*.png|jpg, resized to `height` × `width` pixels and `channels`
    (1 grey, 3 colour); without val/, `validation` images are held out of train/. Elsewhere these four do nothing.
    `labelled` is how many training images keep their label for student and baseline (none: all of them); of the
    others only the teacher speaks, and who has none sees the labelled ones more often, for an epoch is no shorter.
    `train_limit`, `test_limit` keep that many images (0: all), for smoke runs.
    """

    name: Literal["fashion_mnist", "mnist", "cifar10", "folder"] = "fashion_mnist"
    root: str = "data"
    path: str = ""
    height: int = 224
    width: int = 224
    channels: int = 3
    validation: int = 5000
    labelled: int | None = None
    train_limit: int = 0
    test_limit: int = 0


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """The finite set of views of an image (see training/views.py); `shift` is in pixels."""

    shift: int = 1
    flip: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One network and its budget; the baseline is trained with the student's.

    `network` is a name (ours or torchvision's), `file.py:function`, or, for a teacher, an exported program
    `file.pt2`. `weights` is a state dict file to start from; a teacher that has them is not trained. `mean` and
    `std` per channel are of pixels scaled to 0..1 (empty: the training data's); weights of ours bring their own.
    `learning_rate` is the peak: it rises during the first `warmup` part (0..1) of training, then falls along half
    a cosine; `warmup` 0 is a plain cosine, more is one cycle. `precision` below float32 means autocast: it pays
    on large networks, and bfloat16 on a CPU without instructions for it is float32. `accumulate` splits a batch into
    that many passes. 0 turns off `clip` (norm of the gradient), `ema` (decay of the average that is kept),
    `label_smoothing`, `mixup` and `cutmix` (α of their Beta distribution) and `erasing` (share of images). `seed`
    none takes the experiment's.
    """

    network: str
    weights: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    seed: int | None = None
    epochs: int = 6
    batch_size: int = 128
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    warmup: float = 0.2
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    clip: float = 0.0
    ema: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TermSettings:
    """One term of the objective: a function of training/objectives.py by name.

    `weight` none is α, `temperature` none the section's. `standardize` passes both logits through logit
    standardization first. `layers` maps module paths of the student to the teacher's, for those that compare
    features; `adapter` is what fits the student's shape to the teacher's. `options` are the function's own numbers.
    """

    objective: str
    weight: Value | None = None
    temperature: Value | None = None
    standardize: bool = False
    layers: dict[str, str] = field(default_factory=dict)
    adapter: Literal["convolution", "orthogonal"] = "convolution"
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """loss = (1 − alpha)·cross-entropy + Σ weight·term.

    What becomes of a sample for which the teacher is wrong: `keep` it as it is, `drop` it from the terms, or
    `swap` the teacher's logits of its answer and of the label. Samples of which the teacher is less sure than
    `confidence` (its largest probability, 0..1) are left out of the terms, labelled or not.
    """

    temperature: Value = 4.0
    alpha: Value = 0.9
    terms: tuple[TermSettings, ...] = (TermSettings(objective="kd"),)
    wrong_teacher: Literal["keep", "drop", "swap"] = "keep"
    confidence: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """Teachers beside `teacher`, all mixed in probability space.

    `weights` fixed: by `shares`, the teacher's first (none: equal); learned: those that make the validation
    images likeliest; per_sample: by how likely each teacher finds the image's label.
    """

    members: tuple[TrainSettings, ...] = ()
    weights: Literal["fixed", "learned", "per_sample"] = "fixed"
    shares: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """Images made from the teacher alone, for a student that may see no others; 0 `images` turns it off.

    `steps` of Adam at `learning_rate` on each image; `statistics` and `smoothness` weigh the two priors.
    """

    images: int = 0
    steps: int = 200
    learning_rate: float = 0.1
    statistics: float = 1.0
    smoothness: float = 1e-3


LEAST = 32  # images that the ranges of int8 are read off


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Channels taken from the student until the share `macs` (0..1) of its multiply-accumulates is left; 1: none.

    That takes `rounds`, each followed by `epochs` of distillation at `learning_rate`.
    """

    macs: float = 1.0
    rounds: int = 2
    epochs: int = 4
    learning_rate: float = 0.1

    def roles(self) -> list[str]:
        """What the rounds make, in their order; the last is what is wanted."""
        return [*(f"pruned{i}" for i in range(1, self.rounds)), "pruned"] if self.macs < 1 else []


@dataclass(frozen=True, kw_only=True)
class SparsifySettings:
    """The share `zeros` (0..1) of the student's weights set to zero, then `epochs` of distillation; 0: none."""

    zeros: float = 0.0
    epochs: int = 4
    learning_rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """`epochs` of distillation with weights rounded to a grid of `bits`, 2 to 8, for int8 to lose less; 0: none.

    They are stored as int8; fewer bits pack smaller. It starts from the pruned student where there is one.
    """

    bits: int = 8
    epochs: int = 0
    learning_rate: float = 0.05


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """What is made of the student beside itself; `formats` are those that student and products are exported to.

    `calibration` is how many training images show int8 the ranges of what layers say. `serve` is which of them the
    bundle holds: student, pruned, sparse or quantized.
    """

    prune: PruneSettings = field(default_factory=PruneSettings)
    sparsify: SparsifySettings = field(default_factory=SparsifySettings)
    quantize: QuantizeSettings = field(default_factory=QuantizeSettings)
    formats: tuple[Literal["onnx", "onnx-int8", "exported", "compiled", "torchscript", "executorch"], ...] = ("onnx",)
    calibration: int = 1000
    serve: Literal["student", "pruned", "sparse", "quantized"] = "student"

    def products(self) -> dict[str, PruneSettings | SparsifySettings | QuantizeSettings]:
        """What is made of the student by further training, and how: pruned (in rounds), sparse, quantized."""
        made: dict[str, PruneSettings | SparsifySettings | QuantizeSettings] = {}
        made |= dict.fromkeys(self.prune.roles(), self.prune)
        if self.sparsify.zeros:
            made["sparse"] = self.sparsify
        if self.quantize.epochs:
            made["quantized"] = self.quantize
        return made

    def exported(self) -> list[str]:
        """The roles that are exported to `formats`: the student, and what came of it in the end."""
        return ["student", *(role for role in self.products() if role not in self.prune.roles()[:-1])]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that decides a run. `device` auto takes the first GPU if there is one.

    `assistants` stand between teacher and student, each distilled from the one before it. `bank` stores the
    teacher's logits for every view once, instead of asking it in every epoch.
    """

    name: str
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    baseline: bool = False
    bank: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    teacher: TrainSettings = field(default_factory=lambda: TrainSettings(network="residual"))
    ensemble: EnsembleSettings = field(default_factory=EnsembleSettings)
    assistants: tuple[TrainSettings, ...] = ()
    student: TrainSettings = field(default_factory=lambda: TrainSettings(network="separable"))
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)
    compress: CompressSettings = field(default_factory=CompressSettings)

    def to_dict(self) -> dict[str, Any]:
        """The effective tree as plain values, as it is written to `experiment.yaml` and into the passport."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def teachers(self) -> dict[str, TrainSettings]:
        """The teachers by the name of their files; one without a seed takes the experiment's and its own number."""
        return {
            "teacher" if i == 0 else f"teacher{i + 1}": _seeded(settings, self.seed + i)
            for i, settings in enumerate((self.teacher, *self.ensemble.members))
        }

    def roles(self) -> dict[str, TrainSettings]:
        """All networks by the name of their files, in the order of their training, each with its seed."""
        assistants = {f"assistant{i}": _seeded(settings, self.seed) for i, settings in enumerate(self.assistants, 1)}
        student = _seeded(self.student, self.seed)
        products = {
            role: dataclasses.replace(student, epochs=how.epochs, learning_rate=how.learning_rate)
            for role, how in self.compress.products().items()
        }
        return {**self.teachers(), **assistants, "student": student, **products}


def _seeded(settings: TrainSettings, seed: int) -> TrainSettings:
    return settings if settings.seed is not None else dataclasses.replace(settings, seed=seed)
