"""Exchanges before a question: which are asked, and what is counted."""

from train.data.example import Question
from train.studies.turns import one_wording, table_of_turns


def test_of_every_kind_one_wording_is_asked_and_of_tissues_all() -> None:
    asked = [
        Question("Is it malignant?", "Yes", ("Yes", "No"), "malignant"),
        Question("Is there cancer?", "Yes", ("Yes", "No"), "malignant"),
        Question("Does this slide contain mucin?", "Yes", ("Yes", "No"), "contains"),
        Question("Does this slide contain blood?", "No", ("Yes", "No"), "contains"),
    ]
    assert one_wording(asked) == [asked[0], asked[2], asked[3]]


def test_the_table_says_how_many_answers_earlier_exchanges_cost() -> None:
    right, wrong = [0.8, 0.2], [0.3, 0.7]
    asked = {"kind": "malignant", "options": ["Yes", "No"], "answer": "Yes"}
    lines = [
        {"case": case, "asked": [asked | {"probs": [right, right, wrong]}, asked | {"probs": [right, wrong, wrong]}]}
        for case in ("a", "b")
    ]
    _, _, none, one, two = table_of_turns(lines).splitlines()
    assert "100.0%" in none
    assert "-50.0 (-50.0 to -50.0)" in one
    assert "50%" in one.split("|")[-2]
    assert "-100.0" in two
