"""Actions as words: OpenVLA's bins (Kim et al. 2024), and how a number in [0, 1] picks one of them.

The last ``bins`` words of the vocabulary, the padding aside, stand for ``bins`` edges evenly spaced in [-1, 1], the last word for the
lowest. An action is the centre between two edges, so the two words at the top mean the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActionBins:
    """Bin k of 0 to ``bins`` - 1 is word ``words`` - 1 - k.

    Attributes:
        words: of the vocabulary, without what pads its matrix.
        bins: of every action dimension.
    """

    words: int
    bins: int = 256

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= self.words:
            raise ValueError(f"n_action_bins={self.bins} with {self.words} words: accepted are 2 to the number of words")

    def word(self, index: Tensor) -> Tensor:
        """Word ids of bins, of any shape."""
        return self.words - 1 - index

    def value(self, index: Tensor) -> Tensor:
        """(...) bins to actions in (-1, 1)."""
        edges = torch.linspace(-1.0, 1.0, self.bins, device=index.device)
        centres = (edges[:-1] + edges[1:]) / 2
        return centres[index.clamp(max=self.bins - 2)]

    def of_words(self, logits: Tensor) -> Tensor:
        """(..., vocabulary) to (..., bins): the logits of the bins, the lowest first."""
        return logits[..., self.words - self.bins : self.words].flip(-1)


def quantile(log_prob: Tensor, normal: Tensor) -> Tensor:
    """(...) the bin at which the distribution (..., bins) passes Phi(normal); normal draws N(0, I) draw from it, 0 takes the median."""
    share = 0.5 * (1.0 + torch.erf(normal / math.sqrt(2.0)))
    passed = log_prob.exp().cumsum(-1) < share.unsqueeze(-1)
    return passed.sum(-1).clamp(max=log_prob.shape[-1] - 1)
