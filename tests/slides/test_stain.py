"""What is tissue by its colours: H&E and brown are found; of other stains it is said what was left out."""

import numpy as np
import pytest

from sparsewsi.slides.stain import find_stained

GLASS = np.array([240.0, 238.0, 241.0])
Y, X = np.mgrid[:400, :500]
OVAL = ((X - 250) / 180) ** 2 + ((Y - 200) / 140) ** 2 < 1
HE, HAEMATOXYLIN = (190, 110, 170), (190, 190, 215)


def slide_of(*parts: tuple[tuple[int, int, int], float]) -> tuple[np.ndarray, list[np.ndarray]]:
    """An oval of tissue on glass, stained with each colour on its share of the width: (uint8 (h, w, 3), the parts)."""
    rng, begin, masks = np.random.default_rng(0), 70.0, []
    image = np.broadcast_to(GLASS, (*OVAL.shape, 3)).copy()
    for colour, share in parts:
        part = OVAL & (begin <= X) & (begin + share * 360 > X)
        density = -np.log(np.array(colour) / GLASS) * np.clip(1 + 0.25 * rng.standard_normal((*OVAL.shape, 1)), 0.1, 3)
        image[part] = (GLASS * np.exp(-density))[part]
        begin += share * 360
        masks.append(part)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8), masks


@pytest.mark.parametrize("brown", [(125, 85, 55), (70, 40, 25), (150, 110, 75), (165, 120, 70)])
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_brown_is_tissue_with_and_without_haematoxylin_beside_it(brown, share):
    image, parts = slide_of((brown, share), (HAEMATOXYLIN, 1 - share))
    found = find_stained(image, 8.0)
    assert all(found.mask[part].mean() > 0.95 for part in parts if part.any())
    assert found.note == found.reason == ""


OTHERS = {
    "AEC red": (190, 70, 60),
    "HRP green": (80, 150, 120),
    "Vector blue": (80, 100, 180),
    "trichrome blue": (90, 120, 190),
    "trichrome green": (90, 160, 130),
    "silver": (60, 50, 45),
    "Alcian blue": (110, 190, 205),
    "Congo red": (215, 110, 90),
    "pale brown": (205, 180, 150),
}


@pytest.mark.parametrize("stain", OTHERS)
@pytest.mark.parametrize("share", [0.12, 0.5, 1.0])
def test_what_other_stains_colour_is_found_or_said_to_be_left_out(stain, share):
    image, _ = slide_of((OTHERS[stain], share), (HE, 1 - share))
    found = find_stained(image, 8.0)
    if OVAL.sum() - found.mask[OVAL].sum() > 0.1 * OVAL.sum():
        assert "another stain" in found.note + found.reason
        assert "colours of H&E" in found.note + found.reason
        assert "blank" not in found.reason


@pytest.mark.parametrize("stain", [HE, (200, 70, 140), (205, 60, 80), (120, 120, 190), (110, 100, 170)])
def test_of_stains_like_haematoxylin_or_eosin_nothing_is_left_out(stain):
    image, parts = slide_of((stain, 1.0))
    found = find_stained(image, 8.0)
    assert found.mask[parts[0]].mean() > 0.97
    assert found.note == ""


FILLS = {
    "a frame": (X < 40) | (X > 460) | (Y < 30) | (Y > 370),
    "one side": X > 440,
    "single tiles": ((X // 64 + Y // 64) % 2 == 0) & ((X < 64) | (X >= 448)) & (Y < 384),
    "strips": (Y % 140 < 40) & ((X < 60) | (X > 440)),
    "up to the tissue": ~OVAL,
    "over the tissue": X > 300,
    "a narrow border": (X < 20) | (Y < 20),
}


@pytest.mark.parametrize("where", FILLS)
@pytest.mark.parametrize("black", [0, 5, 8, 14, 25, 40])
def test_what_a_scanner_filled_with_black_is_neither_tissue_nor_a_dark_field(where, black):
    image, (tissue,) = slide_of((HE, 1.0))
    fill = FILLS[where]
    image[fill] = black
    found = find_stained(image, 8.0)
    assert found.mask[tissue & ~fill].mean() > 0.95
    assert found.mask[fill].mean() < 0.01
    assert found.note == found.reason == ""


def test_a_small_scan_on_a_large_black_ground_is_found():
    image, (tissue,) = slide_of((HE, 1.0))
    large = np.zeros((1600, 2000, 3), np.uint8)
    large[600:1000, 700:1200] = image
    assert find_stained(large, 8.0).mask[600:1000, 700:1200][tissue].mean() > 0.95


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0.3, 0.6, 0.1)])
def test_a_slide_without_colours_is_not_called_blank(weights):
    grey = (slide_of((HE, 1.0))[0] @ np.array(weights)).astype(np.uint8)
    found = find_stained(np.repeat(grey[..., None], 3, 2), 8.0)
    assert not found.mask.any()
    assert "no colours" in found.reason
    assert "blank" in find_stained(np.full((400, 500, 3), 240, np.uint8), 8.0).reason
