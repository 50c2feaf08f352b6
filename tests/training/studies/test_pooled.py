"""The criterion that chooses a model: kinds, cases and answers count alike."""

from typing import Any

import numpy as np

from train.studies.pooled import (
    fit_shift,
    resample_cases,
    score,
    score_kind,
    share_right,
    shift_left_out,
    tumour_questions,
)


def record(domain: str, case: str, kind: str, answer: str, yes: float) -> dict[str, Any]:
    return {
        "domain": domain,
        "case": case,
        "kind": kind,
        "answer": answer,
        "options": ["Yes", "No"],
        "probs": [yes, 1 - yes],
    }


def test_a_case_with_many_questions_counts_as_one_with_few_and_yes_as_no() -> None:
    records = [record("slides", "a", "carcinoma", "No", 0.1) for _ in range(9)]
    records += [record("slides", "b", "carcinoma", "No", 0.9), record("phantoms", "a", "carcinoma", "Yes", 0.9)]
    assert share_right([each for each in records if each["answer"] == "No"]) == 0.5
    assert score_kind(records, "carcinoma") == 0.75
    others = [record("mosaics", "m", "contains", answer, 0.8) for answer in ("Yes", "No")]
    assert score(records + others) == (0.75 + 0.5) / 2


def test_resamples_are_drawn_within_each_domain_and_are_the_same_for_the_same_cases() -> None:
    records = [record("slides", name, "carcinoma", "Yes", 0.9) for name in "ab"]
    records += [record("phantoms", name, "carcinoma", "Yes", 0.1) for name in "cd"]
    drawn = resample_cases(records, lambda some: share_right(some), 20)
    assert np.allclose(drawn, 0.5)
    counted = resample_cases(records, lambda some: float(len({each["case"][0] for each in some})), 20)
    assert counted.min() < 4 <= counted.max()
    assert np.array_equal(counted, resample_cases(records, lambda some: float(len({e["case"][0] for e in some})), 20))


def test_tumours_of_kinds_that_training_has_not_seen_are_not_asked_for() -> None:
    rng = np.random.default_rng(0)
    assert tumour_questions({"lymphoma", "adipose"}, rng) == []
    assert {question.answer for question in tumour_questions({"carcinoma", "adipose"}, rng)} == {"Yes"}


def test_a_shift_makes_up_for_a_leaning_and_is_not_fitted_on_the_case_it_answers() -> None:
    leaning = [record("slides", f"yes {i}", "carcinoma", "Yes", 0.4) for i in range(6)]
    leaning += [record("slides", f"no {i}", "carcinoma", "No", 0.1) for i in range(3)]
    assert score_kind(leaning, "carcinoma") == 0.5
    assert 0.4 < fit_shift(leaning) < 2.2
    assert score_kind(shift_left_out(leaning), "carcinoma") == 1
    odd = [*leaning, record("slides", "odd", "carcinoma", "No", 0.3)]
    assert fit_shift(odd[:-1]) != fit_shift(odd)
