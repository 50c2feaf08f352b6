"""What can stand in for SparseLearn and its selection: straight-through top-K, other selectors, the training path.

N patches, K kept.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import Bag
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import SELECTORS
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import load_state
from train.config import read_config
from train.data.example import Example
from train.sparselearn import GATES, SparseLearn, gumbel_topk, ste_topk, zscore

STRAIGHT_THROUGH = ("ste", "gumbel")
PATHS = ("learned", "denoised", "soft")


class StraightThrough(SparseLearn):
    """SparseLearn with a 0/1 mask forward and the soft top-K's gradient backward: dropped tokens are zero, no noise.

    gate: "ste" keeps the highest scores, "gumbel" draws with Gumbel noise. A noise gate is not to be had here: the
    slope of sqrt(alpha) is infinite at 0, where a hard mask lies.
    """

    def __init__(
        self, dim: int, k: int, heads: int = 8, kernel: str = "laplace", gate: str = "ste", denoiser: str = "local"
    ):
        super().__init__(dim, k, heads, kernel, "scale", denoiser)
        if gate not in STRAIGHT_THROUGH:
            raise ValueError(f"gate is {gate!r}; choose one of {', '.join(STRAIGHT_THROUGH)}.")
        self.estimator = gate

    def forward(
        self,
        x: Tensor,
        scores: Tensor,
        tau: float,
        mask: Tensor | None = None,
        k: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As SparseLearn.forward; of a budget that is not whole the whole part is kept."""
        z, budget = zscore(scores, mask), self.k if k is None else k
        if self.estimator == "gumbel":
            alpha = gumbel_topk(z, budget, tau, mask, generator, self.kernel)  # type: ignore[arg-type]
        else:
            alpha = ste_topk(z, budget, tau, mask, self.kernel)  # type: ignore[arg-type]
        x = (x * alpha.unsqueeze(-1)).to(x.dtype)
        if self.denoiser is not None:
            x = self.denoiser(x, mask)
        return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def choose_sparselearn(gate: str) -> type[SparseLearn]:
    """The module that a gate of TrainConfig asks for."""
    return StraightThrough if gate in STRAIGHT_THROUGH and gate not in GATES else SparseLearn


def keep_by(selector: str, model: SparseWSI, example: Example) -> Example:
    """The example with the patches that a selector keeps; its patches lie on a square raster, as mosaics do."""
    n = len(example.features)
    rows, columns = np.divmod(np.arange(n), math.isqrt(max(n - 1, 0)) + 1)
    coords = torch.from_numpy(np.stack([columns, rows], 1).astype(np.int32) * 224)
    # The seed is the slide's own, so that a slide is always seen alike and a resumed run sees what the first one saw.
    keep = SELECTORS[selector](example.features, coords, model.config.num_tokens, example.num_patches)
    return example.keep(keep)


class Contender(SparseWSI):
    """A SparseWSI whose select knows further selectors by name, so that any row can be asked."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.more: dict[str, Callable[[Bag, int | None, int], Selection]] = {}

    def select(
        self, bag: Bag, k: int | None = None, selector: str = "learned", seed: int = 0, question: str = ""
    ) -> Selection:
        if selector in self.more:
            return self.more[selector](bag, k, seed)
        return super().select(bag, k, selector, seed, question)

    def add_selector(self, name: str, keep: Callable[[Tensor, Tensor, int, int], Tensor]) -> None:
        """Add a function of features, coords, k and seed, as those in SELECTORS."""

        @torch.no_grad()
        def select(bag: Bag, k: int | None, seed: int) -> Selection:
            indices = keep(bag.features, bag.coords, k or self.config.num_tokens, seed)
            x = self.encode(bag.features)
            return Selection(indices, self.score(x).cpu(), x[indices.to(x.device)].cpu(), len(x))

        self.more[name] = select

    def add_training_path(self, sparselearn: SparseLearn, tau: float) -> None:
        """Add what training shows the LLM.

        "soft": all N tokens behind soft top-K, gate and denoiser at temperature tau, with noise drawn from the seed;
        "denoised": the hard top-K through the denoiser, which inference leaves out.
        """

        @torch.no_grad()
        def soft(bag: Bag, k: int | None, seed: int) -> Selection:
            x = self.encode(bag.features)
            scores = self.score(x)
            generator = torch.Generator(x.device).manual_seed(seed)
            tokens = sparselearn(x, scores, tau, k=k, generator=generator)
            return Selection(torch.arange(len(x)), scores.cpu(), tokens.cpu(), len(x))

        @torch.no_grad()
        def denoised(bag: Bag, k: int | None, seed: int) -> Selection:
            kept = self.select(bag, k)
            if sparselearn.denoiser is None:
                return kept
            return replace(kept, tokens=sparselearn.denoiser(kept.tokens.to(self.device)).cpu())

        self.more |= {"soft": soft, "denoised": denoised}


def load_contender(checkpoint: Path) -> Contender:
    """A checkpoint's model with its training path at the last temperature of the run that made it."""
    checkpoint = checkpoint.resolve()
    config = read_config(checkpoint.parent.parent / "train_config.json")
    model = Contender.from_pretrained(checkpoint / "model")
    assert isinstance(model, Contender)
    build = choose_sparselearn(config.gate)
    settings = model.config
    sparselearn = build(
        settings.dim, settings.num_tokens, kernel=config.kernel, gate=config.gate, denoiser=config.denoiser
    )
    load_state(checkpoint, sparselearn)
    model.add_training_path(sparselearn.to(model.device).eval(), config.tau_end)
    return model
