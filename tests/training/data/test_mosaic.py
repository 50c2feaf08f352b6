"""Mosaics: ground truth that holds, questions that only the slide can answer."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from PIL import Image

from sparsewsi.slides.slide import open_slide
from sparsewsi.slides.tissue import patch_coords
from train.data import mosaic
from train.data.mosaic import (
    BACKGROUNDS,
    FAMILIES,
    NEEDLES,
    WORDS,
    Bank,
    Facts,
    MosaicStream,
    ask,
    balanced_set,
    caption,
    class_tiles,
    kinds_at,
    lay_out,
    load_bank,
    plan,
    split_of,
    tile_patches,
    truth_path,
    write_bank,
)
from train.data.questions import read


@pytest.fixture(scope="module")
def bank() -> Bank:
    kinds = np.repeat([*BACKGROUNDS["real"], *NEEDLES["real"]], 20)
    features = torch.arange(len(kinds), dtype=torch.float16)[:, None].repeat(1, 4)
    sources = np.array([f"slide-{i % 2}" for i in range(len(kinds))])
    return Bank(features, kinds, sources, "real", "made-up")


def test_layout_has_the_needles_it_promises_and_a_dominant_tissue() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        facts = Facts("real", "adipose", ("blood", "carcinoma", "mucin"))
        kinds = lay_out(facts, 700, (4, 12), rng)
        count = Counter(kinds.tolist())
        assert all(4 <= count[kind] <= 12 for kind in facts.present)
        assert count["adipose"] > 350
        assert set(count) <= {*facts.present, *BACKGROUNDS["real"]}


def test_a_focus_is_compact() -> None:
    kinds = lay_out(Facts("real", "adipose", ("mucin",)), 900, (9, 9), np.random.default_rng(0))
    rows, columns = np.divmod(np.flatnonzero(kinds == "mucin"), 30)
    assert np.ptp(rows) <= 5
    assert np.ptp(columns) <= 5


def test_patches_are_of_the_kind_the_layout_says(bank: Bank) -> None:
    for bag, kinds, _ in balanced_set(bank, 8, 100, seed=0):
        assert (bank.kinds[bag.features[:, 0].long().numpy()] == kinds).all()


def test_answers_are_true_and_distractors_false() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        family = FAMILIES[seed % len(FAMILIES)]
        facts = plan("real", family, rng)
        question = ask(facts, family, rng)
        assert question is not None
        present = {WORDS[kind] for kind in facts.present}
        assert question.answer in question.options
        assert len(set(question.options)) == len(question.options)
        if family == "present":
            assert present & set(question.options) == {question.answer}
        elif family == "absent":
            assert set(question.options) - present == {question.answer}
        elif family == "diagnosis":
            assert (question.answer == "Yes") == ("carcinoma" in facts.present)
        described = caption(facts).answer.removeprefix("Foci of ").rstrip(".").replace(" and ", ", ")
        assert set(described.split(", ")) == present


def test_nothing_is_answerable_from_the_text() -> None:
    """The best answer from question and options alone stays near chance, and the right place is uniform."""
    for family in FAMILIES:
        answers, places, offered = Counter(), Counter(), Counter()
        n = 4000
        for i in range(n):
            rng = np.random.default_rng((5, i))
            question = ask(plan("real", family, rng), family, rng)
            assert question is not None
            answers[question.question, question.answer] += 1
            offered.update((question.question, option) for option in question.options)
            places[len(question.options), question.options.index(question.answer)] += 1
        if family not in ("contains", "diagnosis"):
            for (size, _), count in places.items():
                share = count / sum(c for (s, _), c in places.items() if s == size)
                assert abs(share - 1 / size) < 0.05
        for asked, option in offered:  # given that an option is offered, how often is it right?
            right = answers[asked, option] / offered[asked, option]
            chance = n / sum(offered.values())
            assert right < chance + 0.12, (family, asked, option, right)


def test_other_tissue_is_background_that_nothing_is_asked_about(bank: Bank) -> None:
    more = replace(
        bank,
        features=torch.cat([bank.features, bank.features[:20]]),
        kinds=np.concatenate([bank.kinds, ["spleen"] * 20]),
        sources=np.concatenate([bank.sources, ["slide-9"] * 20]),
    )
    plain, mixed = MosaicStream((more,), 3, 2), MosaicStream((more,), 3, 2, other_tissue=1.0)
    for index in range(20):
        one, other = plain.example(index, 200), mixed.example(index, 200)
        if one.questions[0].family == "name":
            continue
        focus = np.isin(one.kinds, NEEDLES["real"])
        assert 1 <= other.kinds.count("spleen") <= 10
        assert (np.array(other.kinds)[focus] == np.array(one.kinds)[focus]).all()
        assert not any("spleen" in str(question) for question in other.questions)


def test_a_training_example_depends_on_its_number_only(bank: Bank) -> None:
    one, other = MosaicStream((bank,), 3, stage=2), MosaicStream((bank,), 3, stage=2)
    other.example(0, 64)
    a, b = one.example(7, 64), other.example(7, 64)
    assert torch.equal(a.features, b.features)
    assert a.questions == b.questions
    assert torch.equal(a.indices, a.indices.unique())
    assert int(a.indices[-1]) < a.num_patches


def test_one_question_a_bag_is_a_question_and_the_last_of_several_a_caption(bank: Bank) -> None:
    alone, three = (
        [MosaicStream((bank,), 3, 2, count).example(number, 64).questions for number in range(40)] for count in (1, 3)
    )
    assert {len(questions) for questions in alone} == {1}
    assert {question.family for (question,) in alone} == {*FAMILIES, "name"}
    assert {questions[-1].family for questions in three} == {"caption", "name"}


def test_a_split_has_so_many_phantoms_and_no_more() -> None:
    assert mosaic.phantom_seeds("test", 26) == range(3000, 3026)
    with pytest.raises(ValueError, match="the train split has 1000 phantoms, 1001 were asked for"):
        mosaic.phantom_seeds("train", 1001)


@pytest.mark.parametrize("text", ["63", "-5", "many"])
def test_a_mosaic_that_foci_could_fill_is_refused(text: str) -> None:
    assert mosaic.mosaic_size("64") == 64
    with pytest.raises(argparse.ArgumentTypeError, match=f"64 patches or more, got {text}"):
        mosaic.mosaic_size(text)


# ---- folders of classes, and mosaics as slides

COLOURS = {  # of classes that no file names' order gives away; stained as H&E is, so that tissue is found
    "ADI": (225, 150, 190), "BACK": (243, 243, 243), "DEB": (190, 120, 160), "LYM": (90, 60, 150),
    "MUC": (170, 130, 200), "MUS": (220, 110, 140), "NORM": (150, 80, 170), "STR": (235, 130, 170),
    "TUM": (110, 40, 120),
}  # fmt: skip


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    for name in ("NEEDLES", "BACKGROUNDS", "WORDS", "NEEDLE_KINDS"):
        monkeypatch.setattr(mosaic, name, getattr(mosaic, name).copy())


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as NCT-CRC-HE-100K is, of even colours; some tiles are as small as those of Kather 2016."""
    folder = tmp_path_factory.mktemp("data") / "made-up-classes"
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(30):
            side = 150 if number % 5 == 0 else 224
            Image.new("RGB", (side, side), colour).save(folder / name / f"{name}-{number}.png")
    return folder


def test_a_folder_of_classes_is_split_by_file(classes: Path, registry: None) -> None:
    tiles, vocabulary = class_tiles(classes)
    assert len(tiles) == 270
    assert set(vocabulary.needles) == {"carcinoma", "lymphoid", "mucin", "debris", "colon_mucosa"}
    assert set(vocabulary.backgrounds) == {"adipose", "stroma_fibrous", "smooth_muscle"}
    assert {tile.source for tile in tiles} == {"made-up-classes"}
    shares = Counter(tile.split for tile in tiles)
    assert 150 < shares["train"] < 220
    assert min(shares["val"], shares["test"]) > 20
    fewer, _ = class_tiles(classes, most=10)
    assert len(fewer) == 90
    assert {(tile.file, tile.split) for tile in fewer} <= {(tile.file, tile.split) for tile in tiles}
    assert any(split_of(f"TUM/{number}.png", 1) != split_of(f"TUM/{number}.png") for number in range(20))


def test_labels_of_your_own_bring_their_words(classes: Path, tmp_path: Path, registry: None) -> None:
    with pytest.raises(ValueError, match=r"without a label: ADI, BACK.*--labels"):
        class_tiles(classes, {"TUM": "carcinoma"})
    labels = dict.fromkeys(COLOURS) | {"TUM": "carcinoma", "STR": "stroma_fibrous", "ADI": "adipose"}
    with pytest.raises(ValueError, match="4 kinds of needles"):
        class_tiles(classes, labels)
    own = {"kind": "dcis", "word": "ductal carcinoma in situ", "role": "needle"}
    with pytest.raises(ValueError, match="the label of NORM lacks role and word"):
        class_tiles(classes, labels | {"NORM": {"kind": "dcis"}})
    labels |= {"LYM": "lymphoid", "MUC": "mucin", "NORM": own}
    tiles, vocabulary = class_tiles(classes, labels)
    vocabulary.register()
    bank = tmp_path / "bank.safetensors"
    patches = tile_patches([tile for tile in tiles if tile.split == "test"], 1)
    write_bank(bank, patches, lambda pixels: torch.from_numpy(pixels).float().mean((1, 2)), "mean", "x", vocabulary)
    mosaic.NEEDLES.pop(vocabulary.origin)
    mosaic.WORDS.pop("dcis")
    mosaic.NEEDLE_KINDS.remove("dcis")
    loaded = load_bank(bank, "test")
    assert mosaic.WORDS["dcis"] == "ductal carcinoma in situ"
    assert "dcis" in mosaic.NEEDLE_KINDS
    assert "debris" not in loaded.kinds
    with pytest.raises(ValueError, match="are called 'made-up-classes' but differ"):
        class_tiles(classes)[1].register()


def test_of_classes_without_carcinoma_nothing_asks_for_it(bank: Bank, registry: None) -> None:
    needles = {kind: mosaic.WORDS[kind] for kind in NEEDLES["real"] if kind != "carcinoma"}
    mosaic.Vocabulary("normal", needles, {kind: mosaic.WORDS[kind] for kind in BACKGROUNDS["real"]}).register()
    normal = replace(bank, origin="normal")
    asked = [(question, kinds) for _, kinds, question in balanced_set(normal, 8, 60, seed=0)]
    stream = MosaicStream((normal,), 0, stage=2)
    for example in (stream.example(number, 60) for number in range(20)):
        asked += [(question, example.kinds) for question in example.questions]
    assert {question.family for question, _ in asked} >= set(FAMILIES) - {"diagnosis"}
    assert not any(question.family == "diagnosis" or "carcinoma" in kinds for question, kinds in asked)


def run_main(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["mosaic", *map(str, words)])
    mosaic.main()


def test_a_bank_of_classes_gives_questions_and_examples(
    classes: Path, tmp_path: Path, registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MeanColour:
        name = "mean-colour"

        def __call__(self, pixels: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(pixels).float().mean((1, 2))

    monkeypatch.setattr("sparsewsi.bags.encoders.load_encoder", lambda name: MeanColour())
    path = tmp_path / "bank.safetensors"
    run_main(monkeypatch, "bank", "--classes", classes, "--per-class", 12, "--copies", 1, "--out", path)
    bank = load_bank(path, "test")
    assert (bank.origin, bank.encoder) == ("made-up-classes", "mean-colour")
    colours = {mosaic.CLASSES[name]: colour for name, colour in COLOURS.items()}
    for bag, kinds, question in balanced_set(bank, 10, 100, seed=0):
        assert question.answer in question.options
        wanted = torch.tensor([colours[kind] for kind in kinds], dtype=torch.float16)
        torch.testing.assert_close(bag.features, wanted, atol=1.5, rtol=0)
    example = MosaicStream((load_bank(path, "train"),), 0, stage=2).example(3, 64)
    assert len(example.kinds) == 64


def test_a_mosaic_slide_is_what_its_truth_says(
    classes: Path, tmp_path: Path, registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "slides"
    command = ("slides", "--classes", classes, "--n", 94, "--out", out)
    run_main(monkeypatch, *command, "--slides", 2)
    first, second = sorted(out.glob("*.tiff"))
    before = first.stat().st_mtime_ns
    run_main(monkeypatch, *command)
    assert first.stat().st_mtime_ns == before  # what is there is left alone, and so are the questions about it
    assert not list(out.glob(".*"))

    truth = json.loads(truth_path(first).read_text())
    assert len(truth["kinds"]) == 94
    assert truth["dominant"] == Counter(truth["kinds"]).most_common(1)[0][0]
    assert {needle["kind"] for needle in truth["needles"]} == set(truth["present"]) <= set(truth["kinds"])
    with openslide.OpenSlide(first) as slide:
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert slide.level_dimensions[0] == (14 * 224, 14 * 224)
        assert slide.level_downsamples == pytest.approx((1, 4))
    with open_slide(first) as slide:
        coords = patch_coords(slide, 0.5, 224)
        kinds = kinds_at(truth, coords)
        assert kinds_at(truth, np.array([[0, 0], [224 * 13, 500]])).tolist() == ["background", "background"]
        assert (coords % 224 == 0).all()
        found = Counter(kinds)
        assert found.pop("background", 0) <= 2  # glass in a corner that the tissue mask closes
        assert found == Counter(truth["kinds"])
        colours = {mosaic.CLASSES[name]: colour for name, colour in COLOURS.items()}
        for level in (0, 1):
            for corner, kind in zip(coords[::7], kinds[::7]):
                middle = slide.read_level(level, tuple(corner + 64), (24, 24))  # the rim is smeared by JPEG
                np.testing.assert_allclose(middle.mean((0, 1)), colours[str(kind)], atol=4)
    for needle in truth["needles"]:
        mine = coords[kinds == needle["kind"]]
        assert (mine.min(0).tolist(), (mine.max(0) + 224).tolist()) == (
            [needle["x"], needle["y"]], [needle["x"] + needle["w"], needle["y"] + needle["h"]],
        )  # fmt: skip

    records, problems = read([out / "questions.jsonl"])
    assert not problems
    assert {record.slides for record in records} == {(first.stem,), (second.stem,)}
    words = {mosaic.WORDS[kind] for kind in truth["present"]}
    for record in records:
        if record.slides == (first.stem,) and record.question.family in ("contains", "diagnosis"):
            tissue = record.question.question.removeprefix("Does this slide contain ").removesuffix("?")
            assert (record.question.answer == "Yes") == (tissue in words)


def test_slides_of_a_split_without_tiles_are_refused(classes: Path, tmp_path: Path, registry: None) -> None:
    with pytest.raises(ValueError, match="no tile of split 'other'"):
        mosaic.write_slides(tmp_path, class_tiles(classes)[0], "real", "other", 1, 64)
