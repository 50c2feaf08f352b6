"""The map of features: finite, the same again, and every selected patch is on it."""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch

from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import hard_topk
from sparsewsi.report import umap


def made(n: int, k: int) -> tuple[torch.Tensor, Selection]:
    """Random features (n, 12), and the k best by a random score."""
    rng = torch.Generator().manual_seed(n)
    features, scores = torch.randn(n, 12, generator=rng), torch.randn(n, generator=rng)
    return features, Selection(hard_topk(scores, k), scores, torch.zeros(min(k, n), 4), n)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_few_patches_are_mapped_by_pca_and_the_title_says_so(n):
    features, selection = made(n, 2)
    points = umap.map_features(features, selection)
    assert points.xy.shape == (n, 2)
    assert points.method == "PCA"
    assert "too few for UMAP" in points.title
    assert umap.draw_map(points, selection).size[0] > 500


@pytest.mark.parametrize("kind", ["random", "constant", "twins"])
def test_map_is_finite_and_the_same_again(kind):
    features, selection = made(40, 6)
    features = {
        "random": features,
        "constant": torch.ones_like(features),
        "twins": features[:20].repeat(2, 1),
    }[kind]
    first, second = (umap.map_features(features, selection) for _ in range(2))
    assert np.isfinite(first.xy).all()
    np.testing.assert_array_equal(first.xy, second.xy)
    assert first.method == "UMAP"


def test_a_map_that_is_looked_after_is_the_same_and_ends_when_nobody_wants_it():
    features, selection = made(3000, 6)
    looks = []
    watched = umap.map_features(features, selection, look=lambda: looks.append(1))
    np.testing.assert_array_equal(watched.xy, umap.map_features(features, selection).xy)
    assert len(looks) > 3

    class Enough(Exception):
        pass

    def refuse():
        looks.append(2)
        if looks.count(2) > 3:  # at the first epochs, after the neighbours were found
            raise Enough

    with pytest.raises(Enough):
        umap.map_features(features, selection, look=refuse)
    with ThreadPoolExecutor(1) as pool:  # whoever wants one next, in a thread of its own, as on a server
        after = pool.submit(umap.map_features, features, selection, look=lambda: None)
        np.testing.assert_array_equal(after.result(timeout=120).xy, watched.xy)


def test_five_patches_are_enough_for_umap():
    features, selection = made(5, 2)
    assert umap.map_features(features, selection).method == "UMAP"


def test_two_kinds_of_patches_come_apart():
    features, selection = made(120, 6)
    features[:60] += 20
    xy = umap.map_features(features, selection).xy
    apart = np.linalg.norm(xy[:60].mean(0) - xy[60:].mean(0))
    assert apart > 3 * max(xy[:60].std(), xy[60:].std()) / 2


def test_a_large_slide_is_drawn_in_part_with_every_selected_patch():
    features, selection = made(300, 32)
    points = umap.map_features(features, selection, max_points=60)
    assert len(points.rows) == 60
    assert set(selection.indices.tolist()) <= set(points.rows.tolist())
    assert "60 of 300 patches" in points.title
    assert umap.draw_map(points, selection).mode == "RGB"


def test_neighbours_are_the_nearest_and_begin_with_the_point_itself():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    x[7] = x[9]
    indices, distances = umap.find_neighbours(x, 5)
    assert (indices[:, 0] == np.arange(50)).all()
    true = np.sort(np.linalg.norm(x[:, None] - x[None], axis=-1), axis=1)[:, :5]
    np.testing.assert_allclose(distances, true, atol=2e-3)


def test_numbas_compiler_can_be_made_to_pause():
    paused = []
    with umap.pausing(lambda: paused.append(1)):
        assert numba.njit(lambda x: x + 1)(1) == 2
    assert len(paused) > 10
    passes = len(paused)
    assert numba.njit(lambda x: x + 2)(1) == 3
    assert len(paused) == passes
