"""Questions about real slides: only what was published, and nothing that gives the answer away."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from train.data.bank import Bank
from train.data.example import Question
from train.data.open_world import OpenWorld, absent_slides
from train.data.real import KINDS, SlideFacts, SlideStream, ask, describe, read_facts

COLUMNS = [
    "slide",
    "case",
    "role",
    "malignant",
    "carcinoma_present",
    "neoplasm",
    "organ_group",
    "category",
    "diagnosis",
    "list_note",
]


def write_csv(folder: Path, *rows: str) -> None:
    with (folder / "slides.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row.split("|") for row in rows)


def test_only_published_facts_are_told(tmp_path: Path) -> None:
    write_csv(
        tmp_path,
        "a|a|train|yes|unclear|yes|colon|unclear|tumour of some kind|carcinoma in the textbook",
        "celiac|celiac-disease|train|no|no|no|duodenum|inflammatory or infectious|celiac disease|",
    )
    first, second = read_facts(tmp_path)
    assert first.facts["malignant"] == "Yes"
    assert first.facts["carcinoma"] == ""
    assert ask(first, "carcinoma", [second], np.random.default_rng(0)) is None
    assert "textbook" not in str(first)
    assert second.role == "test"  # its labelled tiles are kept for testing


def slides() -> tuple[SlideFacts, ...]:
    def fact(name: str, malignant: str, organ: str) -> SlideFacts:
        facts = dict.fromkeys(KINDS, "") | {"malignant": malignant, "organ": organ, "diagnosis": f"disease of {name}"}
        return SlideFacts(name, name, "train", facts)

    organs = ("liver", "colon", "skin", "brain", "bone")
    return tuple(fact(f"s{i}", "Yes" if i < 2 else "No", organ) for i, organ in enumerate(organs))


def bank_of_slides() -> Bank:
    names = np.array([slide.slide for slide in slides()]).repeat(12)
    copies = np.tile(np.array(["0", "1"]).repeat(6), 5)
    return Bank(torch.arange(60.0)[:, None].half(), copies, names, "slides", "made-up")


def test_options_are_the_answer_and_facts_of_other_slides() -> None:
    question = ask(slides()[0], "organ", slides()[1:], np.random.default_rng(0))
    assert question is not None
    assert question.answer == "liver"
    assert len(set(question.options)) == 4
    assert "liver" in question.options


def test_half_of_the_slides_that_training_sees_are_malignant_whatever_their_number() -> None:
    stream = SlideStream(bank_of_slides(), slides(), 0)
    drawn = Counter(stream.draw(np.random.default_rng(i)).facts["malignant"] for i in range(400))
    assert 0.35 < drawn["Yes"] / 400 < 0.65


def test_an_example_depends_on_its_number_alone_and_holds_patches_of_one_slide() -> None:
    stream = SlideStream(bank_of_slides(), slides(), 0)
    first, again = stream.example(7, 4), stream.example(7, 4)
    assert torch.equal(first.features, again.features)
    assert first.questions == again.questions
    assert len({int(value) // 12 for value in first.features[:, 0]}) == 1
    assert len(first.features) <= 4
    assert first.num_patches == 6


def test_a_description_says_what_was_published_and_no_more() -> None:
    first = slides()[0]
    told = "Tissue of the liver with a malignant tumour."
    assert describe(first) == Question("Describe this slide.", told, (), "caption")
    unknown = replace(first, facts=dict.fromkeys(KINDS, ""))
    assert describe(unknown).answer == "Tissue."


def test_any_kind_may_be_background_and_slides_without_carcinoma_hold_none(bank: Bank) -> None:
    world = OpenWorld(bank, None, 0)
    backgrounds: set[str] = set()
    for i in range(40):
        mosaic = world.draw(100, (2, 4), np.random.default_rng(i))
        held = set(mosaic.kinds.tolist())
        assert mosaic.needles <= held
        assert ("carcinoma" in held) == ("carcinoma" in mosaic.facts.present)
        backgrounds |= held - mosaic.needles
    assert {"carcinoma", "lymphoid", "adipose"} <= backgrounds
    real = OpenWorld(bank, absent_slides(bank_of_slides(), ["s2", "s3"]), 0, of_slides=1.0)
    for i in range(20):
        assert {question.family for question in real.example(i, 64).questions} == {"diagnosis"}
