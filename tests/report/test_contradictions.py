"""Answers about one selection that cannot all be right are told, by name."""

import dataclasses

import pytest

from sparsewsi.report.answer import Answer
from sparsewsi.report.contradictions import LADDER, contradict, find_claims, word_against, word_contradictions

MALIGNANT = Answer("Is this malignant?", "No", ("Yes", "No"), (0.4, 0.6))
DESCRIBED = Answer("Describe the slide", "Foci of carcinoma and liver.")
CATEGORIES = ("inflammation or infection", "another non-neoplastic change", "benign tumour or precursor", "carcinoma")


def test_seen_four_answers_about_one_slide_that_did_not_agree():
    told = word_contradictions(
        [
            MALIGNANT,
            Answer("Which organ is this?", "skin"),
            Answer("is cancer have this picture or not pls", "Yes", ("Yes", "No"), (0.6, 0.4)),
            Answer("Is there a neoplasm in this slide?", "No", ("Yes", "No"), asked="where is the tumour?"),
            DESCRIBED,
        ]
    )
    for named in (
        "Is this malignant?",
        "or not pls",
        "where is the tumour?",
        "Describe the slide",
        "Foci of carcinoma",
    ):
        assert named in told
    assert "organ" not in told
    assert told.endswith(".")


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("Does this slide contain carcinoma?", "Yes"),
        ("What kind of disease is it?", "carcinoma"),
        ("Describe it.", "Colon with an adenocarcinoma, no necrosis."),
        ("What is it?", "Malignant melanoma."),
        ("Is there cancer?", "Yes, there is."),
    ],
)
def test_a_tumour_by_any_name_contradicts_that_nothing_is_malignant(question, said):
    assert contradict(Answer(question, said), MALIGNANT)
    assert contradict(MALIGNANT, Answer(question, said)), "both ways"


@pytest.mark.parametrize(
    "other",
    [
        Answer("Is there a neoplasm in this slide?", "Yes"),
        Answer("Does this slide contain carcinoma?", "No"),
        Answer("Describe it.", "A benign tumour of the skin."),
        Answer("Describe it.", "Skin without carcinoma."),
        Answer("What kind of disease is it?", "inflammation or infection", CATEGORIES),
        Answer("What grade is the carcinoma?", "Yes"),
        Answer("Is it benign or malignant?", "Yes"),
        Answer("Is this benign?", "Yes"),
    ],
)
def test_what_can_be_true_beside_that_nothing_is_malignant_does_not_contradict_it(other):
    assert not contradict(other, MALIGNANT)


def test_a_no_denies_what_was_asked_for_alone():
    assert find_claims(Answer("Is there squamous cell carcinoma?", "No")) == {}
    assert find_claims(Answer("Is there a lymphoma?", "No")) == {}
    assert find_claims(Answer("Is there a tumour?", "No")) == dict.fromkeys(LADDER, False)
    assert find_claims(Answer("Is this malignant?", "Yes")) == {"malignant": True, "neoplasm": True}


@pytest.mark.parametrize("chosen", ["inflammation or infection", "another non-neoplastic change"])
def test_a_category_without_a_tumour_contradicts_one(chosen):
    assert contradict(Answer("What kind of disease is it?", chosen, CATEGORIES), DESCRIBED)
    assert not contradict(Answer("Describe it.", "Mucosa with inflammation."), DESCRIBED), "which may lie beside it"


def test_only_answers_about_the_same_patches_are_held_against_each_other():
    beside = dataclasses.replace(DESCRIBED, beside="8 random patches")
    assert word_contradictions([MALIGNANT, beside]) == ""
    assert word_against(beside, [MALIGNANT]) == ""
    assert word_contradictions([MALIGNANT, Answer("What grade?", "", refused="No.")]) == ""
    assert word_contradictions([]) == ""


def test_of_one_answer_only_those_that_it_contradicts_are_named():
    clear = Answer("Does this slide contain carcinoma?", "No")
    assert "carcinoma?" in word_against(DESCRIBED, [MALIGNANT, clear])
    assert word_against(clear, [MALIGNANT]) == ""
    long = dataclasses.replace(DESCRIBED, text="carcinoma " * 200)
    assert len(word_contradictions([MALIGNANT, long])) < 400
