"""What a student is asked to imitate: pure functions, each with its paper and equation.

Shapes: B batch, K classes; `z_s`, `z_t` are logits `[B, K]` of student and teacher, `labels` class indices `[B]`;
`f_s`, `f_t` are features `[B, …]` of a layer of each. Every function returns a scalar, is computed in float32
at least, whatever it is given, and is a mean over the batch: the same when the batch is given twice over.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from handler.errors import SettingsError, unknown


def standardize(z: Tensor) -> Tensor:
    """(z − mean(z)) / std(z) over the classes of each sample: a transform of logits, for any objective that reads them.

    Sun et al. 2024, arXiv:2403.01427, eq. 11 and algorithm 1; where all logits are equal the result is 0.
    """
    z = _wide(z)
    centred = z - z.mean(1, keepdim=True)
    # 1e-8 bounds the gradient where all logits are equal, as after a last layer that begins at zero.
    return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-8)


def kd(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """Soft targets: T² · (1/B) Σ_i KL(softmax(z_t,i / T) ‖ softmax(z_s,i / T)), in nats.

    Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2: the factor T² keeps the gradient's size when
    T changes. The mean is over the batch alone, never over classes.
    """
    log_s = F.log_softmax(_wide(z_s) / temperature, dim=1)
    log_t = F.log_softmax(_wide(z_t) / temperature, dim=1)
    return _kl(log_t, log_s) * temperature**2


def dkd(
    z_s: Tensor, z_t: Tensor, labels: Tensor, temperature: float, target: float = 1.0, others: float = 8.0
) -> Tensor:
    """Decoupled KD: T² · (target · KL(b_t ‖ b_s) + others · KL(p̂_t ‖ p̂_s)), means over the batch.

    b = (p_y, 1 − p_y) splits the label from the rest; p̂ is the softmax over the classes that are not the label's.
    Zhao et al. 2022, arXiv:2203.08679, eq. 7. Raises SettingsError below 3 classes, where p̂ says nothing.
    """
    if z_s.shape[1] < 3:
        raise SettingsError(f"dkd: expected at least 3 classes, got {z_s.shape[1]}; with two, use kd")
    y = F.one_hot(labels, z_s.shape[1]).bool()
    split_s, split_t = (_split(_wide(z) / temperature, y) for z in (z_s, z_t))
    rest_s, rest_t = (F.log_softmax((_wide(z) / temperature)[~y].view(len(z), -1), dim=1) for z in (z_s, z_t))
    return (target * _kl(split_t, split_s) + others * _kl(rest_t, rest_s)) * temperature**2


def dist(z_s: Tensor, z_t: Tensor, temperature: float, inter: float = 1.0, intra: float = 1.0) -> Tensor:
    """T² · (inter · (1/B) Σ_i (1 − ρ(p_s,i·, p_t,i·)) + intra · (1/K) Σ_j (1 − ρ(p_s,·j, p_t,·j))).

    ρ is Pearson's correlation, over the classes of a sample and over the samples of a class.
    Huang et al. 2022, arXiv:2205.10536, eq. 7 to 10.
    """
    p_s, p_t = (F.softmax(_wide(z) / temperature, dim=1) for z in (z_s, z_t))
    samples, classes = 1 - _correlation(p_s, p_t), 1 - _correlation(p_s.T, p_t.T)
    return (inter * samples.mean() + intra * classes.mean()) * temperature**2


def logit_regression(z_s: Tensor, z_t: Tensor, center: float = 1.0) -> Tensor:
    """(1/2B) Σ_i ‖z̄_s,i − z̄_t,i‖², z̄ being logits less their mean, which softmax does not see.

    Ba and Caruana 2014, arXiv:1312.6184, eq. 1; 1/K of it is the limit of `kd` as T grows. `center` 0 compares
    the values themselves: function distillation of a regression head, as one output (K = 1) always is.
    """
    difference = _wide(z_s) - _wide(z_t)
    if center and z_s.shape[1] > 1:
        difference = difference - difference.mean(1, keepdim=True)
    return difference.square().sum(1).mean() / 2


def hint(f_s: Tensor, f_t: Tensor) -> Tensor:
    """‖r(f_s) − f_t‖² / numel; the adapter r has been applied to `f_s` (training/adapters.py).

    Romero et al. 2015, arXiv:1412.6550, eq. 3.
    """
    return F.mse_loss(_wide(f_s), _wide(f_t))


def attention(f_s: Tensor, f_t: Tensor) -> Tensor:
    """(1/B) Σ_i ‖Q_s,i / ‖Q_s,i‖ − Q_t,i / ‖Q_t,i‖‖², Q being Σ_c f_c² over channels, `[B, C, H, W]` → `[B, H·W]`.

    Zagoruyko and Komodakis 2017, arXiv:1612.03928, eq. 2 with p = 2, squared. The larger grid is pooled.
    Raises SettingsError for features that are no maps: of a vector there would be nothing left to compare.
    """
    if not f_s.ndim == f_t.ndim == 4:
        shapes = f"{tuple(f_s.shape[1:])} and {tuple(f_t.shape[1:])}"
        raise SettingsError(f"attention: expected layers that give maps (channels, height, width), got shapes {shapes}")
    q_s, q_t = (_wide(f).square().sum(1, keepdim=True) for f in (f_s, f_t))
    q_s, q_t = (F.normalize(q.flatten(1)) for q in aligned(q_s, q_t))
    return (q_s - q_t).square().sum(1).mean()


def aligned(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps `[B, C, H, W]` on one grid: the larger is pooled to the smaller. Other features as they are."""
    if f_s.ndim != 4 or f_s.shape[2:] == f_t.shape[2:]:
        return f_s, f_t
    grid = min(f_s.shape[2], f_t.shape[2]), min(f_s.shape[3], f_t.shape[3])
    return F.adaptive_avg_pool2d(f_s, grid), F.adaptive_avg_pool2d(f_t, grid)


def similarity(f_s: Tensor, f_t: Tensor) -> Tensor:
    """(1/B) ‖G_s − G_t‖_F², G being A·Aᵀ with rows of length 1, A the features `[B, …]` as rows.

    Tung and Mori 2019, arXiv:1907.09682, eq. 4 times B: their 1/B² would tie the weight to the batch size.
    """
    g_s, g_t = (F.normalize(a @ a.T) for a in (_wide(f).flatten(1) for f in (f_s, f_t)))
    return (g_s - g_t).square().sum(1).mean()


def relational(f_s: Tensor, f_t: Tensor) -> Tensor:
    """(1/B²) Σ_ij huber(ψ_s,ij − ψ_t,ij), ψ being the distances between samples divided by their mean.

    Park et al. 2019, arXiv:1904.05068, eq. 5 to 8 (RKD-D), over all B² pairs.
    """
    d_s, d_t = (_distances(_wide(f).flatten(1)) for f in (f_s, f_t))
    return F.smooth_l1_loss(d_s, d_t)


@dataclass(frozen=True)
class Objective:
    """An objective by name: whether it compares features of layers (else logits), and what else it is given."""

    function: Callable[..., Tensor]
    reads_features: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of its parameters after the first two."""
        return tuple(signature(self.function).parameters)[2:]


OBJECTIVES = {
    **{f.__name__: Objective(f) for f in (kd, dkd, dist, logit_regression)},
    **{f.__name__: Objective(f, reads_features=True) for f in (hint, attention, similarity, relational)},
}


def find(name: str) -> Objective:
    """The objective of that name; SettingsError names the nearest when there is none."""
    if name not in OBJECTIVES:
        raise SettingsError(unknown("objective", name, OBJECTIVES))
    return OBJECTIVES[name]


def _wide(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, in which small probabilities and squares have room."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    """KL(t ‖ s) of log-probabilities `[B, K]`, mean over the batch."""
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def _split(z: Tensor, y: Tensor) -> Tensor:
    """log (p_y, 1 − p_y) `[B, 2]`, without ever forming 1 − p_y."""
    log_p = F.log_softmax(z, dim=1)
    rest = log_p[~y].view(len(z), -1).logsumexp(1)
    return torch.stack([log_p[y], rest], dim=1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's ρ of each row of `a` with that of `b`: `[N, M]` → `[N]`; two constant rows count as equal."""
    a, b = _unit(a), _unit(b)
    constant = (a == 0).all(1) & (b == 0).all(1)
    return torch.where(constant, 1.0, (a * b).sum(1))


def _unit(x: Tensor) -> Tensor:
    """Rows of probabilities less their mean and of length 1; 0, without a gradient, where they are constant.

    Rows are scaled by their largest value first, since squares of tiny probabilities vanish. Constant is also what
    differs by rounding alone or below 1e-30, where the gradient would be noise, or too large for float32.
    """
    centred = x - x.mean(1, keepdim=True)
    size, largest = (y.detach().abs().amax(1, keepdim=True) for y in (centred, x))
    varies = size > (1e-6 * largest).clamp(min=1e-30)
    return F.normalize(torch.where(varies, centred / torch.where(varies, size, 1.0), 0.0))


def _distances(x: Tensor) -> Tensor:
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d / d.mean().clamp(min=torch.finfo(d.dtype).tiny)
