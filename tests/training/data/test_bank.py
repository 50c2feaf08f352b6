"""Banks from folders of classes and from phantoms; labels bring their words."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from train.data import mosaic
from train.data.bank import cut_tiles, list_phantom_seeds, load_bank, write_bank
from train.data.kinds import NEEDLE_KINDS, NEEDLES, WORDS
from train.data.stream import MosaicStream, ask_in_turn
from train.data.tiles import CLASSES, choose_split, find_class_tiles


def test_a_split_has_so_many_phantoms_and_no_more() -> None:
    assert list_phantom_seeds("test", 26) == range(3000, 3026)
    with pytest.raises(ValueError, match="the train split has 1000 phantoms, 1001 were asked for"):
        list_phantom_seeds("train", 1001)


def test_a_folder_of_classes_is_split_by_file(classes: Path, registry: None) -> None:
    tiles, vocabulary = find_class_tiles(classes)
    assert len(tiles) == 270
    assert set(vocabulary.needles) == {"carcinoma", "lymphoid", "mucin", "debris", "colon_mucosa"}
    assert set(vocabulary.backgrounds) == {"adipose", "stroma_fibrous", "smooth_muscle"}
    assert {tile.source for tile in tiles} == {"made-up-classes"}
    shares = Counter(tile.split for tile in tiles)
    assert 150 < shares["train"] < 220
    assert min(shares["val"], shares["test"]) > 20
    fewer, _ = find_class_tiles(classes, most=10)
    assert len(fewer) == 90
    assert {(tile.file, tile.split) for tile in fewer} <= {(tile.file, tile.split) for tile in tiles}
    assert any(choose_split(f"TUM/{number}.png", 1) != choose_split(f"TUM/{number}.png") for number in range(20))


def test_labels_of_your_own_bring_their_words(
    classes: Path, class_colours: dict[str, tuple[int, int, int]], tmp_path: Path, registry: None
) -> None:
    with pytest.raises(ValueError, match=r"without a label: ADI, BACK.*--labels"):
        find_class_tiles(classes, {"TUM": "carcinoma"})
    labels = dict.fromkeys(class_colours) | {"TUM": "carcinoma", "STR": "stroma_fibrous", "ADI": "adipose"}
    with pytest.raises(ValueError, match="4 kinds of needles"):
        find_class_tiles(classes, labels)
    own = {"kind": "dcis", "word": "ductal carcinoma in situ", "role": "needle"}
    with pytest.raises(ValueError, match="the label of NORM lacks role and word"):
        find_class_tiles(classes, labels | {"NORM": {"kind": "dcis"}})
    labels |= {"LYM": "lymphoid", "MUC": "mucin", "NORM": own}
    tiles, vocabulary = find_class_tiles(classes, labels)
    vocabulary.register()
    bank = tmp_path / "bank.safetensors"
    patches = cut_tiles([tile for tile in tiles if tile.split == "test"], 1)
    write_bank(bank, patches, lambda pixels: torch.from_numpy(pixels).float().mean((1, 2)), "mean", "x", vocabulary)
    NEEDLES.pop(vocabulary.origin)
    WORDS.pop("dcis")
    NEEDLE_KINDS.remove("dcis")
    loaded = load_bank(bank, "test")
    assert WORDS["dcis"] == "ductal carcinoma in situ"
    assert "dcis" in NEEDLE_KINDS
    assert "debris" not in loaded.kinds
    with pytest.raises(ValueError, match="are called 'made-up-classes' but differ"):
        find_class_tiles(classes)[1].register()


def test_a_bank_of_classes_gives_questions_and_examples(
    classes: Path,
    class_colours: dict[str, tuple[int, int, int]],
    tmp_path: Path,
    registry: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class MeanColour:
        name = "mean-colour"

        def __call__(self, pixels: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(pixels).float().mean((1, 2))

    monkeypatch.setattr("sparsewsi.bags.encoders.load_encoder", lambda name: MeanColour())
    path = tmp_path / "bank.safetensors"
    flags = ["bank", "--classes", classes, "--per-class", 12, "--copies", 1, "--out", path]
    monkeypatch.setattr(sys, "argv", ["mosaic", *map(str, flags)])
    mosaic.main()
    bank = load_bank(path, "test")
    assert (bank.origin, bank.encoder) == ("made-up-classes", "mean-colour")
    colours = {CLASSES[name]: colour for name, colour in class_colours.items()}
    for bag, kinds, question in ask_in_turn(bank, 10, 100, seed=0):
        assert question.answer in question.options
        wanted = torch.tensor([colours[kind] for kind in kinds], dtype=torch.float16)
        torch.testing.assert_close(bag.features, wanted, atol=1.5, rtol=0)
    example = MosaicStream((load_bank(path, "train"),), 0, stage=2).example(3, 64)
    assert len(example.kinds) == 64
