"""What a reader of pictures is asked, and which patches its words cite."""

import pytest

from sparsewsi.readers.choice import ReaderChoice
from sparsewsi.readers.pictures import Pictures, ReaderError, find_cited, lay_out_turns


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("Patch 5 shows fat.", (5,)),
        ("As in patch #9 and Patch 5, see (#1).", (9, 5, 1)),
        ("Patches 1, 5 and 9 agree.", (1, 5, 9)),
        ("patches 3-9", (9, 5)),
        ("**Patch 5:** fat. patch no. 9, patch number 1", (5, 9, 1)),
        ("Patch 5 and 9 mitoses", (5,)),
        ("Patch 7 is not there; there are 5 patches at 9x.", ()),
        ("The dispatch 5 of 1999", ()),
        ("Patch 50, &#5;", ()),
        ("", ()),
    ],
)
def test_a_citation_is_a_shown_patch_named_as_one(text, cited):
    assert sorted(find_cited(text, (9, 5, 1))) == sorted(cited)


def test_the_first_mention_comes_first():
    assert find_cited("Patch 9, then Patch 1, then Patch 9.", (1, 9)) == (9, 1)


def test_pictures_open_the_first_question_and_options_close_the_last(pictures):
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
    turns = lay_out_turns(pictures, [2], [*messages, {"role": "user", "content": "Two?"}], ["a", "b"])
    assert [role for role, _ in turns] == ["user", "assistant", "user"]
    assert turns[0][1][-3] == "Patch 1:"
    assert turns[0][1][-2] is pictures.patches[2]
    assert turns[0][1][-1] == "One?"
    assert list(turns[2][1]) == ["Two?\nA. a\nB. b"]


def test_without_patches_nothing_is_said_of_them():
    assert lay_out_turns(Pictures((), ()), [], [{"role": "user", "content": "What?"}]) == [("user", ["What?"])]


@pytest.mark.parametrize("name", ["", "gpt-4o", "hf:", "openai:", "llama:x"])
def test_a_reader_that_is_none_is_refused_in_words(name):
    with pytest.raises(ReaderError, match=r"--reader is hf:<id or folder> or openai:<model>, got"):
        ReaderChoice(name, "http://127.0.0.1/v1")


def test_no_host_is_assumed():
    with pytest.raises(ReaderError, match=r"needs a server: set SPARSEWSI_ENDPOINT"):
        ReaderChoice("openai:gpt-4o", key="sk-1")


def test_a_choice_never_shows_its_key():
    assert "sk-1" not in repr(ReaderChoice("openai:gpt-4o", "https://h.example/v1", "sk-1"))
