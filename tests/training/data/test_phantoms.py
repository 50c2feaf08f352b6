"""Whole phantoms as bags, and tumours asked for wherever the kinds of all patches are known."""

from pathlib import Path

import numpy as np
import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.phantom import write_phantom
from train.data.phantoms import Phantom, PhantomStream, load_phantoms, phantom_files
from train.data.real import YES_NO
from train.data.tumours import ask_tumours, tell_tumour


def make_phantom(*present: str) -> Phantom:
    """Sixty patches of stroma with a focus of four patches of each kind; patches beside it reach into its box."""
    kinds = np.full(60, "stroma_fibrous", dtype="<U20")
    near = {}
    for number, kind in enumerate(present):
        kinds[10 * number : 10 * number + 4] = kind
        near[kind] = np.isin(np.arange(60), range(10 * number, 10 * number + 6))
    coords = torch.tensor([[i % 8, i // 8] for i in range(60)], dtype=torch.int32) * 224
    bag = Bag(torch.arange(60.0)[:, None].half(), coords, 224, 0.5, "made-up", "phantom")
    return Phantom(bag, kinds, "stroma_fibrous", present, near)


def test_half_of_the_bags_hold_carcinoma_and_the_others_not_even_its_border() -> None:
    stream = PhantomStream((make_phantom("carcinoma", "mucin"), make_phantom("lymphoid")), 0)
    held = 0
    for i in range(200):
        phantom, rows, facts = stream.draw(40, np.random.default_rng(i))
        kinds = set(phantom.kinds[rows].tolist())
        assert len(rows) <= 40
        assert set(facts.present) == kinds - {"stroma_fibrous"}
        if "carcinoma" in facts.present:
            held += 1
        elif "carcinoma" in phantom.near:
            assert not phantom.near["carcinoma"][rows].any()
    assert 70 < held < 130


def test_what_is_asked_of_a_phantom_is_true_of_what_is_shown_and_depends_on_its_number_alone() -> None:
    stream = PhantomStream((make_phantom("carcinoma", "mucin"), make_phantom("lymphoid", "necrosis")), 3)
    for i in range(60):
        example, again = stream.example(i, 50), stream.example(i, 50)
        assert torch.equal(example.features, again.features)
        assert example.questions == again.questions
        assert 1 <= len(example.questions) <= 3
        for question in example.questions:
            if question.family in YES_NO:
                assert question.answer == ("Yes" if "carcinoma" in example.kinds else "No")


def test_a_written_phantom_knows_which_patches_reach_into_its_foci(tmp_path: Path) -> None:
    slide, cached = phantom_files(tmp_path, 1003)
    write_phantom(slide, seed=1003, size=2048)
    coords = torch.tensor([[x, y] for y in range(0, 1800, 224) for x in range(0, 1800, 224)], dtype=torch.int32)
    save_bag(Bag(torch.zeros(len(coords), 4).half(), coords, 224, 0.5, "made-up", "phantom-1003"), cached)
    [phantom] = load_phantoms(tmp_path, "train")
    assert set(phantom.near) == set(phantom.present) == {"carcinoma", "lymphoid", "necrosis"}
    for kind, near in phantom.near.items():
        assert near[phantom.kinds == kind].all()


def test_tumours_are_asked_for_where_the_kinds_tell() -> None:
    assert tell_tumour({"sarcoma", "adipose"}, "malignant") == "Yes"
    assert tell_tumour({"sarcoma", "adipose"}, "carcinoma") == "No"
    assert tell_tumour({"neuroendocrine_tumour"}, "malignant") == ""
    assert tell_tumour({"neuroendocrine_tumour", "carcinoma"}, "malignant") == "Yes"
    assert tell_tumour({"adenoma"}, "neoplasm") == "Yes"
    every = ask_tumours({"carcinoma"}, np.random.default_rng(0), every=True)
    assert [question.question for question in every] == [text for texts in YES_NO.values() for text in texts]
    assert {question.answer for question in every} == {"Yes"}
