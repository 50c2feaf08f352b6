"""Pictures: boxes lie on their patches, numbers do not cover each other, bars are true, odd sizes work."""

import itertools

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import hard_topk
from sparsewsi.phantom import write_phantom
from sparsewsi.report import plots
from sparsewsi.slides.slide import open_slide


def made(columns: int, rows: int, k: int, side: int = 100, slide_mpp: float | None = 0.5) -> tuple[Bag, Selection]:
    """A grid of patches with random features, and its k best by a random score."""
    rng = torch.Generator().manual_seed(columns * rows)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    coords = torch.stack([x.flatten(), y.flatten()], 1).int() * side
    n = len(coords)
    bag = Bag(
        torch.randn(n, 12, generator=rng),
        coords,
        side,
        0.5,
        "efficientnet-lite0",
        "phantom 1",
        slide_mpp,
        "argument",
        (columns * side, rows * side),
    )
    scores = torch.randn(n, generator=rng)
    return bag, Selection(hard_topk(scores, k), scores, torch.zeros(min(k, n), 4), n)


def grey(bag: Bag, scale: float) -> np.ndarray:
    assert bag.slide_size is not None
    width, height = (round(side / scale) for side in bag.slide_size)
    return np.full((height, width, 3), 200, np.uint8)


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((picture == np.array(colour)).all(-1).mean())


def test_boxes_lie_on_selected_patches_and_on_no_other():
    bag, selection = made(12, 10, 8)
    picture = np.asarray(plots.draw_overlay(grey(bag, 1.0), 1.0, bag, selection))
    assert picture.shape == (1000, 1200, 3)
    chosen = set(selection.indices.tolist())
    for index, (x, y) in enumerate(bag.coords.tolist()):
        yellow = share_of(picture[y : y + 100, x : x + 100], plots.BOX)
        assert (yellow > 0.03) == (index in chosen)


def test_a_patch_of_two_pixels_still_gets_a_box_that_is_seen():
    bag, selection = made(400, 300, 5)
    picture = np.asarray(plots.draw_overlay(grey(bag, 40.0), 40.0, bag, selection))
    for index in selection.indices:
        x, y = ((bag.coords[index].float() + 50) / 40).round().int().tolist()
        assert share_of(picture[max(0, y - 12) : y + 12, max(0, x - 12) : x + 12], plots.BOX) > 0.05


def test_a_small_thumbnail_is_enlarged_so_that_numbers_do_not_cover_it():
    bag, selection = made(3, 2, 4)
    picture = plots.draw_overlay(grey(bag, 1.0), 1.0, bag, selection)
    assert picture.size == (1200, 800)


@pytest.mark.parametrize("layout", ["crowded", "spread"])
def test_rank_numbers_never_cover_each_other_and_stay_in_the_picture(layout):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60 if layout == "crowded" else 980, (32, 2))
    boxes = [(x, y, x + 18, y + 18) for x, y in corners]
    extents = [(-12.0, -9.0, 12.0, 9.0)] * 32
    places = plots.place_labels(boxes, extents, (1000, 1000))
    spots = [(x - 12, y - 9, x + 12, y + 9) for x, y in places]
    assert not any(plots.overlap(a, b) for a, b in itertools.combinations(spots, 2))
    assert all(s[0] >= 0 and s[1] >= 0 and s[2] <= 1000 and s[3] <= 1000 for s in spots)


def test_the_scale_bar_is_as_long_as_it_says():
    bag, selection = made(12, 10, 1, slide_mpp=0.25)  # 1,200 px are 300 um: a sixth is 50 um or 200 px
    picture = np.asarray(plots.draw_overlay(grey(bag, 1.0), 1.0, bag, selection))
    bar = (picture[1000 - 26] == np.array(plots.CASING)).all(-1)
    assert abs(bar.sum() - 200) <= 2
    assert [plots.round_length(v) for v in (1, 1.99, 2, 4.9, 50, 9999)] == [1, 1, 2, 2, 50, 5000]


def test_without_mpp_there_is_no_scale_bar():
    bag, _ = made(12, 10, 1, slide_mpp=None)
    selection = Selection(torch.tensor([5]), torch.zeros(120), torch.zeros(1, 4), 120)  # far from the bar's place
    picture = np.asarray(plots.draw_overlay(grey(bag, 1.0), 1.0, bag, selection))
    assert (picture[900:, :300] == 200).all()


def test_canvas_stands_in_for_a_slide_even_of_unknown_size():
    bag, selection = made(6, 4, 2)
    unknown = Bag(bag.features, bag.coords, bag.patch_size, bag.mpp, bag.encoder, bag.slide)
    (known, scale), (guessed, same) = plots.draw_canvas(bag), plots.draw_canvas(unknown)
    assert scale == same
    np.testing.assert_array_equal(known, guessed)
    assert plots.draw_overlay(guessed, scale, unknown, selection).size == (1400, 934)


def test_patch_pictures_are_what_was_encoded_best_first(tmp_path):
    write_phantom(tmp_path / "p.tiff", seed=3, size=1024, mpp=0.5)
    bag, selection = made(4, 4, 3, side=224)
    with open_slide(tmp_path / "p.tiff") as slide:
        pictures = plots.cut_patches(slide, bag, selection)
        best = tuple(bag.coords[selection.scores.argmax()].tolist())
        np.testing.assert_array_equal(pictures[0], slide.read(best, (224, 224), 0.5))
    assert len(pictures) == 3
