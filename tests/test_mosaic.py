"""Mosaics: ground truth that holds, questions that only the slide can answer."""

from collections import Counter

import numpy as np
import pytest
import torch

from train.mosaic import (
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
    lay_out,
    plan,
)


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


def test_a_training_example_depends_on_its_number_only(bank: Bank) -> None:
    one, other = MosaicStream((bank,), 3, stage=2), MosaicStream((bank,), 3, stage=2)
    other.example(0, 64)
    a, b = one.example(7, 64), other.example(7, 64)
    assert torch.equal(a.features, b.features)
    assert a.questions == b.questions
    assert torch.equal(a.indices, a.indices.unique())
    assert int(a.indices[-1]) < a.num_patches
