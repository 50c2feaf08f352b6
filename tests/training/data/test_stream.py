"""Layouts hold what they promise, and training examples depend on their number only."""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from train.data.bank import Bank
from train.data.kinds import BACKGROUNDS, FAMILIES, NEEDLES, WORDS, Facts, Vocabulary
from train.data.layout import lay_out
from train.data.stream import MosaicStream, ask_in_turn


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
    for bag, kinds, _ in ask_in_turn(bank, 8, 100, seed=0):
        assert (bank.kinds[bag.features[:, 0].long().numpy()] == kinds).all()


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


def test_of_classes_without_carcinoma_nothing_asks_for_it(bank: Bank, registry: None) -> None:
    needles = {kind: WORDS[kind] for kind in NEEDLES["real"] if kind != "carcinoma"}
    Vocabulary("normal", needles, {kind: WORDS[kind] for kind in BACKGROUNDS["real"]}).register()
    normal = replace(bank, origin="normal")
    asked = [(question, kinds) for _, kinds, question in ask_in_turn(normal, 8, 60, seed=0)]
    stream = MosaicStream((normal,), 0, stage=2)
    for example in (stream.example(number, 60) for number in range(20)):
        asked += [(question, example.kinds) for question in example.questions]
    assert {question.family for question, _ in asked} >= set(FAMILIES) - {"diagnosis"}
    assert not any(question.family == "diagnosis" or "carcinoma" in kinds for question, kinds in asked)
