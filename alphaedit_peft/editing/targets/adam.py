"""Adam on one vector for each group of edits, with the paper's bound on its norm.

In: hidden states h and gradients. Out: delta = z - h, (groups, d), after each update; groups may
leave. Equation: Kingma and Ba 2015, Algorithm 1, then |delta| is clamped to a multiple of |h|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alphaedit_peft.config import AlphaEditConfig

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Adam:
    """The deltas and what Adam remembers of their gradients."""

    def __init__(self, hidden: Tensor, config: AlphaEditConfig) -> None:
        assert config.learning_rate is not None, "resolve the config first"
        assert config.clamp_factor is not None, "resolve the config first"
        self.delta = torch.zeros_like(hidden)  # (groups, d)
        self.mean, self.square = torch.zeros_like(hidden), torch.zeros_like(hidden)
        self.bound = config.clamp_factor * hidden.norm(dim=1, keepdim=True)
        scale = hidden.norm(dim=1, keepdim=True) / hidden.shape[1] ** 0.5  # (groups, 1)
        relative = config.learning_rate_mode == "relative"
        self.rate = config.learning_rate * (scale if relative else torch.ones_like(scale))
        self.count = 0

    def update(self, active: Sequence[int], gradient: Tensor) -> None:
        """One step for the active groups; all of them have made equally many."""
        self.count += 1
        (b1, b2), which = BETAS, list(active)
        self.mean[which] = b1 * self.mean[which] + (1 - b1) * gradient
        self.square[which] = b2 * self.square[which] + (1 - b2) * gradient.square()
        mean = self.mean[which] / (1 - b1**self.count)
        root = (self.square[which] / (1 - b2**self.count)).sqrt()
        moved = self.delta[which] - self.rate[which] * mean / (root + EPSILON)
        norm = moved.norm(dim=1, keepdim=True)
        bound = self.bound[which]
        self.delta[which] = torch.where(norm > bound, moved * bound / norm, moved)
