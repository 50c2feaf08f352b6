"""Evaluation: the score of an option is the model's own, tables count right, a stopped run goes on."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import load_llm
from sparsewsi.model.sparse_wsi import SparseWSI
from train.command import alone_in
from train.data.packing import FeatureFolder, Question, Record, evenly, visible
from train.eval.scoring import (
    add_readings,
    intervals_of,
    lenient_choice,
    majority,
    markdown,
    picture,
    strict_choice,
    summary,
    wilson,
)
from train.evaluate import Item, Prefix, data_items, evaluate, main, option_log_likelihoods, selection_of, worded

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tiny_llm: Path) -> SparseWSI:
    torch.manual_seed(0)
    llm, tokenizer = load_llm(str(tiny_llm), dtype=torch.float32)
    config = SparseWSIConfig(llm=str(tiny_llm), encoder="made-up", feature_dim=12, dim=16, num_tokens=4, heads=4)
    return SparseWSI(config, llm, tokenizer).eval()


@pytest.fixture
def items() -> list[Item]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(6):
        coords = torch.stack([torch.arange(9) % 3, torch.arange(9) // 3], 1).int() * 224
        bag = Bag(torch.randn(9, 12, generator=generator).half(), coords, 224, 0.5, "made-up", f"slide {i // 2}")
        kinds = np.array(["adipose"] * 8 + ["mucin"])
        made.append(Item(bag, kinds, Question("Which tissue?", "mucin", ("fat", "mucin", "a lymph node"), "present")))
    return made


def test_questions_that_share_a_prefix_score_as_alone(model: SparseWSI, items: list[Item]) -> None:
    x = model.encode(items[0].bag.features)
    prefix = Prefix()
    for question in (items[0].question, Question("Does it?", "No", ("Yes", "No")), items[0].question):
        alone = option_log_likelihoods(model, x, torch.arange(9), 9, question)
        shared = option_log_likelihoods(model, x, torch.arange(9), 9, question, prefix=prefix)
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert prefix.cache.get_seq_length() == len(prefix.position_ids)


def test_packed_option_scores_are_the_models_own(model: SparseWSI, items: list[Item]) -> None:
    selection = model.select(items[0].bag)
    question = items[0].question
    packed = option_log_likelihoods(
        model, selection.tokens, selection.indices, selection.num_patches, question
    ).softmax(0)
    torch.testing.assert_close(packed, model.option_probs(selection, question.question, question.options))
    assert packed.max() - packed.min() > 1e-4


def test_wilson_interval_is_the_known_one() -> None:
    low, high = wilson(48, 79)  # the starred WSI-VQA set: 60.76 %, interval 50 to 71
    assert low == pytest.approx(0.497, abs=2e-3)
    assert high == pytest.approx(0.708, abs=2e-3)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_a_stopped_evaluation_goes_on_and_counts_once(model: SparseWSI, items: list[Item], tmp_path: Path) -> None:
    rows = ("learned", "random", "all", "text-only")
    whole = evaluate(model, iter(items), 6, rows, None, tmp_path / "whole.jsonl")
    broken = tmp_path / "broken.jsonl"
    evaluate(model, iter(items[:2]), 6, rows, None, broken)
    with broken.open("a") as log:
        log.write('{"number": 2, "lear')  # killed while it wrote
    evaluate(model, iter(items), 6, ("learned",), None, broken)
    assert evaluate(model, iter(items), 6, rows, None, broken) == whole
    assert len(broken.read_text().splitlines()) == 2 + 1 + 4 + 4  # whole, cut off, learned only, the rest
    table = summary(majority_of(whole), rows)
    assert table["majority"]["right"] == 6
    assert table["learned"]["right"] == sum(record["learned"] == "mucin" for record in whole)
    assert table["learned"]["slides"] == 3
    assert "| learned |" in markdown(table)


def majority_of(records: list[dict]) -> list[dict]:
    majority(records)
    return records


def test_text_only_sees_no_patch(model: SparseWSI, items: list[Item], tmp_path: Path) -> None:
    other = [replace(item, bag=replace(item.bag, features=item.bag.features * -3)) for item in items]
    one = evaluate(model, iter(items), 6, ("text-only",), None, tmp_path / "a.jsonl")
    two = evaluate(model, iter(other), 6, ("text-only",), None, tmp_path / "b.jsonl")
    assert [r["text-only"] for r in one] == [r["text-only"] for r in two]
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["n"] == 9
    assert selection_of(model, items[0].bag, "text-only", None, 0).num_patches == 0  # the same positions for any N


def test_a_question_after_a_prefix_needs_only_its_own_rows_of_the_mask() -> None:
    bag, question = torch.tensor([0] * 6 + [1] * 4), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 1, 2])
    whole = visible(bag, question)
    assert torch.equal(visible(bag, question, slice(4, None)), whole[4:])
    assert whole[5].tolist() == [True, True, False, False, True, True, False, False, False, False]


def test_patches_left_out_by_max_patches_keep_their_places(flags: list[str], tmp_path: Path) -> None:
    model = SparseWSI.from_pretrained(tmp_path / "model")
    slide, n = next((slide, n) for slide, n in COHORT.items() if n > 100)
    record = Record((slide,), Question("Which grade?", "high", ("low", "high")))
    [item] = data_items([record], FeatureFolder(tmp_path / "features"), model.config, max_patches=20)
    selection = selection_of(model, item.bag, "learned", None, 0)
    placed = item.placed(selection)
    assert len(item.bag.features) == 20
    assert placed.num_patches == n
    assert torch.equal(placed.indices, evenly(n, 20)[selection.indices])  # as train/data/packing.py gives them


# ---- what a text chose

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


def test_an_interval_is_never_narrower_than_either_kind() -> None:
    records = [
        {"slide": f"s{i % 2}", "family": "x", "answer": "a", "options": ["a"], "n": 9, "row": "a"} for i in range(10)
    ]
    entry = summary(records, ("row",))["row"]
    assert entry["slide_bootstrap"] == (1.0, 1.0)
    assert "| row | 100.0 % | 72.2 to 100.0 | 10 |" in markdown({"row": entry})
    assert wilson(0, 1)[0] == 0.0


def test_a_letter_that_is_also_an_options_text_chooses_nothing_strictly() -> None:
    assert strict_choice("A", ("B", "A")) is None
    assert strict_choice("B. A", ("B", "A")) == "A"
    assert strict_choice("B", ("x", "", "z")) is None  # an empty option cannot be chosen
    assert lenient_choice("", ("+", "-")) is None


def test_readings_become_rows() -> None:
    record = {"number": 0, "slide": "s", "family": "", "answer": "fat", "options": list(TISSUES), "n": 9, "detail": ""}
    records = [record | {"all text": "It is fat"}, record | {"all text": "D"}, record]
    assert add_readings(records, ("learned", "all")) == ["all, strict", "all, lenient"]
    majority(records)
    table = summary(records, ("all, strict", "all, lenient"))
    assert [(entry["right"], entry["n"]) for entry in table.values()] == [(1, 2), (2, 2), (3, 3)]


def test_majority_is_by_letter_where_every_question_has_its_own_options() -> None:
    options = (("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"))
    records = [{"family": "", "options": list(o), "answer": o[i]} for o, i in zip(options, (0, 0, 0, 1))]
    majority(records, letters=True)
    assert [record["majority"] for record in records] == ["a", "c", "e", "g"]
    majority(records)
    assert [record["majority"] for record in records] == ["a"] * 4


def test_accuracy_per_interval_of_n_and_its_picture(tmp_path: Path) -> None:
    records = [
        {"slide": f"s{n}", "family": "x", "answer": "a", "options": ["a", "b"], "n": n, "learned": answer, "all": "a"}
        for n, answer in ((64, "a"), (127, "b"), (128, "a"), (10_240, "a"), (0, None))
    ]
    for record in records:
        record |= {f"learned@{k}": record["learned"] for k in (8, 128)}
    majority(records)
    table = summary(records, ("learned", "learned@8", "learned@128", "all"))
    assert table["learned"]["by_n"] == {"64 to 127": [1, 2], "128 to 255": [1, 1], "8,192 to 16,383": [1, 1]}
    assert intervals_of(table) == ["64 to 127", "128 to 255", "8,192 to 16,383"]
    assert "| 64 to 127 | 50.0 % (1/2) |" in markdown(table)
    picture(table, 32, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


# ---- prompts, K, missing slides, the command


def test_presets_word_the_question_differently(model: SparseWSI, items: list[Item]) -> None:
    question = replace(items[0].question, options=("fat", "", "mucin"))
    assert worded(question, "slidechat") == question
    assert worded(question, "plain").question == "Which tissue?\nfat\nmucin"
    selection = model.select(items[0].bag)
    scores = [
        option_log_likelihoods(model, selection.tokens, selection.indices, selection.num_patches, question, preset)
        for preset in ("slidechat", "plain")
    ]
    assert all(score[1] == -torch.inf and score[[0, 2]].isfinite().all() for score in scores)
    assert not torch.equal(*scores)


def test_a_row_may_have_its_own_k(model: SparseWSI, items: list[Item], tmp_path: Path) -> None:
    records = evaluate(model, iter(items), 6, ("random@9", "random@2", "all"), None, tmp_path / "a.jsonl")
    assert [record["random@9"] for record in records] == [record["all"] for record in records]
    assert all(record["random@9 recall"] == 1.0 and record["random@2 recall"] <= 1.0 for record in records)
    assert all(record["random@9 kinds"] == 1.0 and record["random@2 kinds"] <= 1.0 for record in records)
    assert all(record["random@2 kinds"] >= record["random@2 recall"] for record in records)


COHORT = {"TCGA-A7-A0CJ-01Z-00-DX2": 9, "TCGA-A7-A0CE-01Z-00-DX1": 200}


@pytest.fixture
def flags(model: SparseWSI, tmp_path: Path) -> list[str]:
    """Flags for a made-up SlideBench file of three slides, of which the third has no features."""
    (tmp_path / "features").mkdir()
    for number, (name, n) in enumerate(COHORT.items()):
        features = torch.randn(n, 12, generator=torch.Generator().manual_seed(number)).half()
        coords = torch.stack([torch.arange(n) % 10, torch.arange(n) // 10], 1).int() * 224
        save_bag(Bag(features, coords, 224, 0.5, "made-up", "x"), tmp_path / "features" / f"{name}.0123.safetensors")
    lines = ["ID,Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer"]
    for number, slide in enumerate([*COHORT, "TCGA-A7-A0CD-01Z-00-DX1"] * 2):
        lines.append(f"{number},{slide},BRCA,Diagnosis,Grade,Which grade?,low,high,none,,B")
    lines.append("9,x,BRCA,Diagnosis,Grade,Which grade?,low,high,none,,D")
    (tmp_path / "tcga.csv").write_text("\n".join(lines))
    model.save_pretrained(tmp_path / "model")
    paths = {"model": "model", "data": "tcga.csv", "features": "features", "out": "out"}
    return [text for name, path in paths.items() for text in (f"--{name}", str(tmp_path / path))]


def command(patch: pytest.MonkeyPatch, *given: str) -> None:
    patch.setattr(sys, "argv", ["evaluate", *given])
    main()


def test_a_named_benchmark_from_its_file(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command(monkeypatch, "tcga-1494", *flags)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["rows"]) == ["learned", "random", "uniform", "all", "text-only", "majority"]
    assert {entry["n"] for entry in table["rows"].values()} == {7}
    assert table["rows"]["learned"]["right"] <= 4  # two questions are about a slide without features, one row is bad
    assert table["rows"]["majority"]["right"] == 6
    assert table["rows"]["all"]["by_n"].keys() == {"8 to 15", "128 to 255"}
    assert table["rows"]["all"]["families"].keys() == {"Diagnosis", "unreadable"}
    assert table["rows"]["all"]["details"].keys() == {"Grade"}
    notes = " ".join(table["notes"])
    for words in ("tcga.csv, row 7: the answer 'D'", "has 1,494 questions; these files have 7", "2 questions about 1"):
        assert words in notes
    assert (tmp_path / "out" / "table.md").read_text().startswith("| row |")
    assert (tmp_path / "out" / "table.png").exists()
    assert "TCGA-A7-A0CD-01Z-00-DX1 counts as missing" in capsys.readouterr().err

    log = tmp_path / "out" / "records.jsonl"
    lines = log.read_text().splitlines()
    command(monkeypatch, "tcga-1494", *flags, "--skip-missing")  # asks nothing again
    assert log.read_text().splitlines() == lines
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {entry["n"] for entry in table["rows"].values()} == {4}

    bag = tmp_path / "features" / "TCGA-A7-A0CE-01Z-00-DX1.0123.safetensors"
    bag.rename(bag.with_name("TCGA-A7-A0CD-01Z-00-DX1.safetensors"))  # now it is there, and another one is not
    command(monkeypatch, "tcga-1494", *flags)
    assert len(log.read_text().splitlines()) == len(lines) + 2
    other = tmp_path / "features" / "TCGA-A7-A0CD-01Z-00-DX1.safetensors"
    bag = load_bag(other)
    save_bag(replace(bag, features=-bag.features), other)
    for more, match in (
        (("--prompt", "plain"), "prompt was slidechat, is plain"),
        ((), "features of TCGA-A7-A0CD-01Z-00-DX1 are others"),
        (("--rows", "learned@x"), "'learned@x' is no row"),
        (("--seed", "3"), "--seed is for mosaics"),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, "tcga-1494", *flags, *more)
        assert match in capsys.readouterr().err
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(SystemExit):
        command(monkeypatch, "tcga-1494", *flags)
    assert "not what was asked" in capsys.readouterr().err


def test_written_answers_are_read_twice(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "file", *flags, "--rows", "learned", "--generate", "--max-patches", "50")
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["rows"]) == ["learned", "learned, strict", "learned, lenient", "majority"]
    assert {entry["n"] for entry in table["rows"].values()} == {7}
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert all(isinstance(record["learned text"], str) for record in records)
    assert {record["n"] for record in records} == {9, 50}


def test_no_features_at_all_is_said(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for bag in (tmp_path / "features").iterdir():
        bag.unlink()
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "tcga-1494", *flags)
    assert end.value.code == 2
    assert "none of the 3 slides has a feature file" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"from pathlib import Path; from train.command import alone_in\nwith alone_in(Path({str(out)!r})): input()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment) as other:
        while not (out / ".lock").exists():
            assert other.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        with pytest.raises(ValueError, match="Another run is writing to"), alone_in(out):
            pass
        other.kill()
        other.wait()
        with alone_in(out):
            pass
