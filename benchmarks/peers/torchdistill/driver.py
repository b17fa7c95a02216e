"""Train with torchdistill as its examples do, and print the seconds of each epoch as one JSON line.

    cd FOLDER_OF_data && PYTHON_WITH_torchdistill driver.py --workers 2

benchmarks/training_speed.py starts it. Logging, validation and `loss.item()` of its example script are left out:
they would only slow it down.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from torchdistill.common import yaml_util
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.models.registry import get_model, register_model

from handler.networks import NETWORKS


def make(name: str) -> nn.Module:
    """Our architecture without our first layer: torchdistill's users normalise in the data loader."""
    return nn.Sequential(*NETWORKS[name](1, (28, 28), 10).values())


@register_model
def residual() -> nn.Module:
    """The teacher."""
    return make("residual")


@register_model
def separable() -> nn.Module:
    """The student."""
    return make("separable")


@register_forward_proc_func
def forward_bfloat16(model: nn.Module, images: Tensor, *_: object, **__: object) -> Tensor:
    """A forward pass in bfloat16, which its box has no setting for."""
    with torch.autocast(images.device.type, torch.bfloat16):
        logits: Tensor = model(images)
    return logits.float()


def train_epoch(box: DistillationBox, epoch: int) -> float:
    """Images per second of one epoch of its documented loop, data loading included."""
    start, images = time.perf_counter(), 0
    box.pre_epoch_process(epoch=epoch)
    for batch, labels, extra in box.train_data_loader:
        loss = box.forward_process(batch, labels, extra)
        box.post_forward_process(loss=loss)
        images += len(batch)
    box.post_epoch_process()
    return images / (time.perf_counter() - start)


def main() -> None:
    """Read the settings, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=0, help="processes of the data loader")
    parser.add_argument("--tuned", action="store_true", help="teacher in bfloat16, both networks channels-last")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = yaml_util.load_yaml_file(str(Path(__file__).with_name("kd.yaml")))
    loader = config["train"]["train_data_loader"]["kwargs"]
    loader |= {"num_workers": options.workers, "persistent_workers": options.workers > 0}
    layout = torch.channels_last if options.tuned else torch.contiguous_format
    if options.tuned:
        config["train"]["teacher"]["forward_proc"] = forward_bfloat16.__name__
    teacher, student = (get_model(config["models"][f"{role}_model"]["key"]) for role in ("teacher", "student"))
    teacher, student = teacher.eval().to(memory_format=layout), student.to(memory_format=layout)
    box = get_distillation_box(
        teacher, student, config["datasets"], config["train"], torch.device("cpu"), None, False, 1
    )
    speeds = [train_epoch(box, epoch) for epoch in range(options.epochs)]
    print(json.dumps({"images_per_s": speeds, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
