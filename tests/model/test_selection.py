"""A patch has one number, whatever else is selected with it."""

import pytest
import torch

from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import hard_topk

SCORES = torch.tensor([0.1, 2.0, -1.0, 2.0, 0.5])


def select(*indices: int) -> Selection:
    return Selection(torch.tensor(indices), SCORES, torch.zeros(len(indices), 4), 5)


def test_the_learned_selection_has_ranks_one_to_k_and_ties_go_to_the_lower_index():
    learned = select(*hard_topk(SCORES, 3).tolist())
    assert learned.indices.tolist() == [1, 3, 4]
    assert learned.ranks.tolist() == [1, 2, 3]
    assert learned.indices[learned.best_first].tolist() == [1, 3, 4]


def test_a_patch_keeps_its_rank_in_every_selection():
    other = select(0, 2, 4)
    assert other.ranks.tolist() == [4, 5, 3]
    assert other.indices[other.best_first].tolist() == [4, 0, 2]
    assert select(4).ranks.tolist() == [3]


def test_patches_are_left_out_by_their_rank():
    fewer = select(0, 2, 4).without([5])
    assert fewer.indices.tolist() == [0, 4]
    assert fewer.ranks.tolist() == [4, 3]
    assert len(fewer.tokens) == 2
    with pytest.raises(ValueError, match="at least one"):
        fewer.without([3, 4])
    with pytest.raises(ValueError, match="#1 is not among the patches that are kept"):
        fewer.without([1, 4])
