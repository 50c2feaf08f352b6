"""What a model can be asked, and what it says where it is not sure."""

import dataclasses

import pytest

from sparsewsi.model.limits import UNVALIDATED, Limit, Limits
from sparsewsi.report.answer import Answer, FocusEffect
from sparsewsi.report.scope import (
    find_place,
    find_target,
    is_guess,
    put_as_presence,
    suggest,
    within,
    word_answer,
    word_tendency,
)

LIMITS = Limits(
    kinds=(
        Limit("malignant", ("malignan",), 21, 18, 0.78, 0.6, 0.97, least=0.6),
        Limit("organ", (r"\borgan\b",), 21, 18, 0.44, 0.24, 0.68, least=0.55),
        Limit("carcinoma", ("carcinoma",), 22, 19, 0.77, 0.58, 0.95),
    ),
    vocabulary=("fat", "mucin"),
)


@pytest.mark.parametrize("question", ["What grade is it?", "Is the patient a smoker?", "Which stage?"])
def test_a_question_of_no_kind_that_was_trained_is_outside(question):
    assert not within(LIMITS, question)
    assert within(Limits(), question), "a model without limits sets no scope"


@pytest.mark.parametrize("question", ["What grade is the malignant tumour?", "How many mitoses has the malignancy?"])
def test_a_grade_is_another_question_than_whether_there_is_a_tumour(question):
    """Seen when it was tried: "What grade?" was answered with a kind of tumour."""
    assert not within(LIMITS, question)
    graded = dataclasses.replace(
        LIMITS, kinds=(dataclasses.replace(LIMITS.kinds[0], kind="grade", words=(r"grade|mitos",)),)
    )
    assert within(graded, question), "a model that was validated on it may"


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Is this malignant?", ()),
        ("Describe this slide.", ()),
        ("Is there fat?", ()),
        ("Which of these is present?", ("mucin", "blood")),
    ],
)
def test_a_question_about_its_kinds_or_words_is_inside(question, options):
    assert within(LIMITS, question, options)


def test_every_validated_kind_is_a_question_to_tap():
    assert [one.text for one in suggest(LIMITS)][:2] == ["Is this slide malignant?", "Which organ is this slide from?"]
    assert "78%" in suggest(LIMITS)[0].told


@pytest.mark.parametrize(
    ("question", "target"),
    [
        ("Where is the carcinoma?", "carcinoma"),
        ("Show me the mucin.", "mucin"),
        ("Is there carcinoma?", ""),
        ("Where was this tissue taken from?", ""),
    ],
)
def test_where_is_asks_for_a_place(question, target):
    assert find_target(question) == target


def test_what_can_be_pointed_at_is_a_question_of_presence():
    found = put_as_presence(LIMITS, "carcinoma")
    assert found is not None
    assert found.options == ("Yes", "No")
    assert put_as_presence(LIMITS, "mitoses") is None


def test_below_the_validated_threshold_both_likeliest_are_told():
    unsure = Answer("Is this malignant?", "No", ("Yes", "No", "Maybe"), (0.4, 0.55, 0.05))
    assert word_answer(unsure, LIMITS) == "Not sure: No or Yes"
    doubtful = Answer("Is this malignant?", "No", ("Yes", "No"), (0.45, 0.55))
    assert word_answer(doubtful, LIMITS) == "Not sure; perhaps: No"
    sure = Answer("Is this malignant?", "No", ("Yes", "No"), (0.2, 0.8))
    assert word_answer(sure, LIMITS) == "No"


def test_what_organ_is_this_is_never_told_for_certain_by_a_model_that_is_mostly_wrong():
    assert word_answer(Answer("What organ is this?", "colon mucosa"), LIMITS) == "Not sure; perhaps: colon mucosa"


@pytest.mark.parametrize(
    ("share", "told"), [(0.04, "Not sure; perhaps: Yes"), (0.4, "Not sure; perhaps: Yes"), (0.9, "Yes")]
)
def test_an_answer_in_words_is_as_sure_as_such_answers_are(share, told):
    limits = dataclasses.replace(LIMITS, kinds=(dataclasses.replace(LIMITS.kinds[0], least=0.9, sure=share),))
    assert word_answer(Answer("Is this malignant?", "Yes"), limits) == told


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            Answer("Is this malignant?", "No", ("Yes", "No"), (0.1, 0.9)),
            ("The slide does not decide it; perhaps: No", ""),
        ),
        (
            Answer("Is this malignant?", "No", ("Yes", "No"), (0.45, 0.55)),
            ("No answer: not sure, and the slide does not decide it", "Likelier: No (55%)"),
        ),
        (
            Answer("Is this malignant?", "No", ("Yes", "No"), (0.45, 0.55), asked="Where is it malignant?"),
            ("No answer: not sure, and the slide does not decide it", "Likelier: No (55%)"),
        ),
        (
            Answer("What organ is this?", "colon", ("colon", "skin", "liver"), (0.4, 0.35, 0.25)),
            ("No answer: not sure, and the slide does not decide it", "Likelier: colon (40%), skin (35%)"),
        ),
        (
            Answer("What organ is this?", "colon"),
            ("No answer: not sure, and the slide does not decide it", "What the model wrote: colon"),
        ),
        (
            Answer("Describe it.", "Carcinoma."),
            (
                "No answer: a guess, and the slide does not decide it",
                "What the model wrote, which is no finding: Carcinoma.",
            ),
        ),
    ],
)
def test_seen_a_bold_answer_that_does_not_rest_on_the_slide(answer, told):
    answer = dataclasses.replace(answer, effects=(0.1,), without_all=0.1)
    assert (word_answer(answer, LIMITS), word_tendency(answer, LIMITS)) == told
    rests = dataclasses.replace(answer, without_all=3.0)
    assert word_tendency(rests, LIMITS) == "", "where an answer is given it stands in the first line"


@pytest.mark.parametrize(
    "said", ["Foci of carcinoma and liver.", "Adenocarcinoma.", "Breast cancer", "A malignant tumour.", "LYMPHOMA"]
)
def test_seen_a_guess_of_cancer_that_read_as_a_finding(said):
    guess = Answer("Describe the slide", said, limit=UNVALIDATED, effects=(6.0,), without_all=5.8)
    assert word_answer(guess, LIMITS) == f"A guess, no finding: {said}"
    assert is_guess(guess, LIMITS)
    assert word_answer(dataclasses.replace(guess, text="Fat."), LIMITS) == "A guess: Fat."
    assert word_answer(dataclasses.replace(guess, text="Foci of"), LIMITS, begun=True).startswith("A guess, no finding")
    assert not is_guess(Answer("Is this malignant?", "No", ("Yes", "No"), (0.2, 0.8)), LIMITS)


def test_an_answer_that_is_not_weighed_says_so_and_one_of_no_validated_kind_is_a_guess():
    sure = Answer("Is this malignant?", "No", ("Yes", "No"), (0.1, 0.9), unweighed="It was stopped.")
    assert word_answer(sure, LIMITS) == "Not weighed; perhaps: No"
    assert word_answer(Answer("What grade is it?", "High."), LIMITS) == "A guess: High."
    assert word_answer(Answer("What grade is it?", "High."), Limits()) == "High.", "of a model without limits"
    assert word_answer(Answer("What grade is it?", "High.", reader="openai:m"), LIMITS) == "High.", "of another reader"


PLACE = Answer("Does it contain carcinoma?", "Yes", ("Yes", "No"), effects=(0.1, 0.9), asked="Where is the carcinoma?")


@pytest.mark.parametrize(
    ("yes", "without_all", "least", "told", "points"),
    [
        (0.9, 3.0, 0.6, "Here: #4", 4),
        (0.56, 3.0, 0.6, "Not sure (Yes: 56%), if anywhere: #4", 4),
        (0.9, 0.0, 0.6, "Here: #4", 4),  # one patch matters, which the others stand in for
        (0.3, 3.0, 0.6, "The model does not find carcinoma (Yes: 30%)", None),
        (0.45, 3.0, 0.6, "Not sure; the model does not find carcinoma (Yes: 45%)", None),
        (0.9, None, 0.6, "Not weighed (Yes: 90%), so nothing is pointed at", None),
    ],
)
def test_where_something_is_is_told_as_surely_as_it_is_known(yes, without_all, least, told, points):
    limits = Limits((dataclasses.replace(LIMITS.kinds[2], least=least),))
    answer = dataclasses.replace(PLACE, probs=(yes, 1 - yes), without_all=without_all)
    answer = answer if without_all is not None else dataclasses.replace(answer, effects=(), unweighed="Stopped.")
    assert word_answer(answer, limits, [7, 4]) == told
    assert find_place(answer, [7, 4]) == points


def test_seen_a_report_that_could_not_be_saved_as_a_patch_beside_has_no_number():
    limits = Limits((dataclasses.replace(LIMITS.kinds[2], least=0.6),))
    answer = dataclasses.replace(PLACE, probs=(0.56, 0.44), without_all=3.0, beside="2 random patches")
    assert word_answer(answer, limits) == "Not sure (Yes: 56%), if anywhere: one patch"


def test_nothing_is_pointed_at_that_does_not_rest_on_the_slide():
    answer = dataclasses.replace(PLACE, probs=(0.9, 0.1), effects=(0.1, 0.1), without_all=0.1)
    assert find_place(answer, [7, 4]) is None
    assert word_answer(answer, LIMITS, [7, 4]).startswith("The slide does not decide it (Yes: 90%)")


@pytest.mark.parametrize(
    ("without_all", "effects", "foci", "rests"),
    [
        (3.0, (0.1,), (), "strongly"),
        (0.1, (0.1,), (), "not"),
        (0.1, (0.1,), (FocusEffect("A", (1, 2), 1.0),), "partly"),
        (0.1, (3.0,), (), "strongly"),  # seen: "partly" beside 6 times, "strongly" beside none over 1.2
        (-3.0, (0.2,), (), "not"),
        (None, (), (), ""),
    ],
)
def test_how_far_an_answer_depends_on_the_patches_follows_the_largest_effect(without_all, effects, foci, rests):
    assert Answer("?", "No", effects=effects, without_all=without_all, foci=foci).rests == rests


def test_what_an_answer_depends_on_is_never_told_as_if_it_were_right():
    answer = Answer("?", "No", effects=(0.1, 0.2), without_all=3.0, foci=(FocusEffect("A", (1, 2), 1.0),))
    assert (
        answer.weighed
        == "Without all 2 patches it would be 20.1 times less likely, without focus A 2.72 times less likely."
    )
    assert answer.dependence.startswith("Depends on the patches: strongly (whether it is right is another question).")
    assert answer.weighed in answer.dependence
    assert dataclasses.replace(answer, without_all=None).dependence == ""


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Is there a malignancy in this lymph node?", "malignant"),
        ("Malignancy in these lymph nodes?", "malignant"),
        ("Is this sentinel node malignant?", "malignant"),
        ("Does this lymph node contain carcinoma?", "carcinoma"),
        ("Is there carcinoma in the liver?", "carcinoma"),
    ],
)
def test_seen_a_question_about_cancer_refused_for_the_name_of_its_site(question, kind):
    found = LIMITS.find(question)
    assert found is not None
    assert found.kind == kind
    assert within(LIMITS, question)
    assert not within(LIMITS, "How many nodes are malignant?")
    assert not within(LIMITS, "Is there a nodal metastasis of the malignancy?")
