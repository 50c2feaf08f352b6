"""Estimates with their 95 % intervals."""

import numpy as np
import pytest

from train.eval.statistics import estimate_from_seeds, estimate_grouped_share, estimate_mean, estimate_share, sign_test


def test_wilson_interval_is_the_known_one() -> None:
    value, low, high = estimate_share(48, 79)  # the starred WSI-VQA set: 60.76 %, interval 50 to 71
    assert value == pytest.approx(0.6076, abs=1e-4)
    assert (low, high) == (pytest.approx(0.497, abs=2e-3), pytest.approx(0.708, abs=2e-3))
    assert estimate_share(0, 10).low == pytest.approx(0, abs=1e-12)
    assert estimate_share(10, 10).high == pytest.approx(1)
    assert estimate_share(0, 0) == (0.0, 0.0, 1.0)


def test_slides_that_are_asked_often_count_once() -> None:
    value, low, high = estimate_grouped_share([10, 0, 10, 10], [10, 10, 10, 10])
    assert value == 0.75
    assert low <= 0.25 < 0.95 < high
    assert estimate_grouped_share([5, 5], [5, 5]) == (1.0, 1.0, 1.0)


def test_the_interval_is_of_the_questions_of_one_seed_and_of_the_means_of_several() -> None:
    generator = np.random.default_rng(1)
    values = (generator.random((1, 1000)) < 0.7).astype(float)
    mean, low, high = estimate_mean(values)
    assert mean == values.mean()
    assert (mean - low, high - mean) == (pytest.approx(0.0284, rel=0.1), pytest.approx(0.0284, rel=0.1))  # 1.96 sigma
    _, low, high = estimate_mean(np.repeat(values, 3, 0))  # three times the questions, none of them asked twice
    assert (mean - low, high - mean) == (pytest.approx(0.0164, rel=0.1), pytest.approx(0.0164, rel=0.1))
    apart = np.stack([np.zeros(1000), np.ones(1000), np.ones(1000)])
    assert estimate_mean(apart)[1:] == (pytest.approx(0), pytest.approx(1))
    assert estimate_mean(np.ones((1, 7))) == (1.0, 1.0, 1.0)


def test_the_interval_of_three_seeds_covers_the_truth() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        found = estimate_from_seeds(0.5 + 0.13 * generator.standard_normal(3))  # seeds differ as short trainings do
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    assert 0.92 < covered / 400 < 0.98  # a bootstrap over seeds: 0.78
    assert estimate_from_seeds([0.5]) is None


def test_the_sign_test_is_exact() -> None:
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(3, 3) == pytest.approx(1)
    assert sign_test(0, 0) == 1
