"""What an artefact says of its own answers, and the words it has for patches."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsewsi.model import limits
from sparsewsi.model.limits import Limit, Limits
from sparsewsi.model.words import UNKNOWN, Words, find_nearest

MALIGNANT = Limit("malignant", ("malignan", r"\bcancer"), 10, 8, 0.8, 0.6, 0.95, 0.7, 0.9, 0.75)
TOLD = Limits((MALIGNANT,), ("liver", "mucin"), 0.4)


def test_a_kind_of_question_is_known_by_its_words() -> None:
    assert TOLD.find("Is there any MALIGNANCY here?") is MALIGNANT
    assert TOLD.find("does it hold cancer") is MALIGNANT
    assert TOLD.find("Which organ is this?") is None


def test_an_answer_comes_with_what_validation_found() -> None:
    assert TOLD.judge("Is it malignant?", [0.4, 0.6]).startswith("Not sure")
    never = Limits((replace(MALIGNANT, least=1.0),))
    assert "100%" not in never.judge("Is it malignant?", [0.1, 0.9])
    assert never.judge("Is it malignant?", [0.1, 0.9]).startswith("Not sure: likely answers")
    assert TOLD.judge("Is it malignant?", [0.1, 0.9]).startswith(
        "An option has 70% or more, as in 75% of such questions: of these answers 90% were right, by case, on 10 slides"
    )
    assert "80% were right, by case," in TOLD.judge("Is it malignant?"), "which is not 8 of 10 slides"
    assert "by case (60% to 95%" in TOLD.judge("Is it malignant?", [0.4, 0.6])
    assert "not validated" in TOLD.judge("How old is the patient?", [0.5, 0.5])
    assert Limits().judge("Is it malignant?") == ""


@pytest.mark.parametrize(
    ("question", "options", "validated"),
    [
        ("Is there cancer?", (), True),
        ("Is there cancer?", ("No", "Yes"), True),
        ("Cancer?", (), True),
        ("Is there cancer in this lymph node?", (), True),
        ("Cancer in this liver?", (), True),
        ("Is there cancer in these lymph nodes?", (), True),
        ("Are lymph nodes involved by cancer?", (), False),  # elsewhere in the patient
        ("How many lymph nodes have cancer?", (), False),
        ("Are the nodes positive for cancer?", (), False),
        ("Can you say whether this is cancer?", (), True),
        ("What grade is the cancer?", (), False),
        ("Name the cancer that this is.", (), False),
        ("Can you grade the cancer?", (), False),
        ("Are the margins free of cancer?", (), False),
        ("Is this cancer?", ("lymphoma", "melanoma"), False),
    ],
)
def test_what_was_validated_with_yes_and_no_tells_nothing_of_other_questions(question, options, validated) -> None:
    told = Limits((dataclasses.replace(MALIGNANT, found=0.4),))
    assert (told.find(question, options) is not None) == validated
    assert ("not validated" in told.judge(question, options=options)) != validated


def test_limits_survive_their_file_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert limits.load(tmp_path) == Limits()
    TOLD.save(tmp_path)
    assert limits.load(tmp_path) == TOLD
    (tmp_path / limits.FILE).write_text(json.dumps({"kinds": [{"words": ["("]}], "vocabulary": [], "alike": 0}))
    with pytest.raises(ValueError, match="is damaged"):
        limits.load(tmp_path)


def test_a_patch_that_is_near_no_word_has_none() -> None:
    table = torch.eye(3)[:2]
    nearest, cosine = find_nearest(torch.tensor([[2.0, 0, 0], [0.1, 1, 0], [0, 0, 5]]), table, 0.4)
    assert nearest.tolist() == [0, 1, -1]
    assert cosine[2] == 0
    words = Words(("liver", "mucin"), torch.tensor([0, 0, -1, 1]), torch.ones(4))
    assert words.shares == {"liver": 0.5, UNKNOWN: 0.25, "mucin": 0.25}
