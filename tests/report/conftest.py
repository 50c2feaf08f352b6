"""A bag of five patches and three of them selected."""

import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import hard_topk


@pytest.fixture
def bag() -> Bag:
    coords = torch.tensor([[0, 0], [100, 0], [0, 100], [100, 100], [200, 100]])
    return Bag(
        torch.zeros(5, 8), coords, 100, 0.5, "efficientnet-lite0", "slide 0a1b2c3d", 0.25, "openslide", (400, 300)
    )


@pytest.fixture
def selection() -> Selection:
    scores = torch.tensor([0.1, 2.0, -1.0, 2.0, 0.5])
    return Selection(hard_topk(scores, 3), scores, torch.zeros(3, 4), 5)
