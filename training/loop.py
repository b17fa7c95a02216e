"""The one training loop: teacher, student and baseline differ only in the objective that they are given.

All that chance decides in an epoch (order, views) follows from the seed and the epoch's number alone, so that
student and baseline see the same batches, and a resumed run continues exactly where the checkpoint was made.
"""

import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from handler.bundle import atomic
from handler.errors import DistilleryError
from training.config import TrainSettings
from training.data import Dataset
from training.evaluate import logits_of
from training.progress import bar
from training.schedule import one_cycle
from training.views import Views

log = logging.getLogger(__name__)


class Interrupted(DistilleryError):
    """Stopped by SIGINT or SIGTERM, after saving."""


@dataclass(frozen=True)
class Batch:
    """Views of training images, uint8 `[B, C, H, W]`; labels, index and view, int64 `[B]`."""

    images: Tensor
    labels: Tensor
    index: Tensor
    view: Tensor


Objective = Callable[[Tensor, Batch], dict[str, Tensor]]
"""(logits `[B, K]`, batch) → named terms, scalars; `loss` is the one that is minimised."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network's training: `role` names its files, `key` what it is made from."""

    role: str
    key: str
    settings: TrainSettings
    seed: int
    objective: Objective
    views: Views
    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Where all that an exact resume needs is kept until the job is done."""
        return self.folder / f"{self.role}.checkpoint.pt"


class Trainer:
    """The state of one job: network, optimizer, and how far it has come."""

    def __init__(self, network: nn.Module, data: Dataset, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.train, self.validation = data.train.to(device), data.validation.to(device)
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(_groups(network, job.settings.weight_decay), nesterov=True, momentum=0.9, lr=0)
        self.steps = len(self.train) // job.settings.batch_size
        if self.steps == 0:
            raise DistilleryError(
                f"{job.role}.batch_size={job.settings.batch_size}: at most {len(self.train)}, the training images"
            )
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.sums: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.stop = False

    def run(self, resume: bool) -> None:
        """Train to the last epoch. SIGINT or SIGTERM saves a checkpoint, then raises Interrupted."""
        if resume and self.job.checkpoint.exists():
            self._restore()
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with SummaryWriter(str(self.job.folder / "tensorboard" / self.job.role), purge_step=self.epoch) as board:
                while self.epoch < self.job.settings.epochs:
                    self._run_epoch()
                    self._finish_epoch(board)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run_epoch(self) -> None:
        order, view = self._draw()
        self.network.train()
        role, epochs = self.job.role, self.job.settings.epochs
        with bar(f"{role} {self.epoch + 1}/{epochs}", self.steps, self.step) as advance:
            while self.step < self.steps:
                start = time.perf_counter()
                self._run_step(order, view)
                self.seconds += time.perf_counter() - start
                advance()
                if self.stop:
                    self._save()
                    raise Interrupted(f"{role}: stopped and saved at epoch {self.epoch + 1}, step {self.step}")

    def _run_step(self, order: Tensor, view: Tensor) -> None:
        settings = self.job.settings
        progress = (self.epoch * self.steps + self.step + 0.5) / (settings.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * one_cycle(progress, settings.warmup)
        place = slice(self.step * settings.batch_size, (self.step + 1) * settings.batch_size)
        index, chosen = order[place], view[place]
        batch = Batch(self.job.views.apply(self.train.images[index], chosen), self.train.labels[index], index, chosen)
        precision = getattr(torch, settings.precision)
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            logits = self.network(batch.images)
        terms = self.job.objective(logits.float(), batch)
        self.optimizer.zero_grad()
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.item()
        self.step += 1

    def _draw(self) -> tuple[Tensor, Tensor]:
        """This epoch's order of the training images and the view of each place in it."""
        text = f"{self.job.seed}/{self.epoch}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(self.train), generator=generator)
        view = torch.randint(len(self.job.views), (len(self.train),), generator=generator)
        return order.to(self.device), view.to(self.device)

    def _finish_epoch(self, board: SummaryWriter) -> None:
        means = {name: total / self.steps for name, total in self.sums.items()}
        if not all(map(torch.isfinite, map(torch.tensor, means.values()))):
            raise DistilleryError(
                f"{self.job.role}: the loss is not finite in epoch {self.epoch + 1}; try a smaller learning_rate"
            )
        predicted = logits_of(self.network, self.validation.images).argmax(1)
        accuracy = (predicted == self.validation.labels.cpu()).float().mean().item()
        rate = self.steps * self.job.settings.batch_size / self.seconds
        line = {"epoch": self.epoch + 1, **means, "validation_accuracy": accuracy, "images_per_s": round(rate, 1)}
        self.history.append(line)
        for name, value in line.items():
            board.add_scalar(name, value, self.epoch + 1)
        log.info(
            "%-8s epoch %3d/%d  loss %.4f  validation %6.2f %%  %s images/s",
            *(self.job.role, self.epoch + 1, self.job.settings.epochs, means["loss"], 100 * accuracy, f"{rate:,.0f}"),
        )
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, {}
        self._save()

    def _save(self) -> None:
        with atomic(self.job.folder / f"{self.job.role}.history.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        state = {
            "key": self.job.key,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": [self.epoch, self.step, self.seconds, self.sums, self.history],
            "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [])],
        }
        with atomic(self.job.checkpoint) as path:
            torch.save(state, path)

    def _restore(self) -> None:
        try:
            state = torch.load(self.job.checkpoint, map_location=self.device, weights_only=True)
        except Exception as error:
            raise DistilleryError(
                f"{self.job.checkpoint}: not a readable checkpoint ({type(error).__name__}); remove it and start again"
            ) from error
        if state["key"] != self.job.key:
            log.info("%s: the checkpoint is of other settings or data; starting from the beginning", self.job.role)
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.seconds, self.sums, self.history = state["progress"]
        torch.set_rng_state(state["random"][0].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random"][1:]])
        log.info("%s: resuming at epoch %d, step %d", self.job.role, self.epoch + 1, self.step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop:  # the second time the user means now
            raise KeyboardInterrupt
        self.stop = True


def _groups(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels alone: shrinking biases and BatchNorm's scales helps nobody."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
