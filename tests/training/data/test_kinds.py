"""Questions about known content: answers are true, and nothing is answerable from the text."""

from collections import Counter

import numpy as np

from train.data.kinds import FAMILIES, WORDS, ask, plan_facts, write_caption


def test_answers_are_true_and_distractors_false() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        family = FAMILIES[seed % len(FAMILIES)]
        facts = plan_facts("real", family, rng)
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
        described = write_caption(facts).answer.removeprefix("Foci of ").rstrip(".").replace(" and ", ", ")
        assert set(described.split(", ")) == present


def test_nothing_is_answerable_from_the_text() -> None:
    """The best answer from question and options alone stays near chance, and the right place is uniform."""
    for family in FAMILIES:
        answers, places, offered = Counter(), Counter(), Counter()
        n = 2000
        for i in range(n):
            rng = np.random.default_rng((5, i))
            question = ask(plan_facts("real", family, rng), family, rng)
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
