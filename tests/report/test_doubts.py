"""Doubts: unlike slides are told apart, usual ones pass, and a cut between equals is said."""

import dataclasses

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.model import novelty
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import hard_topk
from sparsewsi.report.doubts import doubt_selection, doubt_slide, find_doubts

D = 40


def slide(seed: int, n: int = 60, shift: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    """Features of a made-up slide: ten directions vary more than others, and every slide is a little off the middle."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.where(torch.arange(D) < 10, 4.0, 1.0)
    middle = 0.3 * torch.randn(D, generator=generator)
    return 2 + (torch.randn(n, D, generator=generator) * spread + middle + shift) * sizes


def bag_of(features: torch.Tensor, **facts) -> Bag:
    coords = torch.stack([torch.arange(len(features)), torch.zeros(len(features))], 1).int() * 224
    return Bag(features.half(), coords, 224, 0.5, "efficientnet-lite0", "a slide", **facts)


@pytest.fixture(scope="module")
def summary() -> novelty.Summary:
    sources = np.repeat([f"slide {i}" for i in range(20)], 60)
    return novelty.summarise(torch.cat([slide(i) for i in range(20)]).half(), sources)


def test_usual_slides_pass_and_unlike_ones_do_not(summary):
    usual = [doubt_slide(summary, bag_of(slide(100 + i))) for i in range(100)]
    assert sum(text is not None for text in usual) <= 15, "2 in 21 are what the limits allow"
    assert summary.farthest == pytest.approx(1, abs=0.2)
    for odd in (slide(7, shift=2), slide(8, spread=2), torch.zeros(50, D), 100 * torch.rand(50, D)):
        text = doubt_slide(summary, bag_of(odd))
        assert text is not None
        assert "unlike" in text
        assert "20 training slides" in text


def test_a_slide_whose_patches_are_all_the_same_is_unlike_any(summary):
    text = doubt_slide(summary, bag_of(2 + 0.1 * (slide(9) - 2)))
    assert text is not None
    assert "vary 1% as much" in text
    assert doubt_slide(summary, bag_of(slide(9)[:1].repeat(5, 1))) is None, "five patches may be alike"


def test_a_few_odd_patches_do_not_make_a_slide_unlike(summary):
    features = slide(3)
    features[:20] = 500
    assert doubt_slide(summary, bag_of(features)) is None
    assert doubt_slide(summary, bag_of(features[:0])) is None


def test_patches_of_another_resolution_are_told(summary):
    selection = select(torch.randn(60), 4)

    def said(mpp: float | None) -> str:
        return " ".join(find_doubts(dataclasses.replace(bag_of(slide(3)), mpp=mpp), selection, None, 0.5))

    assert "read at 1 µm/px, but the model was trained on patches of 0.5 µm/px" in said(1.0)
    for mpp in (0.46, 0.5, None):
        assert "read at" not in said(mpp)


def test_phantoms_pass_and_noise_and_blur_do_not():
    from PIL import Image, ImageFilter

    from sparsewsi.bags.encoders import load_encoder
    from sparsewsi.phantom import patches

    encoder = load_encoder("efficientnet-lite0")
    kinds = ("stroma_fibrous", "carcinoma", "lymphoid")

    def pixels(seed: int) -> np.ndarray:
        return np.stack([image for kind in kinds for image in patches(seed, kind, 3)])

    found = novelty.summarise(torch.cat([encoder(pixels(s)) for s in range(1000, 1008)]), np.repeat(np.arange(8), 9))
    usual = [pixels(seed) for seed in (3000, 3001, 3002)]
    assert sum(doubt_slide(found, bag_of(encoder(image))) is not None for image in usual) <= 1
    noise = np.random.default_rng(0).integers(0, 256, usual[0].shape, np.uint8)
    blurred = np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(9))) for x in usual[0]])
    for image in (noise, blurred):
        assert doubt_slide(found, bag_of(encoder(image))) is not None


def test_features_of_another_dimension_are_refused(summary):
    with pytest.raises(ValueError, match="dimension 8"):
        doubt_slide(summary, bag_of(torch.zeros(3, 8)))


# ---- the selection


def select(scores: torch.Tensor, k: int) -> Selection:
    return Selection(hard_topk(scores, k), scores, torch.zeros(k, 4), len(scores))


def said(scores: torch.Tensor, k: int, **facts) -> str:
    facts = {"slide_mpp": 0.25, "mpp_source": "openslide"} | facts
    return " ".join(doubt_selection(bag_of(torch.zeros(len(scores), 4), **facts), select(scores, k)))


def test_a_cut_between_equals_is_said_and_a_clear_one_is_not():
    scores = torch.linspace(0, 1, 400)
    scores[100:132] += 5
    assert "as good as" not in said(scores, 32)
    assert "Rank 21 is as good as rank 20: 12 patches that were left out" in said(scores, 20), "more foci than K"
    assert "as good as" not in said(scores, 36), "four of 36 are no matter"
    scores[132:] = 0.1
    scores[:100] = 0.1
    assert "only 32 of the 64 kept patches stand out, the other 32 score like most" in said(scores, 64)
    assert "Rank 9 is as good as rank 8: 42 patches" in said(torch.ones(50), 8)
    tie = torch.arange(100.0) ** 2
    tie[89] = tie[90]
    assert "Rank 11 is as good as rank 10" in said(tie, 10)


def test_patches_chosen_by_hand_over_better_ones_are_said():
    scores = torch.arange(50.0)
    drawn = Selection(torch.tensor([0, 10, 20, 49]), scores, torch.zeros(4, 4), 50)
    assert "46 patches that were left out score higher" in " ".join(doubt_selection(bag_of(torch.zeros(50, 4)), drawn))


def test_few_patches_are_said():
    scores = torch.arange(1000.0) ** 2
    assert "hardly a selection" in said(scores[:30], 10)
    assert "nothing was selected" in said(scores[:10], 10)


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"mpp_source": "argument"}, "0.25 µm/px) was given by hand"),
        ({"mpp_source": "objective power"}, "guessed"),
        ({"slide_mpp": None}, "unknown"),
    ],
)
def test_a_scale_that_the_slide_did_not_state_is_said(facts, part):
    assert part in said(torch.arange(100.0), 10, **facts)
    assert "scale" not in said(torch.arange(100.0), 10)


def test_the_gravest_comes_first(summary):
    scores = torch.arange(60.0)
    odd = dataclasses.replace(bag_of(slide(7, shift=3)), slide_mpp=0.25, mpp_source="openslide")
    lines = find_doubts(odd, select(scores, 4), summary)
    assert "unlike" in lines[0]
    assert find_doubts(odd, select(scores, 4)) == lines[1:]
