"""Adapters: what fits a student's features to the teacher's shape while training; none of it is in the student.

Features are maps `[B, C, H, W]`, tokens `[B, N, C]` or vectors `[B, C]`; the larger of two grids is pooled to
the smaller one.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from handler.errors import SettingsError
from training.config import TermSettings
from training.objectives import aligned


class Convolution(nn.Module):
    """A 1×1 convolution and BatchNorm on the student's features (Romero et al. 2015, arXiv:1412.6550, section 2.2)."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.project = nn.Linear(student, teacher, bias=False)
        self.norm = nn.BatchNorm1d(teacher)

    def forward(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        """Both `[N, C]`, one row a position → the same, of equal width."""
        return self.norm(self.project(f_s)), f_t


class Orthogonal(nn.Module):
    """A projection with orthonormal rows or columns, and the teacher's features layer-normalised.

    Miles, Elezi and Deng 2024, arXiv:2403.06213, sections 3.1 and 3.2: the projection keeps the student's
    geometry, so that the student itself has to learn.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        # Cayley's map: torch's default for oblong matrices turns to zeros under weight decay (and is slower).
        self.project = orthogonal(nn.Linear(student, teacher, bias=False), orthogonal_map="cayley")

    def forward(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        """Both `[N, C]`, one row a position → the same, of equal width."""
        return self.project(f_s), F.layer_norm(f_t, f_t.shape[-1:])


ADAPTERS = {"convolution": Convolution, "orthogonal": Orthogonal}


class Adapter(nn.Module):
    """The adapter of one pair of layers: aligns the grids, then fits the channels."""

    def __init__(self, kind: str, f_s: Tensor, f_t: Tensor) -> None:
        super().__init__()
        tokens_differ = f_s.ndim == 3 and f_s.shape[1] != f_t.shape[1]
        if f_s.ndim != f_t.ndim or f_s.ndim not in (2, 3, 4) or tokens_differ:
            shapes = f"{tuple(f_s.shape[1:])} and {tuple(f_t.shape[1:])}"
            raise SettingsError(f"hint: expected two maps, two vectors or two sequences as long, got shapes {shapes}")
        self.fit = ADAPTERS[kind](_rows(f_s).shape[1], _rows(f_t).shape[1])

    def forward(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        """Features of one kind `[B, …]` → `[B, N, C]` of one shape, N positions a sample (1 of a vector)."""
        batch, (f_s, f_t) = len(f_s), aligned(f_s, f_t)
        fitted_s, fitted_t = self.fit(_rows(f_s), _rows(f_t))
        return fitted_s.unflatten(0, (batch, -1)), fitted_t.unflatten(0, (batch, -1))


def adapters(terms: tuple[TermSettings, ...], student: dict[str, Tensor], teacher: dict[str, Tensor]) -> nn.ModuleDict:
    """One adapter for each pair of layers of a hint, by `pair_name`; the features are those of a probe batch.

    Raises SettingsError for a pair that two hints share, and for one that no adapter fits.
    """
    pairs = [pair for term in terms if term.objective == "hint" for pair in term.layers.items()]
    if twice := next((pair for pair in pairs if pairs.count(pair) > 1), None):
        raise SettingsError(f"hint: expected each pair of layers once, got {': '.join(twice)} twice")
    return nn.ModuleDict(
        {
            pair_name(path_s, path_t): Adapter(term.adapter, student[path_s], teacher[path_t])
            for term in terms
            if term.objective == "hint"
            for path_s, path_t in term.layers.items()
        }
    )


def pair_name(student: str, teacher: str) -> str:
    """The name of a pair of layers in a state dict, where dots would divide it."""
    return f"{student}|{teacher}".replace(".", "/")


def _rows(f: Tensor) -> Tensor:
    """`[B, C, H, W]` → `[B·H·W, C]`; tokens and vectors already have their channels last."""
    return (f.movedim(1, -1) if f.ndim == 4 else f).flatten(0, -2)
