"""A bag of five patches, how two bags are compared, and pictures to encode."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from sparsewsi.bags.bag import Bag


@pytest.fixture
def bag() -> Bag:
    """5 patches of 443 level-0 px (0.2528 um/px), read at 0.5."""
    torch.manual_seed(0)
    coords = torch.tensor([[0, 0], [443, 0], [0, 443], [886, 443], [443, 1329]], dtype=torch.int32)
    return Bag(
        torch.randn(5, 8).half(),
        coords,
        443,
        0.5,
        "conch",
        "slide 0a1b2c3d",
        slide_mpp=0.2528,
        mpp_source="openslide",
        slide_size=(2000, 3000),
        note="",
    )


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Bag, Bag], None]:
    """Fails where two bags differ in anything."""

    def compare(a: Bag, b: Bag) -> None:
        for field in fields(Bag):
            ours, theirs = getattr(a, field.name), getattr(b, field.name)
            if isinstance(ours, torch.Tensor):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs), field.name
            else:
                assert ours == theirs, field.name

    return compare


@pytest.fixture(scope="session")
def patches() -> np.ndarray:
    """20 smooth random pictures, uint8 (20, 224, 224, 3)."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 14, 14, 3), dtype=np.uint8)
    return np.stack(
        [np.array(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)) for picture in small]
    )
