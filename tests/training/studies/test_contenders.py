"""What stands in for SparseLearn: straight-through top-K, other selectors, the training path; and attention MIL."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import load_state
from train.config import TrainConfig
from train.data.bank import load_bank
from train.data.example import Example, Question
from train.data.kinds import NEEDLE_KINDS
from train.sparselearn import SparseLearn
from train.studies.contenders import StraightThrough, keep_by, load_contender
from train.studies.mil import load_mil, save_mil, train_mil


def test_straight_through_keeps_or_drops_and_still_teaches_the_scorer() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(30, 16, generator=generator), torch.randn(30, generator=generator, requires_grad=True)
    module = StraightThrough(16, 5, heads=4, gate="ste", denoiser="none")
    out = module(x, scores, 0.5)
    kept = out.abs().sum(-1) > 0
    assert torch.equal(kept.nonzero()[:, 0], scores.topk(5).indices.sort().values)
    torch.testing.assert_close(out[kept], x[kept])
    out.square().sum().backward()
    assert scores.grad is not None
    assert (scores.grad.abs() > 0).sum() > 5
    with pytest.raises(ValueError, match="ste, gumbel"):
        StraightThrough(16, 5, gate="vp")


def test_gumbel_draws_and_repeats_with_its_generator() -> None:
    x, scores = torch.ones(30, 16), torch.zeros(30)
    module = StraightThrough(16, 5, heads=4, gate="gumbel", denoiser="local")
    one, again, other = (
        module(x, scores, 1.0, k=7.9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert int((one.abs().sum(-1) > 0).sum()) == 7


def test_a_selector_keeps_patches_with_their_places(finished: Path) -> None:
    model = SparseWSI.from_pretrained(finished / "seed-0" / "learned" / "start")
    features = torch.arange(17.0)[:, None].expand(17, 24)
    example = Example(features, torch.arange(17) * 3, 60, (Question("?", "!"),), tuple("abcdefghijklmnopq"))
    kept = keep_by("norm", model, example)
    assert kept.indices.tolist() == [33, 36, 39, 42, 45, 48]
    assert kept.rows is not None
    assert "".join(kept.kinds[row] for row in kept.rows) == "lmnopq"
    assert len(keep_by("uniform", model, example).indices) == 6


def test_attention_mil_learns_where_the_needles_are(bank_file: Path, tmp_path: Path) -> None:
    bank = load_bank(bank_file, "train")
    bank = replace(bank, sources=np.full(len(bank.kinds), "phantom"))  # patches of all sources in every bag
    mil, loss = train_mil([bank], 0, steps=60, accumulation=8, n=60, lr=2e-3)
    assert loss < 0.25
    test = load_bank(bank_file, "test")
    needles = np.isin(test.kinds, NEEDLE_KINDS)
    rows = np.concatenate([np.flatnonzero(~needles), np.flatnonzero(needles)[::12]])  # 48 background, 5 needles
    kept = mil.select(test.features[rows], torch.zeros(len(rows), 2), 10)
    assert needles[rows][kept.numpy()].sum() >= 4
    save_mil(mil, tmp_path / "mil.safetensors")
    assert torch.equal(
        load_mil(tmp_path / "mil.safetensors").select(test.features, torch.zeros(1, 2), 7),
        mil.select(test.features, torch.zeros(1, 2), 7),
    )


def test_the_soft_path_is_that_of_training(finished: Path) -> None:
    checkpoint = (finished / "seed-0" / "learned" / "checkpoints" / "last").resolve()
    config = TrainConfig(**json.loads((finished / "seed-0" / "learned" / "train_config.json").read_text()))
    model = load_contender(checkpoint)
    features = torch.randn(30, 24, generator=torch.Generator().manual_seed(0)).half()
    bag = Bag(features, torch.zeros(30, 2).int(), 224, 0.5, "made-up", "slide")
    soft, hard, denoised = (model.select(bag, selector=name, seed=4) for name in ("soft", "learned", "denoised"))
    assert soft.tokens.shape == (30, 16)
    assert torch.equal(denoised.indices, hard.indices)
    x = model.encode(features)
    sparselearn = SparseLearn(16, 6, kernel=config.kernel, gate=config.gate, denoiser=config.denoiser)
    load_state(checkpoint, sparselearn)
    expected = sparselearn(x, model.scorer(x), config.tau_end, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(soft.tokens, expected)
    assert sparselearn.denoiser is not None
    torch.testing.assert_close(denoised.tokens, sparselearn.denoiser(hard.tokens))
    assert torch.equal(soft.tokens, model.select(bag, selector="soft", seed=4).tokens)
