"""Before stage 1 (ours, not in the paper): teach slide encoder and projector the LLM's own words for the tissues.

A visual token that lies where the LLM keeps the word for its tissue is read much sooner than one that starts anywhere:
what is left to learn is to look among the visual tokens. Costs seconds, as the LLM itself is not run.

D feature dim, H the LLM's width, C kinds of tissue.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsewsi.model.prompt import text_ids
from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.bank import Bank
from train.data.kinds import WORDS

PER_BANK = 128  # patches of each bank in a step
NOISE = 0.3  # added to the unit-variance tokens between encoder and projector, so that these are not learned by heart
DROPOUT = 0.5  # of the features


def align(model: SparseWSI, banks: Sequence[Bank], steps: int, seed: int = 0, lr: float = 1e-3) -> float:
    """Turn every patch's visual token towards the mean of its tissue's word pieces; returns the last cosine distance.

    Kinds, and within a kind the slides a patch may come from, are drawn with equal chances.
    """
    words = list_words(model)  # kind -> (H,)
    everything = torch.cat([bank.features for bank in banks]).to(model.device, torch.float32)
    mean, spread = everything.mean(0), everything.std(0) + 1e-3  # (D,)
    _standardise(model.slide_encoder.inlet, mean, spread)
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    parameters = [*model.slide_encoder.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    distance = torch.zeros(())
    for _ in range(steps):
        drawn = [_draw(bank, generator) for bank in banks]
        features = torch.cat([bank.features[rows] for bank, (rows, _) in zip(banks, drawn)])
        features = features.to(model.device, torch.float32)
        target = torch.stack([words[kind] for _, kinds in drawn for kind in kinds])
        x = model.slide_encoder(mean + F.dropout(features - mean, DROPOUT))
        y = model.projector(x + NOISE * torch.randn_like(x))
        distance = 1 - F.cosine_similarity(y, target).mean()
        optimizer.zero_grad()
        distance.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return distance.item()


@torch.no_grad()
def _standardise(inlet: nn.Linear, mean: Tensor, spread: Tensor) -> None:
    """Change the first layer so that it does to raw features what it did to standardised ones."""
    inlet.weight.div_(spread)
    inlet.bias.sub_(inlet.weight @ mean)


@torch.no_grad()
def list_words(model: SparseWSI) -> dict[str, Tensor]:
    """Of each kind the mean input vector (H,) of the pieces of its word."""
    embed = model.llm.get_input_embeddings()
    pieces = {kind: text_ids(model.tokenizer, f" {word}") for kind, word in WORDS.items()}
    return {kind: embed(torch.tensor(ids, device=model.device)).float().mean(0) for kind, ids in pieces.items()}


def _draw(bank: Bank, generator: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Rows and kinds of PER_BANK patches."""
    kinds = [str(kind) for kind in generator.choice(sorted(set(bank.kinds) & set(WORDS)), PER_BANK)]
    rows = []
    for kind in kinds:
        pool = bank.rows(kind)
        source = generator.choice(np.unique(bank.sources[pool]))
        rows.append(generator.choice(pool[bank.sources[pool] == source]))
    return np.array(rows), kinds
