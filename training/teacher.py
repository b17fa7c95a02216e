"""A teacher is one call: (images, index, view) → output. The student never learns where the answer comes from."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.features import Output, forward


class Teacher(Protocol):
    """What a student may ask: the teacher's logits `[B, K]` for views of training images.

    `images` are the views themselves, `[B, C, H, W]`; `index` and `view`, int64 `[B]`, name them.
    """

    def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Output:
        """Logits float32 `[B, K]`, and the features that it was made to give."""
        ...


class LiveTeacher:
    """A frozen network: in eval mode, without gradients, its parameters and statistics never touched."""

    def __init__(self, network: nn.Module, precision: torch.dtype, layers: Iterable[str] = ()) -> None:
        self.network = network.eval().requires_grad_(False)
        self.precision, self.layers = precision, tuple(layers)

    def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Output:
        """Logits and the features of `layers`, for `[B, C, H, W]` of uint8, or of floats in 0..255."""
        reduced = self.precision != torch.float32
        with torch.inference_mode(), torch.autocast(images.device.type, self.precision, enabled=reduced):
            output = forward(self.network, images, self.layers)
        # Copies outside inference mode may take part in autograd.
        return Output(output.logits.clone(), {path: f.clone() for path, f in output.features.items()})


class Mixture(nn.Module):
    """Several networks as one, mixed in probability space: logits = log Σ_k w_k softmax(z_k).

    The mean of what they predict, not of their logits, which would let the most confident one decide. What comes
    out are log-probabilities: logits whose softmax is the mixture.
    """

    shares: Tensor

    def __init__(self, networks: Sequence[nn.Module], shares: Sequence[float]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float64).div(math.fsum(shares)).float())

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` → log-probabilities `[B, K]`."""
        logits = torch.stack([network(images).float() for network in self.networks])
        return mix(logits, self.shares[:, None])


class PerSample:
    """Teachers mixed anew for each sample, by how likely each finds its label: w_k = softmax_k(log p_k(y)).

    After Zhang, Chen and Wang 2022, arXiv:2201.00007, who weigh by the cross-entropy with the label too. An
    unlabelled sample (label −1) has equal weights. `labels` are those of the training images, int64 `[N]`.
    """

    def __init__(self, teachers: Sequence[Teacher], labels: Tensor) -> None:
        self.teachers, self.labels = teachers, labels

    def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Output:
        """Log-probabilities `[B, K]` of the mixture."""
        logits = torch.stack([teacher(images, index, view).logits for teacher in self.teachers])
        labels = self.labels[index]
        columns = labels.clamp(min=0)[None, :, None].expand(len(logits), -1, 1)
        likely = F.log_softmax(logits, dim=2).gather(2, columns).squeeze(2)
        shares = torch.where(labels >= 0, F.softmax(likely, dim=0), 1 / len(logits))
        return Output(mix(logits, shares))


def mix(logits: Tensor, shares: Tensor) -> Tensor:
    """log Σ_k shares_k · softmax(logits_k): `[M, B, K]` with `[M, B]` (or `[M, 1]`) → `[B, K]`."""
    return (F.log_softmax(logits, dim=2) + shares.log()[:, :, None]).logsumexp(0)


def learned_shares(logits: Tensor, labels: Tensor, rounds: int = 200) -> list[float]:
    """The mixture weights that make `labels` `[N]` likeliest, given each teacher's logits `[M, N, K]` for them.

    Expectation and maximisation for the weights of a mixture with fixed parts (Dempster, Laird and Rubin 1977,
    JRSS B 39:1, section 4.3): w_k ← mean_i w_k p_k(y_i) / Σ_j w_j p_j(y_i). The likelihood never falls and has
    one maximum. The images must be others than the teachers were trained on.
    """
    columns = labels[None, :, None].expand(len(logits), -1, 1)
    likely = F.log_softmax(logits.double(), dim=2).gather(2, columns).squeeze(2)
    shares = torch.full((len(logits), 1), 1 / len(logits), dtype=torch.float64)
    for _ in range(rounds):
        shares = F.softmax(likely + shares.log(), dim=0).mean(1, keepdim=True)
    return [round(share, 6) for share in shares.squeeze(1).tolist()]
