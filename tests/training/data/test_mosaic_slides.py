"""Mosaics as slides: pixels, levels, needles and questions are what the truth beside them says."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest

from sparsewsi.slides.slide import open_slide
from sparsewsi.slides.tissue import patch_coords
from train.data.kinds import WORDS
from train.data.mosaic_slides import look_up_kinds, truth_path, write_slides
from train.data.questions import read
from train.data.tiles import CLASSES, find_class_tiles


def test_a_mosaic_slide_is_what_its_truth_says(
    classes: Path, class_colours: dict[str, tuple[int, int, int]], tmp_path: Path, registry: None
) -> None:
    out = tmp_path / "slides"
    tiles, vocabulary = find_class_tiles(classes)
    vocabulary.register()
    write_slides(out, tiles, vocabulary.origin, "test", 2, 94)
    first, second = sorted(out.glob("*.tiff"))
    before = first.stat().st_mtime_ns
    write_slides(out, tiles, vocabulary.origin, "test", 1, 94)
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
        kinds = look_up_kinds(truth, coords)
        assert look_up_kinds(truth, np.array([[0, 0], [224 * 13, 500]])).tolist() == ["background", "background"]
        assert (coords % 224 == 0).all()
        found = Counter(kinds)
        assert found.pop("background", 0) <= 2  # glass in a corner that the tissue mask closes
        assert found == Counter(truth["kinds"])
        colours = {CLASSES[name]: colour for name, colour in class_colours.items()}
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
    words = {WORDS[kind] for kind in truth["present"]}
    for record in records:
        if record.slides == (first.stem,) and record.question.family in ("contains", "diagnosis"):
            tissue = record.question.question.removeprefix("Does this slide contain ").removesuffix("?")
            assert (record.question.answer == "Yes") == (tissue in words)


def test_slides_of_a_split_without_tiles_are_refused(classes: Path, tmp_path: Path, registry: None) -> None:
    with pytest.raises(ValueError, match="no tile of split 'other'"):
        write_slides(tmp_path, find_class_tiles(classes)[0], "real", "other", 1, 64)
