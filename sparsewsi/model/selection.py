"""The patches that were kept of a slide. Nothing here loads a model.

N patches, K kept, D_v width of a visual token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """The patches kept of one slide. CPU tensors."""

    indices: Tensor  # (K,) int64, ascending = raster order
    scores: Tensor  # (N,) float32, the learned scores whatever the selector
    tokens: Tensor  # (K, D_v) float32
    num_patches: int  # N

    @cached_property
    def ranks(self) -> Tensor:
        """(K,) int64: the number of each kept patch, wherever one is shown or written.

        It is the rank of its score among all N patches, 1 = highest, ties to the lower index: 1..K for the learned
        selector. A patch keeps its number in every other selection from the same slide.
        """
        order = self.scores.double().sort(descending=True, stable=True).indices
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(1, len(order) + 1)
        return ranks[self.indices]

    @property
    def best_first(self) -> Tensor:
        """(K,) int64: places in `indices`, highest score first."""
        return self.ranks.argsort()

    def without(self, ranks: Sequence[int]) -> "Selection":
        """The selection less the patches of these ranks. Raises ValueError for others, and if none is left."""
        if unknown := sorted(set(ranks) - set(self.ranks.tolist())):
            raise ValueError(f"#{unknown[0]} is not among the patches that are kept.")
        keep = ~torch.isin(self.ranks, torch.tensor(list(ranks), dtype=torch.int64))
        if not keep.any():
            raise ValueError("no patch would be left to answer from. Keep at least one.")
        return replace(self, indices=self.indices[keep], tokens=self.tokens[keep])
