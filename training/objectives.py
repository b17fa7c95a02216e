"""What a student is asked to minimise: pure functions of logits, each with its paper and equation.

Shapes: B batch, K classes; `z_s`, `z_t` are logits `[B, K]` of student and teacher, `labels` class indices `[B]`.
"""

import torch.nn.functional as F
from torch import Tensor


def soft_targets(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T² · (1/B) Σ_i KL(softmax(z_t,i / T) ‖ softmax(z_s,i / T)), in nats.

    Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2: the factor T² keeps the gradient's size when
    T changes. The mean is over the batch alone (`batchmean`), never over classes.
    """
    log_s = F.log_softmax(z_s / temperature, dim=1)
    log_t = F.log_softmax(z_t / temperature, dim=1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


def distillation(z_s: Tensor, z_t: Tensor, labels: Tensor, temperature: float, alpha: float) -> dict[str, Tensor]:
    """The terms, unweighted, and their sum: `loss = (1 − α)·hard + α·soft`, hard being the cross-entropy."""
    hard, soft = F.cross_entropy(z_s, labels), soft_targets(z_s, z_t, temperature)
    return {"loss": (1 - alpha) * hard + alpha * soft, "hard": hard, "soft": soft}


def classification(z_s: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy with the labels alone: the objective of a teacher and of a baseline."""
    hard = F.cross_entropy(z_s, labels)
    return {"loss": hard, "hard": hard}
