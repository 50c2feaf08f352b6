"""What is said of a phantom is true of it."""

import re
from dataclasses import replace

import torch

from sparsewsi.bags.bag import Bag, join
from sparsewsi.model.selection import Selection
from sparsewsi.phantom import ground_truth
from sparsewsi.report.phantom import PRESENT_QUESTION, QUESTIONS, choose_questions, describe_truths, name_kind


def test_the_truth_of_a_phantom_is_told_and_of_a_real_slide_nothing():
    truth = ground_truth(3, 2048)
    place = torch.arange(16)
    bag = Bag(torch.zeros(16, 8), torch.stack([place % 4, place // 4], 1) * 224, 224, 0.5, "unknown", "phantom 3")
    selection = Selection(torch.arange(5), torch.arange(16.0), torch.zeros(5, 4), 16)
    text = describe_truths([truth], bag, selection)
    assert name_kind(truth.dominant) in text
    assert all(name_kind(kind) in text for kind in truth.present)
    assert "The model's own 5 patches" in text
    assert describe_truths([None], bag, selection) == ""
    case = join([bag, replace(bag, slide="b"), replace(bag, slide="c")])
    both = describe_truths([truth, None, truth], case, selection)
    assert re.findall(r"Slide (\d)|own (\d) patches", both) == [("1", ""), ("", "5"), ("3", ""), ("", "0")]


def test_one_option_of_a_phantoms_own_question_is_right():
    truth = ground_truth(3, 2048)
    question, options = choose_questions([truth])[-1]
    assert question == PRESENT_QUESTION
    present = {name_kind(kind) for kind in truth.present}
    assert [option for option in options if option in present] == [name_kind(truth.present[0])]
    assert choose_questions([None]) == list(QUESTIONS)
