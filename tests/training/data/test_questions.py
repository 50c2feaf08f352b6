"""Files of questions: every format gives the same records, a bad row is named and stops nothing, slides are found."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag, join, save_bag
from sparsewsi.model.sparse_wsi import SparseWSI
from train.config import TrainConfig
from train.data.example import Question, Record
from train.data.questions import BENCHMARKS, BadRow, main, read, read_closed_questions, split_options
from train.data.slides import FeatureFolder, SlideVQADataset, epoch_order, evenly
from train.flags import run_command
from train.run import train

TCGA_HEADER = "ID,Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer\n"
BCNB_HEADER = "ID,Slide,Task,Question,A,B,C,D,Answer\n"


def made_bag(n: int, dim: int = 12, encoder: str = "made-up", seed: int = 0) -> Bag:
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).half()
    coords = torch.stack([torch.arange(n) % 3, torch.arange(n) // 3], 1).int() * 224
    return Bag(features, coords, 224, 0.5, encoder, "made")


def write(path: Path, text: str | list) -> Path:
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


# ---- formats


def test_slidebench_tcga(tmp_path: Path) -> None:
    rows = '1,TCGA-A7-A0CJ-01Z-00-DX2,BRCA,Diagnosis,Subtype,"Which, if any?",ductal,lobular,"a, b",none,B\n'
    records, bad = read([write(tmp_path / "tcga.csv", "\ufeff" + TCGA_HEADER + rows)])
    assert not bad
    question = Question("Which, if any?", "lobular", ("ductal", "lobular", "a, b", "none"), "Diagnosis")
    assert records == [Record(("TCGA-A7-A0CJ-01Z-00-DX2",), question, "tcga.csv", 1, "Subtype")]


def test_slidebench_bcnb_has_questions_with_two_options(tmp_path: Path) -> None:
    records, bad = read([write(tmp_path / "bcnb.csv", BCNB_HEADER + "7,12.jpg,ER,Is ER positive?,Yes,No,,,B\n")])
    assert not bad
    assert records[0].slides == ("12",)
    assert records[0].question == Question("Is ER positive?", "No", ("Yes", "No"), "ER")


def test_an_empty_option_keeps_the_letters_of_those_after_it(tmp_path: Path) -> None:
    records, bad = read([write(tmp_path / "b.csv", BCNB_HEADER + "7,1,ER,Which?,one,,three,,C\n8,1,ER,W?,a,,c,,B\n")])
    assert records[0].question.options == ("one", "", "three")
    assert records[0].question.answer == "three"
    assert [problem.row for problem in bad] == [2]  # the answer is the empty option


def test_slidechat_json(tmp_path: Path) -> None:
    rows = [
        {
            "id": "train::0",
            "image": ["TCGA-A7-A0CJ-01Z-00-DX2.csv", "TCGA-A7-A0CJ-01Z-00-DX1.csv"],
            "conversations": [
                {"from": "human", "value": "How does it look?\n<image>"},
                {"from": "gpt", "value": "A biopsy shows fat. B is absent."},
                {"from": "human", "value": "Which grade?\nA. low\nB. high"},
                {"from": "gpt", "value": "B. high"},
            ],
        }
    ]
    records, bad = read([write(tmp_path / "stage2.json", rows)])
    assert not bad
    assert [record.slides for record in records] == [("TCGA-A7-A0CJ-01Z-00-DX2", "TCGA-A7-A0CJ-01Z-00-DX1")] * 2
    assert records[0].question == Question("How does it look?", "A biopsy shows fat. B is absent.", (), "stage2")
    assert records[1].question == Question("Which grade?", "high", ("low", "high"), "stage2")


def test_wsi_bench_json(tmp_path: Path) -> None:
    def row(question: str, answer: str) -> dict:
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"id": "x-1", "image": "TCGA-LUSC/TCGA-21-1083-01Z-00-DX1.8288ca92.pt", "conversations": turns}

    rows = [
        row("Which stage? A) T1 N0   B) T2 (type A) N1 C) T3", "B"),
        row("Is the prognosis poor?", "Yes"),
        row("Describe it.", "Sheets of cells."),
    ]
    records, bad = read([write(tmp_path / "Staging_choice_test.json", rows)])
    assert not bad
    assert {record.slides for record in records} == {("TCGA-21-1083-01Z-00-DX1.8288ca92",)}
    options = ("T1 N0", "T2 (type A) N1", "T3")
    assert [record.question for record in records] == [
        Question("Which stage?", "T2 (type A) N1", options, "Staging"),
        Question("Is the prognosis poor?", "Yes", ("Yes", "No"), "Staging"),
        Question("Describe it.", "Sheets of cells.", (), "Staging"),
    ]


def test_wsi_vqa_json(tmp_path: Path) -> None:
    rows = [
        {"Id": "TCGA-AR-A1AI", "Question": "what grade?", "Choice": ["low", "high", "D: A", "none"], "Answer": "High."},
        {"Id": "TCGA-AR-A1AI", "Question": "what is her2?", "Answer": "2+"},
    ]
    records, bad = read([write(tmp_path / "WsiVQA_test.json", rows)])
    assert not bad
    assert records[0].question == Question("what grade?", "high", ("low", "high", "D: A", "none"), "closed")
    assert records[1].question == Question("what is her2?", "2+", (), "open")


def test_our_own_lines(tmp_path: Path) -> None:
    lines = (
        '{"slide": "a", "question": "Which?", "options": ["B", "A"], "answer": "A", "category": "blood group"}\n\n'
        '{"slide": ["a", "b.h5"], "question": "Describe\u2028it.", "answer": "Fat."}\n'
        '{"slide": "a", "question": "cut off by a k'
    )
    records, bad = read([write(tmp_path / "ours.jsonl", lines)])
    assert records[0].question == Question("Which?", "A", ("B", "A"), "blood group")  # the text, not the letter
    assert records[1].slides == ("a", "b")
    assert [str(problem)[:24] for problem in bad] == ["ours.jsonl, row 3: the r"]


def test_letters_out_of_order_are_no_options() -> None:
    assert split_options("Is vitamin B) or A) better?") == ("Is vitamin B) or A) better?", ())
    assert split_options("Which? A) x (see C) B) y") == ("Which?", ("x (see C)", "y"))
    assert split_options("What?\nA. the one\nB. hepatitis B. or C")[1] == ("the one", "hepatitis B. or C")


def test_bad_rows_are_named_and_the_others_read(tmp_path: Path) -> None:
    good = "1,s,BRCA,Diagnosis,x,Which?,a,b,,,A\n"
    rows = [
        "2,s,BRCA,Diagnosis,x,Which?,a,b,,,C\n",
        "3,s,BRCA,Diagnosis,x,Which?,a,b,,,\n",
        "4,s,BRCA,Diagnosis,x,,a,b,,,A\n",
        "5,,BRCA,Diagnosis,x,Which?,a,b,,,A\n",
        "6,s,BRCA,Diagnosis,x,Which?,a,A.,,,A\n",
        "7,s\n",
    ]
    table = write(tmp_path / "t.csv", TCGA_HEADER + good + "".join(rows) + good)
    odd = write(tmp_path / "o.json", [17, {"a": 1}, {"image": "x", "conversations": [{"from": "gpt", "value": "y"}]}])
    cut = write(tmp_path / "cut.json", '[{"Id": "x", "Ques')
    (tmp_path / "latin.csv").write_bytes(TCGA_HEADER.encode() + b"\xb5\n")
    records, bad = read([table, odd, cut, tmp_path / "latin.csv", tmp_path / "none.json"])
    assert [record.row for record in records] == [1, 8]
    reasons = {(problem.file, problem.row): problem.reason for problem in bad}
    assert len(bad) == len(reasons) == 12
    for row, words in ((2, "not among"), (3, "answer is empty"), (4, "question is empty"), (5, "no slide")):
        assert words in reasons["t.csv", row]
    assert "same text" in reasons["t.csv", 6]
    assert {("cut.json", 0), ("latin.csv", 0), ("none.json", 0), ("o.json", 1), ("o.json", 2), ("o.json", 3)} <= set(
        reasons
    )


def test_what_is_not_told_apart_or_not_there_is_a_bad_row(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Which grade? A. low B. high"}, {"from": "gpt", "value": "A. lower"}]
    line = write(tmp_path / "line.json", [{"image": "x", "conversations": turns}])
    empty = write(tmp_path / "empty.json", [])
    wrapped = {"data": [{"slide": "x", "question": "q", "answer": "a"}] * 2}
    semicolons = write(tmp_path / "s.csv", "Slide;Question;A;B;Answer\nx;q;a;b;A\n")
    records, bad = read([line, empty, write(tmp_path / "w.json", json.dumps(wrapped, indent=2)), semicolons])
    assert [record.file for record in records] == ["w.json", "w.json"]
    assert ["told apart" in bad[0].reason, "no row" in bad[1].reason, "not semicolons" in bad[2].reason] == [True] * 3


def test_a_benchmark_says_when_it_is_not_the_published_one(tmp_path: Path) -> None:
    rows = [
        {"Id": "a", "Question": "q", "Choice": ["x", "y"], "Answer": "x"},
        {"Id": "a", "Question": "q", "Answer": "z"},
    ]
    closed, bad, notes = read_closed_questions("wsivqa-390", [write(tmp_path / "w.json", rows)])
    assert (len(closed), bad) == (1, [])
    assert any("1 open questions" in note for note in notes)
    assert any("has 390 questions; these files have 1" in note for note in notes)
    with pytest.raises(ValueError, match="no question with options"):
        read_closed_questions("wsivqa-390", [write(tmp_path / "open.json", rows[1:])])


def test_the_real_wsi_bench_files(shared_data: Path) -> None:
    records, bad = read([shared_data / "qa" / "wsi_bench_test"])
    closed = [record for record in records if record.question.options]
    assert len(records) + len(bad) == 4173
    assert [(problem.file, problem.row) for problem in bad] == [("Morphology_choice_test.json", 579)]  # answer 'B "'
    assert len(closed) + len(bad) == BENCHMARKS["wsi-bench"].questions
    assert all(record.question.answer in record.question.options for record in closed)
    assert {len(record.question.options) for record in closed} == {2, 4}


def test_the_real_wsi_vqa_sample(shared_data: Path) -> None:
    records, bad = read([shared_data / "qa" / "wsi_vqa_sample.json"])
    assert not bad
    assert [bool(record.question.options) for record in records] == [True] * 8 + [False] * 4
    assert records[0].slides == ("TCGA-LD-A74U",)


# ---- features


def test_slides_are_found_by_the_names_that_files_give_them(tmp_path: Path) -> None:
    names = ("a.h5", "a.pt", "sub/b.safetensors", "1.jpg.npy", "12.npy", ".a.h5.part.h5")
    names += ("TCGA-AR-A1AI-01Z-00-DX1.8288-ca92.h5", "TCGA-AR-A1AI-01Z-00-DX2.91.h5", "x/d.pt", "y/d.pt")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    features = FeatureFolder(tmp_path)

    def found(slide: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in features.find(slide)]

    assert found("a") == ["a.h5"]  # with coordinates, before the tensor alone
    assert found("b") == ["sub/b.safetensors"]
    assert (found("1"), found("2"), found("TCGA-AR-A1A")) == (["1.jpg.npy"], [], [])
    assert found("TCGA-AR-A1AI-01Z-00-DX1") == [names[6]]
    assert found("TCGA-AR-A1AI-01Z-00-DX1.8288-ca92") == [names[6]]
    assert found("TCGA-AR-A1AI") == [names[6], names[7]]  # a case is all its slides
    with pytest.raises(ValueError, match="several feature files"):
        features.find("d")


def test_several_slides_are_one_bag_in_raster_order() -> None:
    one, two = made_bag(7), made_bag(5, seed=1)
    both = join([one, two])
    assert torch.equal(both.features, torch.cat([one.features, two.features]))
    assert both.coords[7:, 1].min() == one.coords[:, 1].max() + one.patch_size
    order = np.lexsort((both.coords[:, 0], both.coords[:, 1]))
    assert order.tolist() == list(range(12))
    with pytest.raises(ValueError, match="dimension 9"):
        join([one, made_bag(3, dim=9)])
    with pytest.raises(ValueError, match="another"):
        join([one, made_bag(3, encoder="another")])


@pytest.fixture
def cohort(tmp_path: Path) -> tuple[list[Record], FeatureFolder]:
    for number, n in enumerate((5, 40, 7)):
        save_bag(made_bag(n, seed=number), tmp_path / f"s{number}.safetensors")
    records = [Record((f"s{i % 3}",), Question(f"Question {i}?", "fat")) for i in range(9)]
    return [*records, Record(("s0", "s2"), Question("Both?", "mucin"))], FeatureFolder(tmp_path)


def test_dataset_gives_every_question_once_an_epoch(cohort: tuple[list[Record], FeatureFolder]) -> None:
    records, features = cohort
    data = SlideVQADataset(records, features, seed=3, questions_per_bag=2)
    assert len(data) == 7  # 3 questions a slide, two a bag, and the pair of slides
    assert (data.encoder, data.feature_dim) == ("made-up", 12)
    orders = []
    for epoch in range(2):
        examples = [data.example(epoch * 7 + i, 16) for i in range(7)]
        asked = [question.question for example in examples for question in example.questions]
        assert sorted(asked) == sorted(record.question.question for record in records)
        orders.append(asked)
    assert orders[0] != orders[1]
    again = SlideVQADataset(records, features, seed=3, questions_per_bag=2).example(9, 16)
    assert again.questions == data.example(9, 16).questions
    assert torch.equal(again.features, data.example(9, 16).features)


def test_a_large_slide_is_thinned_evenly_and_keeps_its_places(cohort: tuple[list[Record], FeatureFolder]) -> None:
    records, features = cohort
    data = SlideVQADataset([record for record in records if record.slides == ("s1",)], features)
    example = data.example(0, 16)
    assert example.num_patches == 40
    assert example.indices.tolist() == np.linspace(0, 39, 16).astype(int).tolist()
    assert torch.equal(example.features, features.load(["s1"]).features[example.indices])
    both = SlideVQADataset(records[-1:], features).example(0, 100)
    assert (len(both.features), both.num_patches) == (12, 12)


def test_even_spacing_and_epoch_order() -> None:
    assert evenly(5, None).tolist() == evenly(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert evenly(100_000, 10_240).unique().numel() == 10_240
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert epoch_order(50, 1, 2).tolist() != epoch_order(50, 1, 3).tolist()


def test_a_bag_of_another_encoder_stops_the_dataset(cohort: tuple[list[Record], FeatureFolder]) -> None:
    records, features = cohort
    save_bag(made_bag(4, encoder="another"), features.folder / "s1.safetensors")
    data = SlideVQADataset(records, features)
    with pytest.raises(ValueError, match="another"):
        [data.example(i, 16) for i in range(len(data))]
    with pytest.raises(ValueError, match="no question"):
        SlideVQADataset([], features)


def test_csv_features_are_converted_once_and_read_as_before(tmp_path: Path) -> None:
    table = tmp_path / "TCGA-A7-A0CJ-01Z-00-DX2.csv"
    rows = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float16)
    np.savetxt(table, rows, delimiter=",", header=",".join(map(str, range(512))), comments="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the file holds no positions
        before = FeatureFolder(tmp_path).load(["TCGA-A7-A0CJ"])
        folder = FeatureFolder(tmp_path)
        folder.convert_csv(["TCGA-A7-A0CJ", "TCGA-A7-A0CJ-01Z-00-DX2"])
    [file] = folder.find("TCGA-A7-A0CJ")
    assert file.suffix == ".safetensors"
    after = folder.load(["TCGA-A7-A0CJ"])
    assert torch.equal(after.features, before.features)
    assert after.encoder == before.encoder
    assert FeatureFolder(tmp_path).find("TCGA-A7-A0CJ") == [file]
    written = file.stat().st_mtime_ns
    folder.convert_csv(["TCGA-A7-A0CJ"])  # nothing is left to convert
    assert file.stat().st_mtime_ns == written


# ---- the command


def check(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[object, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_command(main)
    captured = capsys.readouterr()
    return end.value.code, captured.out + captured.err


def test_check_names_what_would_go_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    for name, bag in (("a", made_bag(5)), ("b", made_bag(5, dim=9)), ("e", made_bag(0)), ("ok", made_bag(3))):
        save_bag(bag, folder / f"{name}.safetensors")
    whole = (folder / "ok.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-10])
    lines: list[dict] = [
        {"slide": name, "question": "Describe it.", "answer": "Fat."} for name in ("a", "b", "cut", "e", "gone")
    ]
    lines[0] |= {"options": ["Blood", "Mucin"]}
    good = [{"slide": name, "question": "Describe it.", "answer": "Fat."} for name in ("a", "ok")]
    data = write(tmp_path / "q.jsonl", "\n".join(json.dumps(line) for line in [*lines, *good, lines[4]]))
    code, output = check(capsys, data, "--features", folder)
    assert code == 2
    for words in (
        "q.jsonl, row 1: the answer 'Fat.' is not among",
        "row 3: slide cut: cut.safetensors is a broken",
        "row 2: slide b has features of made-up, dimension 9; wanted: made-up, dimension 12.",
        "row 4: slide e: there are no patches",
        "row 5: slide gone has no feature file (2 questions)",
        "7 questions can be asked (0 with options, 7 open) about 6 slides; 6 problems",
        "row 8: the same question about the same slide as row 5.",
    ):
        assert words in output
    assert check(capsys, write(tmp_path / "good.json", good), "--features", folder) == (
        0,
        "2 questions can be asked (0 with options, 2 open) about 2 slides; 0 problems.\n",
    )
    code, output = check(capsys, data, "--features", tmp_path / "nowhere")
    assert code == 2
    assert "is not a folder" in output


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '[{"slide": ' + "[" * 100_000, '{"slide": 1}\n' + "[" * 9**5]
)
def test_a_file_nested_without_end_is_reported(tmp_path, text) -> None:
    (tmp_path / "q.json").write_text(text)
    records, bad = read([tmp_path / "q.json"])
    assert not records
    assert bad
    assert all(len(str(row)) < 600 for row in bad)


UNREADABLE = {
    "cut": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)),
    "empty": lambda path: path.touch(),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "gone"),
    "a pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 9),
    # Pickled on purpose, here and never read: a feature file that must be refused.
    "a pickle": lambda path: np.save(path.open("wb"), np.array({"x": 1}, dtype=object), allow_pickle=True),
    "of one slide vector": lambda path: np.save(path.open("wb"), np.ones(9, np.float32)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("ending", ["h5", "npy", "safetensors", "pt"])
def test_one_file_that_cannot_be_read_ends_no_check_of_many(tmp_path, capsys, kind, ending) -> None:
    for name in ("s1", "s3"):
        save_bag(made_bag(5), tmp_path / f"{name}.safetensors")
    UNREADABLE[kind](tmp_path / f"s2.{ending}")
    rows = [{"slide": f"s{i}", "question": "Which?", "answer": "skin"} for i in (1, 2, 3)]
    code, output = check(capsys, write(tmp_path / "q.json", rows), "--features", tmp_path)
    assert code == 2
    assert "3 questions can be asked" in output
    assert "; 1 problem" in output
    assert "q.json, row 2: slide s2" in output


# ---- training


def test_both_stages_train_on_slidechats_files(tmp_path: Path, tiny_llm: Path, capsys: pytest.CaptureFixture) -> None:
    for number, n in enumerate((9, 30)):
        save_bag(made_bag(n, seed=number), tmp_path / f"s{number}.safetensors")
    turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "Mostly fat."}]
    captions = [{"id": "t", "image": image, "conversations": turns} for image in (["s0.csv", "s1.csv"], "s1.csv", "x")]
    turns = [{"from": "human", "value": "<image>\nWhich? A) fat B) mucin"}, {"from": "gpt", "value": "B"}]
    asked = [{"id": "t", "image": f"s{i % 2}.csv", "conversations": turns} for i in range(5)]
    settings = TrainConfig(
        stage=1, out=str(tmp_path / "one"), data=[str(write(tmp_path / "captions.json", captions))],
        features=str(tmp_path), llm=str(tiny_llm), steps=3, accumulation=2, dim=16, patches=20, num_tokens=6,
        dense=0.5, anneal=0.5, lora_rank=2, lora_alpha=4, checkpoint_every=2,
    )  # fmt: skip
    first = train(settings)
    said = capsys.readouterr().out
    assert "captions.json, row 3: slide x has no feature file (1 questions)." in said
    assert "2 questions are left" in said
    questions = [str(write(tmp_path / "questions.json", asked))]
    asking = replace(settings, stage=2, out=str(tmp_path / "two"), init=str(first), data=questions, epochs=2.0)
    last = train(asking)
    config = SparseWSI.from_pretrained(last / "model").config
    assert (config.encoder, config.feature_dim) == ("made-up", 12)
    steps = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2  # two epochs of two bags, two a step
    assert {step["n"] for step in steps} <= {9, 20}
    assert all(np.isfinite(step["loss"]) for step in steps)
    with pytest.raises(ValueError, match="either --banks"):
        train(replace(settings, data=[]))


# ---- as people write them


def asked(tmp_path: Path, text: str, answer: str) -> tuple[list[Record], list[BadRow]]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return read([write(tmp_path / "q.json", [{"image": "S1", "conversations": turns}])])


@pytest.mark.parametrize(
    ("text", "answer", "options", "right"),
    [
        ("Grade?\nA: low\nB: high", "b", ("low", "high"), "high"),
        ("Grade? (a) low (b) high", "(b) high", ("low", "high"), "high"),
        ("Grade?\nA \u2013 low\nB \u2013 high\nC \u2013 none", "C", ("low", "high", "none"), "none"),
        ("Grade?\n1) low\n2) high\n3) none", "3.", ("low", "high", "none"), "none"),
        ("Grade?\na. low\nb. high", "high", ("low", "high"), "high"),
        ("Grade?\n(A) low\n(B) high", "A", ("low", "high"), "low"),
        ("Grade? A. low B. high", "high", ("low", "high"), "high"),
        ("Grade?\n[A] low\n[B] high", "[B]", ("low", "high"), "high"),
        ("Grade?\n- **A.** low\n- **B.** high", "**A.** low", ("low", "high"), "low"),
        ("Grade?\nOption A: low\nOption B: high", "B", ("low", "high"), "high"),
        ("Grade?\nA\u3001low\nB\u3001high", "high", ("low", "high"), "high"),
        ("Grade? (A) low; (B) high; (C) none", "B", ("low", "high", "none"), "high"),
    ],
)
def test_marks_of_options_are_read_as_they_are_written(tmp_path, text, answer, options, right) -> None:
    records, bad = asked(tmp_path, text, answer)
    assert bad == []
    assert [(r.question.question, r.question.options, r.question.answer) for r in records] == [
        ("Grade?", options, right)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Grade?\nA. low\nB. high\nAnswer with the option's letter from the given choices directly.",
        "Grade? A) low B) high\nSelect one option.",
        "Grade? A) low B) high Please choose the right answer.",
        "Grade?\nA) low\nB) high\n\nThe stain is H&E.",
    ],
)
def test_what_stands_behind_the_last_option_belongs_to_the_question(tmp_path, text) -> None:
    (record,), bad = asked(tmp_path, text, "B")
    assert bad == []
    assert (record.question.options, record.question.answer) == (("low", "high"), "high")
    assert record.question.question.split("\n")[1] in text


def test_an_option_may_run_over_two_lines(tmp_path) -> None:
    (record,), _ = asked(tmp_path, "Grade?\nA) low\nB) high, with\nnecrosis", "A")
    assert record.question.options == ("low", "high, with\nnecrosis")


ROW = {"slide": "S1", "question": "Grade?", "answer": "low"}
OTHERWISE = [
    {"choices": ["low", "high"]},
    {"Choice": ["low", "high", None]},
    {"options": ["A. low", "B. high"]},
    {"options": ["A. low", "B. high"], "answer": "A. low"},
    {"options": ["(a) low", "(b) high"], "answer": "A"},
    {"option_a": "low", "option_b": "high", "answer": "A"},
    {"a": "low", "b": "high", "c": "N/A", "d": "#N/A", "answer": "a"},
    {"a": "A. low", "b": "B. high", "answer": "A"},
]


@pytest.mark.parametrize("change", OTHERWISE, ids=str)
def test_options_are_found_where_they_stand(tmp_path, change) -> None:
    records, bad = read([write(tmp_path / "q.json", [ROW | change])])
    assert bad == []
    assert [(r.question.options, r.question.answer) for r in records] == [(("low", "high"), "low")]


def test_every_lettered_column_is_an_option(tmp_path) -> None:
    records, bad = read([write(tmp_path / "q.csv", "slide,question,a,b,c,d,e,answer\nS1,Grade?,1,2,3,4,x,E\n")])
    assert bad == []
    assert records[0].question.options == ("1", "2", "3", "4", "x")


NOT_ASKED = [
    ({"options": ["B. high", "A. low"], "answer": "A. low"}, "marked B, A"),
    ({"options": {"A": "low", "B": "high"}}, "list of texts"),
    ({"options": [{"text": "low"}, {"text": "high"}]}, "list of texts"),
    ({"options": ["", None]}, "all options are empty"),
    ({"candidates": ["low", "high"]}, "candidates"),
    ({"answer": ["low"]}, "must be a text"),
    ({"Answer": "high"}, "two values under answer"),
    ({"slide": "N/A"}, "no slide"),
    ({"answer": "N/A"}, "empty"),
]


@pytest.mark.parametrize(("change", "words"), NOT_ASKED, ids=str)
def test_a_question_is_not_asked_as_another(tmp_path, change, words) -> None:
    records, (bad,) = read([write(tmp_path / "q.json", [ROW | change])])
    assert records == []
    assert words in bad.reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide,question,answer\nS1,Is it high, and where?,no\n", "more cells"),
        ("slide,question,a,b,answer\nS1,Grade, if any?,low,high,a\n", "more cells"),
        ("slide,question,a,b,answer,Answer\nS1,Grade?,low,high,a,b\n", "two columns answer"),
        ("slide\tquestion\tanswer\nS1\tGrade?\tlow\n", "not tabs"),
    ],
)
def test_cells_that_are_not_under_their_column_are_not_taken_for_it(tmp_path, text, words) -> None:
    records, bad = read([write(tmp_path / "q.csv", text)])
    assert records == []
    assert words in bad[0].reason


def test_empty_cells_behind_a_row_do_not_matter(tmp_path) -> None:
    records, bad = read([write(tmp_path / "q.csv", "\ufeffslide\u200b,question,answer\nS1,Grade?,low grade,,\n")])
    assert (len(records), bad) == (1, [])


@pytest.mark.parametrize("answer", ["B", "c.", "(d)"])
def test_a_letter_without_options_is_reported(tmp_path, answer) -> None:
    records, (bad,) = asked(tmp_path, "Which of them is it, one, two or three?", answer)
    assert records == []
    assert "letter" in bad.reason


@pytest.mark.parametrize("text", ["Describe:\n1. the grade\n2. the stage", "Tell a) size and b) margin", "A: is it?"])
def test_a_list_in_an_open_question_is_no_list_of_options(tmp_path, text) -> None:
    records, bad = asked(tmp_path, text, "It is of high grade and reaches the margin.")
    assert bad == []
    assert records[0].question.options == ()


@pytest.mark.parametrize("change", [str.upper, str.lower, str.title])
def test_columns_are_read_in_any_case(tmp_path, change) -> None:
    header = change("slide,question,a,b,answer,task")
    records, bad = read([write(tmp_path / "q.csv", f"{header}\nS1,Grade?,low,high,b,grading\n")])
    assert bad == []
    assert (records[0].question.answer, records[0].question.family) == ("high", "grading")


@pytest.mark.parametrize("field", ["slide", "question", "answer"])
def test_nan_is_no_text(tmp_path, field) -> None:
    row = {"slide": "S1", "question": "Grade?", "options": ["low", "high"], "answer": "low"} | {field: float("nan")}
    records, (bad,) = read([write(tmp_path / "q.json", [row])])
    assert records == []
    assert "nan" not in bad.reason.casefold()


@pytest.mark.parametrize("row", [1, 3, 5])
def test_a_quotation_mark_that_is_not_closed_is_named_with_its_line(tmp_path, row) -> None:
    lines = ["slide,question,a,b,answer", *(f"S{i},Grade?,low,high,a" for i in range(1, 7))]
    lines[row] = lines[row].replace("Grade?", '"Grade?')
    records, (bad,) = read([write(tmp_path / "q.csv", "\n".join(lines) + "\n")])
    assert len(records) == row - 1
    assert f"line {row + 1} is not closed" in bad.reason


@pytest.mark.parametrize("written", ['"{}"', " '{}' ", "URI"])
def test_files_and_slides_are_named_as_they_are_pasted(tmp_path, written) -> None:
    folder = tmp_path / "my features"
    folder.mkdir()
    (folder / "S 1.h5").write_bytes(b"x")

    def paste(path: Path) -> str:
        return path.as_uri() if written == "URI" else written.format(path)

    row = {"slide": paste(tmp_path / "slides" / "S 1.svs"), "question": "Which?", "answer": "skin"}
    (tmp_path / "my q.json").write_text(json.dumps([row]))
    records, bad = read([paste(tmp_path / "my q.json")])
    assert not bad
    assert [path.name for path in FeatureFolder(paste(folder)).find(records[0].slides[0])] == ["S 1.h5"]


@pytest.mark.parametrize("options", [["one", "", "two"], [None, "one", "two"], ["one", " ", None, "two"]])
def test_an_option_that_is_empty_between_others_is_told(tmp_path: Path, options: list):
    row = {"slide": "a", "question": "Which?", "options": options, "answer": "two"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    records, (bad,) = read([tmp_path / "q.jsonl"])
    assert not records
    assert "is empty" in bad.reason


@pytest.mark.parametrize("twice", ["question", "answer", "slide"])
def test_a_row_that_says_something_twice_is_told(tmp_path: Path, twice: str):
    text = json.dumps({"slide": "a", "question": "Which?", "answer": "two"})
    (tmp_path / "q.jsonl").write_text(text[:-1] + f', "{twice}": "b"}}')
    records, (bad,) = read([tmp_path / "q.jsonl"])
    assert not records
    assert "a key twice" in bad.reason
