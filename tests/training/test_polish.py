"""The last stage of the demonstration: bags that are hard to know again, and a run that goes on where it was."""

from dataclasses import replace

import numpy as np
import torch

from tests.training.data.test_phantoms import make_phantom
from train.data.bank import Bank
from train.data.kinds import BACKGROUNDS, NEEDLES
from train.data.open_world import OpenWorld, absent_slides
from train.data.phantoms import PhantomStream
from train.data.real import KINDS, SlideFacts, SlideStream
from train.data.stream import MosaicStream
from train.polish import DROPOUT, HardToKnow, drop


def make_stream() -> HardToKnow:
    """Slides a (malignant) and b (not) of ten patches in three views, the number of the row their only feature."""
    facts = dict.fromkeys(KINDS, "")
    slides = (
        SlideFacts("a", "a", "train", facts | {"malignant": "Yes", "carcinoma": "Yes", "neoplasm": "Yes"}),
        SlideFacts("b", "b", "train", facts | {"malignant": "No", "carcinoma": "No", "neoplasm": "No"}),
    )
    names, copies = np.repeat(["a", "b"], 30), np.tile(np.repeat(["0", "1", "2"], 10), 2)
    bank = Bank(torch.arange(60.0)[:, None].half(), copies, names, "slides", "made-up")
    unseen = replace(bank, features=bank.features + 100)
    kinds = np.repeat([*BACKGROUNDS["real"], *NEEDLES["real"]], 20)
    tiles = Bank(torch.full((len(kinds), 1), -1.0).half(), kinds, np.full(len(kinds), "t"), "real", "made-up")
    return HardToKnow(
        SlideStream(bank, slides, 0),
        SlideStream(unseen, slides, 0),
        PhantomStream((make_phantom("carcinoma"), make_phantom("mucin", "blood")), 0),
        OpenWorld(tiles, absent_slides(bank, ["b"]), 0, of_slides=0.5),
        MosaicStream((tiles,), 0, 2, 3),
        0,
    )


def test_a_bag_of_slides_is_called_malignant_if_some_of_it_is() -> None:
    stream, answers, unseen = make_stream(), [], 0
    for i in range(200):
        example = stream.of_slide(np.random.default_rng(i))
        values = example.features[:, 0]
        unseen += bool((values >= 100).any())
        of_a = ((values % 100) < 30).any()
        for question in example.questions:
            if question.family in ("malignant", "carcinoma"):
                assert question.answer == ("Yes" if of_a else "No")
                answers.append(question.answer)
    assert 0.3 < answers.count("Yes") / len(answers) < 0.7
    assert 60 < unseen < 160


def test_what_is_asked_of_a_mosaic_is_true_of_it_and_all_sorts_of_bags_come() -> None:
    stream = make_stream()
    for i in range(40):
        example = stream.of_mosaic(80, np.random.default_rng(i))
        assert example.questions
        for question in example.questions:
            if question.family == "carcinoma":
                assert question.answer == ("Yes" if "carcinoma" in example.kinds else "No")
    drawn = [stream.example(i) for i in range(40)]
    assert len({example.kinds[:1] for example in drawn}) > 3
    assert all(torch.equal(stream.example(i).features, drawn[i].features) for i in range(5))


def test_dropout_keeps_the_mean_and_takes_half_of_what_differs_from_it() -> None:
    features = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) + 3
    mean = features.mean(0)
    dropped = drop(features, mean, torch.Generator().manual_seed(1))
    assert (dropped.mean(0) - mean).abs().mean() < 0.2
    assert abs(float((dropped == mean).float().mean()) - DROPOUT) < 0.02
