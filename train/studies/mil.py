"""Attention MIL: what a learned top-K is compared with that does not need a language model to be trained.

N patches, D feature dim, C needle kinds, W width inside.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsewsi.files import replacing
from sparsewsi.model.selector import ROWS, hard_topk
from train.config import RECIPES
from train.data.bank import Bank, load_bank
from train.data.kinds import NEEDLE_KINDS
from train.data.stream import MosaicStream

MIL = "attention-mil"


class AttentionMIL(nn.Module):
    """Gated attention over patches that says which needle kinds a slide holds (Ilse et al., ICML 2018)."""

    def __init__(self, feature_dim: int, width: int = 256):
        super().__init__()
        self.inlet = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, width), nn.GELU())
        self.content, self.gate = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.attention = nn.Linear(width // 2, 1)
        self.head = nn.Linear(width, len(NEEDLE_KINDS))

    def score(self, features: Tensor) -> Tensor:
        """(N, D) -> (N,) attention before the softmax."""
        return self._attend(self.inlet(features.float()))

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (C,) logits, one a kind of NEEDLE_KINDS."""
        x = self.inlet(features.float())  # (N, W)
        return self.head(self._attend(x).softmax(0) @ x)

    def _attend(self, x: Tensor) -> Tensor:
        return self.attention(self.content(x).tanh() * self.gate(x).sigmoid()).squeeze(-1)

    @torch.inference_mode()
    def select(self, features: Tensor, coords: Tensor, k: int, seed: int = 0) -> Tensor:
        """The k patches with the highest attention, as a selector. The seed changes nothing."""
        return hard_topk(torch.cat([self.score(part) for part in features.split(ROWS)]), k)


def train_mil(
    banks: Sequence[Bank], seed: int, steps: int, accumulation: int, n: int, lr: float = 5e-4
) -> tuple[AttentionMIL, float]:
    """Train on as many bags as stage 2, of n patches each, and return the model with its mean loss over the last tenth.

    The truth it learns from is which needle kinds a bag holds, more than any answer tells.
    """
    torch.manual_seed(seed)
    stream = MosaicStream(tuple(banks), seed, 2)
    mil = AttentionMIL(banks[0].features.shape[1])
    optimizer = torch.optim.AdamW(mil.parameters(), lr=lr, weight_decay=1e-2)
    losses = []
    for step in range(steps):
        loss = torch.zeros(())
        for number in range(accumulation):
            example = stream.example(step * accumulation + number, n)
            present = torch.tensor([float(kind in example.kinds) for kind in NEEDLE_KINDS])
            loss = loss + F.binary_cross_entropy_with_logits(mil(example.features), present) / accumulation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return mil.eval(), float(np.mean(losses[-max(1, steps // 10) :]))


def save_mil(mil: AttentionMIL, path: Path) -> None:
    """Write its weights."""
    with replacing(path) as partial:
        save_file(mil.state_dict(), partial)


def load_mil(path: Path) -> AttentionMIL:
    """Read what save_mil wrote."""
    state = load_file(path)
    mil = AttentionMIL(state["inlet.0.weight"].shape[0])
    mil.load_state_dict(state)
    return mil.eval()


def load_or_train_mil(banks: Sequence[Path], path: Path) -> AttentionMIL:
    """The one in path; if there is none it is trained on the train split of banks as long as the demo's stage 2."""
    if not path.is_file():
        config = RECIPES["demo-stage2"]()
        loaded = [load_bank(bank, "train") for bank in banks]
        save_mil(train_mil(loaded, config.seed, config.steps, config.accumulation, config.patches)[0], path)
    return load_mil(path)
