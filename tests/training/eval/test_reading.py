"""What a written answer chose; the right answer is never looked at."""

import pytest

from train.eval.reading import add_readings, lenient_choice, strict_choice
from train.eval.scoring import add_majority, score_rows

TISSUES = ("carcinoma in situ", "invasive carcinoma", "carcinoma", "fat")


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("B", "invasive carcinoma", "invasive carcinoma"),
        ("(D)", "fat", "fat"),
        ("Fat.", "fat", "fat"),
        ("D. fat", "fat", "fat"),
        ("A. fat", None, None),  # letter and text disagree
        ("A biopsy shows fat", None, "fat"),  # an article is no option
        ("A biopsy of the breast.", None, None),
        ("The answer is A biopsy of the breast.", None, None),
        ("The answer is B-cell lymphoma.", None, None),
        ("Option A is right.", None, "carcinoma in situ"),
        ("The correct answer is: (D)", None, "fat"),
        ("D, because of the vacuoles", None, "fat"),
        ("This is invasive  carcinoma, I think.", None, "invasive carcinoma"),  # not "carcinoma" inside it
        ("There is fat, and carcinoma.", None, None),
        ("fatty liver", None, None),
        ("E", None, None),
        ("", None, None),
    ],
)
def test_readings_of_a_text(text: str, strict: str | None, lenient: str | None) -> None:
    assert strict_choice(text, TISSUES) == strict
    assert lenient_choice(text, TISSUES) == lenient


CARCINOMAS = ("ductal carcinoma", "lobular carcinoma", "mucinous carcinoma")


@pytest.mark.parametrize(
    "text",
    [
        "b.",
        "(b)",
        "b",
        "The answer is b",
        "Answer: (b)",
        "choice b",
        "**B**",
        "**Answer:** B",
        "\\boxed{B}",
        "[B]",
        '"B"',
        "B is correct",
        "It's B",
        "B) lobular carcinoma, of course",
        "The answer is B because of the cells",
    ],
)
def test_a_letter_is_read_however_it_is_dressed(text: str) -> None:
    assert lenient_choice(text, CARCINOMAS) == "lobular carcinoma"


@pytest.mark.parametrize(
    "text",
    [
        *("A, B", "A, B and C", "A) or B)", "Option A is wrong, option B is right", "B. ductal carcinoma"),
        *("A. ductal carcinoma\nB. lobular carcinoma", "Not lobular carcinoma.", "ductal or lobular carcinoma, A or B"),
    ],
)
def test_what_can_be_read_in_two_ways_chooses_nothing(text: str) -> None:
    assert lenient_choice(text, CARCINOMAS) is None


@pytest.mark.parametrize(
    ("options", "text", "chosen"),
    [
        (("HER2+", "HER2-"), "The tumour is HER2-.", "HER2-"),
        (("HPV+", "HPV-"), "It is HPV-", "HPV-"),
        (("ER+/PR+", "ER-/PR-"), "It is ER-/PR-", "ER-/PR-"),
        (("<50%", ">50%"), "It is > 50 %.", ">50%"),
        (("2+", "3+", "2-"), "The score is 2-", "2-"),
        (("well-differentiated", "poor"), "It is well differentiated.", "well-differentiated"),
        (("fat", "Fat."), "It is fat, I think", None),
    ],
)
def test_signs_count(options: tuple[str, ...], text: str, chosen: str | None) -> None:
    assert lenient_choice(text, options) == chosen


def test_a_letter_that_is_also_an_options_text_chooses_nothing_strictly() -> None:
    assert strict_choice("A", ("B", "A")) is None
    assert strict_choice("B. A", ("B", "A")) == "A"
    assert strict_choice("B", ("x", "", "z")) is None  # an empty option cannot be chosen
    assert lenient_choice("", ("+", "-")) is None


def test_readings_become_rows() -> None:
    record = {"number": 0, "slide": "s", "family": "", "answer": "fat", "options": list(TISSUES), "n": 9, "detail": ""}
    records = [record | {"all text": "It is fat"}, record | {"all text": "D"}, record]
    assert add_readings(records, ("learned", "all")) == ["all, strict", "all, lenient"]
    add_majority(records)
    table = score_rows(records, ("all, strict", "all, lenient"))
    assert [(score.right, score.n) for score in table.values()] == [(1, 2), (2, 2), (3, 3)]
