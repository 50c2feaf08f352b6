"""report.html holds all that it shows, and shows words as words."""

import dataclasses
import re

import numpy as np
import torch
from PIL import Image

from sparsewsi.bags.bag import Bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.limits import UNVALIDATED, Limit, Limits
from sparsewsi.report import html
from sparsewsi.report.answer import Answer, FocusEffect
from sparsewsi.report.record import digest_patches
from sparsewsi.web.chat import show_evidence

HOSTILE = '<script>alert(1)</script> ![x](http://evil.example/x.png) "quoted" & <img src=x onerror=alert(2)>'


def report(folder, bag, selection, **changes) -> str:
    given = {
        "model": "demo-model",
        "overviews": [Image.new("RGB", (40, 30))],
        "patches": [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(1, 4)],
        "weights_sha256": "ab" * 32,
    }
    html.write_report(folder / "r.html", bag, selection, SparseWSIConfig(demo=True), **given | changes)
    return (folder / "r.html").read_text()


def test_the_report_holds_all_that_it_shows_and_says_what_it_is(tmp_path, bag, selection):
    answer = Answer("Which?", "fat", ("fat", "mucin"), (0.75, 0.25), (0.0, 2.0, -1.0), "Without patch #2 less.")
    text = report(tmp_path, bag, selection, answers=[answer], doubts=["Rank 4 is as good as rank 3."])
    pictures = re.findall(r'src="(.{30})', text)
    assert len(pictures) == 7, "the overview, the kept patches, and those that the answer rests on"
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    assert "default-src 'none'" in text
    for part in (
        *("Demo model, research use only, not for diagnosis.", "slide 0a1b2c3d", "demo-model", "ab" * 32),
        *(
            "efficientnet-lite0",
            "3 of 5",
            "0.25 µm/px (stated in the file)",
            "400 x 300 px (0.1 x 0.075 mm)",
            "Rank 4 is as good",
        ),
        *(digest_patches(bag), "Which?", "75.0%", "Without patch #2 less.", f"torch {torch.__version__}"),
        "x 62, y 38 µm",  # the centre of the third patch
    ):
        assert part in text, part
    assert text.count("not for diagnosis") == 2
    assert re.findall(r'<figure id="patch-(\d)">', text) == ["1", "2", "3"], "by score"
    assert re.findall(r'<a href="#patch-(\d)"><img', text) == ["2", "1", "3"], "pictures beside the answer"
    assert re.findall(r'<a href="#patch-(\d)">#', text) == ["2", "1", "3"], "by evidence"
    assert text.index("fat</p>") < text.index('class="overview"'), "the answer comes first"
    assert "Q1: 7.39, evidence rank 1" in text


def test_seen_a_report_that_printed_another_question_than_the_readers(tmp_path, bag, selection):
    put = "Does this slide contain carcinoma?"
    where = Answer(put, "Yes", ("Yes", "No"), (0.9, 0.1), (0.0, 2.0, -1.0), without_all=3.0, asked="Where's it?")
    text = report(tmp_path, bag, selection, answers=[where])
    assert "<b>Q1. Where&#x27;s it?</b>" in text
    assert f"Put to the model as: {put}" in text
    assert "Here: #2" in text


def test_seen_pictures_in_the_report_of_an_answer_that_does_not_rest_on_the_slide(tmp_path, bag, selection):
    answer = Answer("Which?", "fat", effects=(0.1, 0.1, 0.1), without_all=0.1)
    text = report(tmp_path, bag, selection, answers=[answer])
    assert "The slide does not decide it; perhaps: fat" in text
    assert "Depends on the patches: not (whether it is right is another question)." in text
    assert not re.findall(r'<a href="#patch-(\d)"><img', text)


def test_a_guess_is_told_as_one_before_what_was_measured_of_it(tmp_path, bag, selection):
    limits = Limits((Limit("malignant", ("malignan",), 21, 18, 0.8, 0.6, 0.9),))
    guess = Answer("Describe it.", "Carcinoma.", effects=(5.0, 0.1, 0.1), without_all=5.0, limit=UNVALIDATED)
    text = report(tmp_path, bag, selection, answers=[guess], limits=limits)
    order = ('said guess">A guess, no finding: Carcinoma.', UNVALIDATED, "Depends on the patches: strongly", "<img")
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert text.count(UNVALIDATED) == 1


def test_page_and_report_say_the_same_of_what_an_answer_depends_on(tmp_path, bag, selection):
    """Seen: 1.72 times on the page, "as readily" in the report, and none of the foci."""
    foci = (FocusEffect("E", (1, 2), 5.76),)
    answer = Answer("Which?", "fat", effects=(0.1, 2.0, 0.1), without_all=0.54, foci=foci)
    (shown,) = show_evidence(answer, selection)
    told = "Without all 3 patches it would be 1.72 times less likely, without focus E 317 times less likely."
    assert told in shown
    text = report(tmp_path, bag, selection, answers=[answer])
    assert told in text
    assert text.count("<br>focus E<br>") == 2, "seen: a focus that the report named and never showed"
    assert 'E (<a href="#patch-1">#1</a> · <a href="#patch-2">#2</a>)' in text


def test_answers_that_contradict_each_other_and_questions_that_were_refused_are_in_the_report(tmp_path, bag, selection):
    answers = [
        Answer("Is this malignant?", "No"),
        Answer("Describe it.", "A carcinoma."),
        Answer("Which organ?", "Col", refused="Stopped; the evidence was not weighed."),
        Answer("What Gleason grade?", "", ("3", "4"), impression="4 & more", refused="This model cannot answer that."),
    ]
    text = report(tmp_path, bag, selection, answers=answers)
    assert text.index("contradict each other") < text.index("Q1.")
    assert "Stopped; the evidence was not weighed. Until then the model had said: Col" in text
    assert "Q4. What Gleason grade?" in text
    assert "Refused, not put to the model: This model cannot answer that." in text
    assert "4 &amp; more" in text
    assert "contradict" not in report(tmp_path, bag, selection, answers=answers[1:])


def test_an_answer_from_other_patches_is_told_as_such_and_its_evidence_is_no_patch_of_this_report(
    tmp_path, bag, selection
):
    other = Answer("Which?", "mucin", effects=(5.0, 0.0), without_all=3.0, evidence="Rests.", beside="2 random patches")
    text = report(tmp_path, bag, selection, answers=[Answer("Which?", "fat"), other])
    assert text.index(">fat</p>") < text.index("Answered from 2 random patches") < text.index(">mucin</p>")
    assert "evidence rank" not in text
    assert not re.findall(r'<a href="#patch-(\d)">', text)


def test_words_in_the_report_are_inert(tmp_path, bag, selection):
    answer = Answer(HOSTILE, HOSTILE, (HOSTILE,), (1.0,), (), HOSTILE)
    odd = dataclasses.replace(bag, note=HOSTILE, slide=HOSTILE)
    text = report(tmp_path, odd, selection, answers=[answer], doubts=[HOSTILE], model=HOSTILE)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert not re.findall(r'(?:src|href)="(?!data:image/jpeg|#patch-)', text)
    assert text.count("&lt;script&gt;") >= 7


def test_a_report_without_the_slide_has_no_patch_pictures(tmp_path, bag, selection):
    unknown = Bag(bag.features, bag.coords, 100, None, bag.encoder, bag.slide)
    text = report(tmp_path, unknown, selection, patches=())
    assert text.count("<img") == 1
    assert "x 250, y 150 px" in text
    assert "resolution unknown" in text


def test_seen_white_squares_printed_as_evidence_without_a_word(tmp_path, bag, selection):
    short = dataclasses.replace(bag, slide_size=(400, 140))  # 60 of 100 px of the lower patches lie beyond it
    answer = Answer("Which?", "fat", effects=(0.0, 2.0, -1.0), without_all=3.0)
    tissue, glass = np.full((8, 8, 3), 120, np.uint8), np.full((8, 8, 3), 243, np.uint8)
    text = report(tmp_path, short, selection, answers=[answer], patches=[glass, tissue, tissue])
    assert re.findall(r"#(\d): [\d.]+×, (mostly \w+)", text) == [
        ("2", "mostly beyond"),
        ("1", "mostly white"),
        ("3", "mostly beyond"),
    ]
    assert text.count("mostly beyond the scan") == 4, "as evidence, and among all patches"
    plain = report(tmp_path, bag, selection, answers=[answer], patches=[tissue, tissue, tissue])
    assert "mostly" not in plain


def test_a_report_says_whether_its_case_was_named(tmp_path, bag, selection):
    assert "This case was not named" in report(tmp_path, bag, selection)
    assert "not named" not in report(tmp_path, bag, selection, called="Case 7")
