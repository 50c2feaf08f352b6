"""How unlike a slide is to those of training, in numbers. What is said of it: tests/report/test_doubts.py."""

import numpy as np
import pytest
import torch

from sparsewsi.model import novelty

D = 40


def slide(seed: int, n: int = 60, shift: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    """Features of a made-up slide: ten directions vary more than others, and every slide is a little off the middle."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.where(torch.arange(D) < 10, 4.0, 1.0)
    middle = 0.3 * torch.randn(D, generator=generator)
    return 2 + (torch.randn(n, D, generator=generator) * spread + middle + shift) * sizes


@pytest.fixture(scope="module")
def summary() -> novelty.Summary:
    sources = np.repeat([f"slide {i}" for i in range(20)], 60)
    return novelty.summarise(torch.cat([slide(i) for i in range(20)]).half(), sources)


def test_the_distance_is_the_root_mean_square_of_standardised_features():
    features = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 1, 1, 1])
    found = novelty.summarise(features, np.arange(4000) % 20)
    exact = (((features - features.mean(0)) / torch.tensor([9.0, 5, 3, 1, 1, 1])).square().mean(1)).sqrt()
    torch.testing.assert_close(novelty.distances(found, features), exact, atol=0.1, rtol=0.05)


def test_a_summary_survives_its_file(summary, tmp_path):
    assert novelty.load(tmp_path) is None
    novelty.save(summary, tmp_path)
    again = novelty.load(tmp_path)
    assert again is not None
    assert (again.farthest, again.least_spread, again.sources) == (summary.farthest, summary.least_spread, 20)
    features = slide(55)
    torch.testing.assert_close(
        novelty.distances(again, features), novelty.distances(summary, features), atol=0, rtol=1e-2
    )
    assert (tmp_path / novelty.FILE).stat().st_size < 10_000


def test_the_spread_is_the_variance(summary):
    features = slide(55)
    whole = float(summary.deviations.square().sum()) + summary.rest**2 * (D - len(summary.deviations))
    assert novelty.spread(summary, features) == pytest.approx(float(features.var(0).sum()) / whole, rel=1e-5)


def test_too_few_slides_are_refused():
    with pytest.raises(ValueError, match="at least 4 slides"):
        novelty.summarise(torch.randn(9, 4), np.arange(9) % 3)
