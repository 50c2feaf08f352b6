"""How far kept patches lie from their neighbours, beside random choices."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.sparse_wsi import SparseWSI
from train.studies import margin


def test_patches_at_the_margin_are_told_from_others() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(400, 6, generator=generator), 4 * torch.randn(20, 6, generator=generator)])
    outside = margin.measure_margin(points, torch.arange(400, 420))
    assert outside.ratio > 1.5
    assert outside.ratio > outside.high
    assert outside.p < 0.002
    inside = margin.measure_margin(points, torch.arange(0, 400, 20))
    assert inside.p > 0.01
    assert (inside.kept, inside.discarded) == (20, 400)
    assert margin.measure_margin(points, torch.arange(400, 420)) == outside
    with pytest.raises(ValueError, match="0 of 420"):
        margin.measure_margin(points, torch.arange(0))


def test_p_is_uniform_where_nothing_is_special() -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(150, 3, generator=generator)
    found = [
        margin.measure_margin(points, torch.randperm(150, generator=generator)[:12], draws=200, seed=i).p
        for i in range(40)
    ]
    assert 0.3 < np.mean(found) < 0.7


def test_neighbour_distance_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(margin, "PART", 7)
    points = torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    points[3] = points[11]  # a twin is a neighbour at distance 0
    plain = (points[:, None] - points).norm(dim=-1).fill_diagonal_(torch.inf).sort(-1).values[:, :5].mean(-1)
    torch.testing.assert_close(margin.neighbour_distance(points, 5), plain, rtol=1e-3, atol=1e-3)
    assert len(margin.neighbour_distance(points[:2], 5)) == 2


def test_the_margin_command_writes_a_table(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).half()  # few enough for no UMAP
    model = SparseWSI.from_pretrained(finished / "seed-0" / "learned" / "start")
    model.config = SparseWSIConfig(**{**asdict(model.config), "num_tokens": 2})
    model.save_pretrained(tmp_path / "model")
    save_bag(Bag(features, torch.zeros(4, 2).int(), 224, 0.5, "made-up", "slide"), tmp_path / "slide.safetensors")
    argv = ["margin", "--model", str(tmp_path / "model"), "--bags", str(tmp_path / "slide.safetensors")]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "out")])
    margin.main()
    record = json.loads((tmp_path / "out" / "margin.json").read_text())
    assert set(record["slide"]) == {"learned", "random", "farthest"}
    assert record["slide"]["learned"]["PCA"]["kept"] == 2
    assert "| slide | farthest | features | 2 / 2 |" in (tmp_path / "out" / "margin.md").read_text()
