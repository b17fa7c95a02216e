"""The one training loop: teacher, assistant, student and baseline differ only in the objective and who teaches.

What chance decides in a batch follows from seed, epoch and step (training/batches.py), so a resumed run continues
exactly where the checkpoint was made. Several processes give what one gives where the network has no batch
statistics and the objective compares no samples with each other; else each sees those of its own part.
"""

import contextlib
import json
import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from handler.bundle import atomic
from handler.errors import DistilleryError
from training.batches import Batch, Batches
from training.config import TrainSettings
from training.criterion import Criterion
from training.data import Split
from training.evaluate import logits_of
from training.features import Output, forward
from training.processes import Processes, arithmetic
from training.progress import bar
from training.schedule import one_cycle
from training.teacher import Teacher

log = logging.getLogger(__name__)


class Interrupted(DistilleryError):
    """Stopped by SIGINT or SIGTERM, after saving."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network's training: `role` names its files, `key` what it is made from."""

    role: str
    key: str
    settings: TrainSettings
    batches: Batches
    validation: Split
    folder: Path
    criterion: Criterion
    teacher: Teacher | None
    device: torch.device
    processes: Processes

    @property
    def checkpoint(self) -> Path:
        """Where all that an exact resume needs is kept until the job is done."""
        return self.folder / f"{self.role}.checkpoint.pt"


class Learner(nn.Module):
    """All that learns, as one module: the network and its criterion's adapters."""

    def __init__(self, network: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion
        self.layers = {path for term in criterion.settings.terms for path in term.layers}

    def forward(
        self, batch: Batch, teacher: Output | None, progress: float, precision: torch.dtype
    ) -> dict[str, Tensor]:
        """The criterion's terms for a batch; the network runs in `precision`, the criterion in float32."""
        with torch.autocast(batch.images.device.type, precision, enabled=precision != torch.float32):
            output = forward(self.network, batch.images, self.layers)
        terms: dict[str, Tensor] = self.criterion(output, teacher, batch, progress)
        return terms


class Trainer:
    """The state of one job: network, adapters, optimizer, and how far it has come."""

    def __init__(self, network: nn.Module, job: Job) -> None:
        self.job = job
        self.learner = Learner(network, job.criterion).to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        shared = job.processes.count > 1
        self.model: nn.Module = DistributedDataParallel(self.learner) if shared else self.learner
        self.optimizer = _optimizer(self.learner, job.settings)
        decay = job.settings.ema
        self.average = (
            AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
            if decay
            else None
        )
        # Small gradients vanish in float16, which only a GPU computes in: they are scaled up.
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.settings.precision == "float16")
        self.steps = job.batches.steps
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.sums: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.stop = False

    @property
    def network(self) -> nn.Module:
        """The network to keep: the average where there is one."""
        kept: nn.Module = self.learner.network if self.average is None else self.average.module
        return kept

    def run(self, resume: bool) -> nn.Module:
        """Train to the last epoch; returns the network. SIGINT or SIGTERM saves, then raises Interrupted."""
        if resume and self.job.checkpoint.exists():
            self._restore()
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with contextlib.ExitStack() as stack:
                board = None
                if self.job.processes.first:
                    folder = self.job.folder / "tensorboard" / self.job.role
                    board = stack.enter_context(SummaryWriter(str(folder), purge_step=self.epoch))
                while self.epoch < self.job.settings.epochs:
                    self._run_epoch()
                    self._finish_epoch(board)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.network

    def _run_epoch(self) -> None:
        self.learner.train()
        role, epochs = self.job.role, self.job.settings.epochs
        with bar(f"{role} {self.epoch + 1}/{epochs}", self.steps, self.step) as advance:
            while self.step < self.steps:
                start = time.perf_counter()
                self._run_step()
                self.seconds += time.perf_counter() - start
                advance()
                if self.stop:
                    if self.job.processes.first:
                        self._save()
                    raise Interrupted(f"{role}: stopped and saved at epoch {self.epoch + 1}, step {self.step}")

    def _run_step(self) -> None:
        settings = self.job.settings
        progress = (self.epoch * self.steps + self.step + 0.5) / (settings.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * one_cycle(progress, settings.warmup)
        self.optimizer.zero_grad()
        for pass_ in range(settings.accumulate):
            self._run_pass(pass_, progress)
        if settings.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.learner.parameters(), settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.learner.network)
        self.step += 1

    def _run_pass(self, number: int, progress: float) -> None:
        """Forward and backward through one of the `accumulate` parts of this process's part of the batch."""
        job, passes = self.job, self.job.settings.accumulate
        part, parts = job.processes.rank * passes + number, job.processes.count * passes
        batch = job.batches.take(self.epoch, self.step, part, parts)
        teacher = None if job.teacher is None else job.teacher(batch.images, batch.index, batch.view)
        last = number == passes - 1
        with contextlib.nullcontext() if last or self.model is self.learner else self.model.no_sync():  # type: ignore[operator]
            terms = self.model(batch, teacher, progress, arithmetic(job.settings.precision, job.device))
            self.scaler.scale(terms["loss"] / passes).backward()
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=job.device)) + term.detach() / passes

    def _finish_epoch(self, board: SummaryWriter | None) -> None:
        job = self.job
        means = job.processes.mean(torch.stack(list(self.sums.values())) / self.steps)
        if not means.isfinite().all():
            raise DistilleryError(
                f"{job.role}: the loss is not finite in epoch {self.epoch + 1}; try a smaller learning_rate"
            )
        images = self.steps * job.settings.batch_size
        line = {"epoch": self.epoch + 1, **dict(zip(self.sums, means.tolist(), strict=True))}
        seconds, self.seconds, self.sums = self.seconds, 0.0, {}
        self.epoch, self.step = self.epoch + 1, 0
        if board is None:
            return
        predicted = logits_of(self.network, job.validation.images).argmax(1)
        line["validation_accuracy"] = (predicted == job.validation.labels.cpu()).float().mean().item()
        line["images_per_s"] = round(images / seconds, 1)
        self.history.append(line)
        for name, value in line.items():
            board.add_scalar(name, value, self.epoch)
        log.info(
            "%-8s epoch %3d/%d  loss %.4f  validation %6.2f %%  %s images/s",
            *(job.role, self.epoch, job.settings.epochs, line["loss"], 100 * line["validation_accuracy"]),
            f"{line['images_per_s']:,.0f}",
        )
        self._save()

    def _save(self) -> None:
        with atomic(self.job.folder / f"{self.job.role}.history.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        cuda = self.job.device.type == "cuda"
        state = {
            "key": self.job.key,
            "network": self.network.state_dict(),
            "learner": self.learner.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": [self.epoch, self.step, self.seconds, self.sums, self.history],
            "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else [])],
        }
        with atomic(self.job.checkpoint) as path:
            torch.save(state, path)

    def _restore(self) -> None:
        job = self.job
        try:
            state = torch.load(job.checkpoint, map_location=job.device, weights_only=True)
        except Exception as error:
            raise DistilleryError(
                f"{job.checkpoint}: not a readable checkpoint ({type(error).__name__}); remove it and start again"
            ) from error
        if state["key"] != job.key:
            log.info("%s: the checkpoint is of other settings or data; starting from the beginning", job.role)
            return
        self.learner.load_state_dict(state["learner"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.seconds, self.sums, self.history = state["progress"]
        torch.set_rng_state(state["random"][0].cpu())
        if job.device.type == "cuda":
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random"][1:]])
        log.info("%s: resuming at epoch %d, step %d", job.role, self.epoch + 1, self.step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop:  # the second time the user means now
            raise KeyboardInterrupt
        self.stop = True


def _optimizer(learner: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay for matrices and kernels alone: shrinking biases and BatchNorm's scales helps nobody."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    return torch.optim.SGD(groups, nesterov=True, momentum=0.9, lr=0.0)
