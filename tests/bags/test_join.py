"""Several slides as one case: the same choice as from one bag, and every patch knows its slide."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsewsi.bags.bag import Bag, Place, join, locate, save_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.model.sparse_wsi import SparseWSI


def make_bag(n: int, name: str, dim: int = 8, patch_size: int = 224) -> Bag:
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(n)).half()
    coords = torch.stack([torch.arange(n) % 3, torch.arange(n) // 3], 1).int() * patch_size
    return Bag(features, coords, patch_size, 0.5, "conch", name, slide_mpp=0.25, slide_size=(672, 2240))


def test_every_patch_knows_its_slide_and_place_there() -> None:
    a, empty, b = make_bag(7, "a"), make_bag(0, "empty"), make_bag(5, "b", patch_size=448)
    case = join([a, empty, b])
    assert len(case.features) == 12
    assert case.slide == "a + empty + b"
    assert [part.slide for part in case.parts] == ["a", "empty", "b"]
    for row in range(12):
        at = locate(case, row)
        bag, mine = (a, row) if row < 7 else (b, row - 7)
        assert (at.number, at.slide) == ((0, "a") if row < 7 else (2, "b"))
        assert ([at.x, at.y], at.patch_size) == (bag.coords[mine].tolist(), bag.patch_size)
    assert int(case.coords[7:, 1].min()) > int(case.coords[:7, 1].max())  # raster order goes on
    assert join([a]) is a
    x, y = a.coords[4].tolist()
    assert locate(a, 4) == Place(0, "a", x, y, 224, 0.25)


def test_a_joined_case_is_written_and_read(tmp_path: Path) -> None:
    case = join([make_bag(7, "a"), make_bag(5, "b")])
    save_bag(case, tmp_path / "case.safetensors")
    again = load_bag(tmp_path / "case.safetensors")
    assert again.parts == case.parts
    assert torch.equal(again.coords, case.coords)


def test_what_does_not_belong_together_is_refused() -> None:
    a, b = make_bag(7, "a"), make_bag(5, "b")
    with pytest.raises(ValueError, match="no slide to join"):
        join([])
    with pytest.raises(ValueError, match="b has features of dimension 6"):
        join([a, make_bag(5, "b", dim=6)])
    with pytest.raises(ValueError, match="b was encoded with uni"):
        join([a, replace(b, encoder="uni")])
    with pytest.raises(ValueError, match="case of several slides already"):
        join([join([a, b]), a])


def test_a_case_chooses_among_all_patches_as_one_bag_would(tiny_model: Path) -> None:
    model = SparseWSI.from_pretrained(tiny_model)
    encoder, dim = model.config.encoder, model.config.feature_dim
    a, b = (replace(make_bag(n, name, dim), encoder=encoder) for n, name in ((20, "a"), (30, "b")))
    case = join([a, b])
    one = replace(case, parts=())
    chosen, whole = model.select(case), model.select(one)
    assert torch.equal(chosen.indices, whole.indices)
    assert chosen.num_patches == 50
    torch.testing.assert_close(chosen.scores, torch.cat([model.select(a).scores, model.select(b).scores]))


def test_a_case_that_reaches_beyond_32_bits_is_refused_and_never_wrapped_around():
    tall = Bag(torch.zeros(2, 4), torch.tensor([[0, 0], [0, 2**31 - 500]]), 224, 0.5, "x", "slide 1")
    with pytest.raises(ValueError, match="32 bits"):
        join([tall, tall])
