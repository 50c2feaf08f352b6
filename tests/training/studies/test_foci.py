"""Finding foci: slides that are harder in the way they say, and a score that is 100 % where all is kept."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.bank import Bank, list_other_kinds
from train.data.kinds import BACKGROUNDS, NEEDLES, plan_facts
from train.data.layout import add_other_tissue, lay_out
from train.studies import foci

NEW = ("squamous_epithelium", "brunner_glands")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SparseWSI:
    return SparseWSI.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def bank(model: SparseWSI) -> Bank:
    """Kinds far apart, 30 patches of two sources each."""
    kinds = np.repeat([*BACKGROUNDS["real"], *NEEDLES["real"], *NEW], 30)
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (len(order), model.config.feature_dim))
    features = np.stack([centres[order[kind]] for kind in kinds]) + rng.normal(0, 0.1, (len(kinds), centres.shape[1]))
    sources = np.array([f"slide-{i % 2}" for i in range(len(kinds))])
    return Bank(torch.tensor(features).half(), kinds, sources, "real", model.config.encoder)


def test_no_patch_recurs_before_all_of_its_kind_were_taken(bank):
    kinds = np.array(["adipose"] * 45 + ["mucin"] * 7)
    rows = foci.draw_once(bank, kinds, np.random.default_rng(0))
    assert (bank.kinds[rows] == kinds).all()
    assert np.bincount(rows[:45]).max() == 2
    assert len(set(rows[:45])) == 30
    assert len(set(rows[45:])) == 7


def test_new_background_leaves_the_foci_alone(bank):
    rng = np.random.default_rng(0)
    kinds = lay_out(plan_facts("real", "present", rng), 900, (4, 12), rng)
    changed = add_other_tissue("real", kinds, list_other_kinds(bank), foci.REGION, rng)
    focus = np.isin(kinds, NEEDLES["real"])
    assert (changed[focus] == kinds[focus]).all()
    assert set(NEW) <= set(changed[~focus])
    assert list_other_kinds(bank) == sorted(NEW)


@pytest.mark.parametrize("slides", foci.SLIDES)
def test_who_keeps_all_finds_all(model, bank, slides):
    found, different = foci.measure(model, bank, slides, 0, 100, [2, 100], ["learned", "farthest", "random"], 0)
    assert all(found[f"{selector}@100"] == (1, 1) for selector in ("learned", "farthest", "random"))
    assert all(0 <= share <= 1 for pair in found.values() for share in pair)
    assert 30 < different <= 100
    assert found == foci.measure(model, bank, slides, 0, 100, [2, 100], ["learned", "farthest", "random"], 0)[0]
