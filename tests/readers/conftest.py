"""Pictures to show a reader."""

import numpy as np
import pytest

from sparsewsi.readers.pictures import Pictures


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    """Three patches of noise, the best of them last, and an overview."""
    drawn = np.random.default_rng(0).integers(0, 255, (3, 56, 56, 3), np.uint8)
    overview = np.full((20, 30, 3), 200, np.uint8)
    return Pictures(tuple(drawn), (9, 5, 1), 0.5, overview)
