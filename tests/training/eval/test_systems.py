"""Rows of other systems: who is asked what, how often, how votes and ties fall, and what a killed run leaves."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.bags.extract import extract_bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import load_llm
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.phantom import write_phantom
from train.eval.running import check_rows
from train.eval.systems import Count, add_votes, describe_counts, parse_row, vote
from train.evaluate import main
from train.flags import run_command

ROOT = Path(__file__).resolve().parents[3]
SLIDES = ("TCGA-A7-A0CJ-01Z-00-DX2", "TCGA-A7-A0CE-01Z-00-DX1")
QUESTIONS = ("Which tissue?", "Which grade?")
ROWS = (
    *("learned", "random", "text-only", "slidechat", "gpt-4o:random@5", "llava-med:random@2", "quilt-llava:random@2"),
    *("meddr:random@3", "gpt-4o:thumbnail", "openai:x:learned@4"),
)
PER_QUESTION = 5 + 3 + 1 + 1  # requests to the server


@pytest.fixture(scope="module")
def cohort(tiny_model: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantoms under names of TCGA, their features, a made-up SlideBench file that asks about a third slide as
    well, and a small model of SlideChat's kind with features of its own."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = ["ID,Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer"]
    for number, name in enumerate(SLIDES):
        slide = folder / "slides" / f"{name}.0123-uuid.tiff"
        slide.parent.mkdir(exist_ok=True)
        write_phantom(slide, seed=3 + number, size=1024)
        bag = extract_bag(slide, SparseWSIConfig.load(tiny_model).encoder)
        save_bag(bag, folder / "features" / f"{name}.safetensors")
        features = torch.randn(7, 16, generator=torch.Generator().manual_seed(number)).half()
        theirs = Bag(features, bag.coords[:7], bag.patch_size, 0.5, "conch", name)
        save_bag(theirs, folder / "conch" / f"{name}.safetensors")
    for number, slide in enumerate([*SLIDES, "TCGA-A7-A0CD-01Z-00-DX1"]):
        lines += [
            f"{number}{n},{slide},BRCA,Diagnosis,Grade,{asked},low,high,none,,B" for n, asked in enumerate(QUESTIONS)
        ]
    (folder / "tcga.csv").write_text("\n".join(lines))
    llm, tokenizer = load_llm(str(tiny_llm), dtype=torch.float32)
    config = SparseWSIConfig(
        llm=str(tiny_llm), encoder="conch", feature_dim=16, dim=16, num_tokens=5, slide_encoder="slidechat",
        projector="plain", selection="evenly", position="compact", option_scoring="letter",
    )  # fmt: skip
    SparseWSI(config, llm, tokenizer).save_pretrained(folder / "slidechat")
    return folder


def answer_by_px(body: dict[str, Any]) -> tuple[str, int, int]:
    """A letter that the last picture decides, as a reader would answer; text alone is A."""
    content = body["messages"][0]["content"]
    parts = content if isinstance(content, list) else []
    pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return "AB"[zlib.crc32(pictures[-1].encode()) % 2] if pictures else "A", 100 * len(pictures), 1


@pytest.fixture
def flags(cohort: Path, tiny_model: Path, tiny_llava: Path, stand_in_server, monkeypatch) -> Callable[..., list[str]]:
    """Flags of train.evaluate for some rows, into a folder."""
    monkeypatch.setenv("SPARSEWSI_ENDPOINT", stand_in_server.endpoint)
    stand_in_server.always = answer_by_px

    def make(out: Path, rows: tuple[str, ...] = ROWS) -> list[str]:
        paths = {"data": cohort / "tcga.csv", "features": cohort / "features", "slides": cohort / "slides"}
        paths |= {"model": tiny_model, "slidechat": cohort / "slidechat", "out": out}
        words = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
        words += ["--slidechat-features", str(cohort / "conch"), "--reader", f"llava-med=hf:{tiny_llava}"]
        words += ["--reader", f"quilt-llava=hf:{tiny_llava}", "--reader", "meddr=openai:MedDr_0401"]
        return ["tcga-1494", *words, "--price", "gpt-4o=2.5/10", "--rows", *rows]

    return make


def command(patch: pytest.MonkeyPatch, given: list[str]) -> None:
    patch.setattr(sys, "argv", ["evaluate", *given])
    run_command(main)


def test_every_row_of_the_table_runs_and_a_second_run_asks_nothing(
    flags, stand_in_server, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command(monkeypatch, flags(out))
    asked = len(stand_in_server.received)
    assert asked == PER_QUESTION * len(SLIDES) * len(QUESTIONS)
    table = json.loads((out / "table.json").read_text())
    readings = [f"{row}, {reading}" for row in ROWS if ":" in row for reading in ("strict", "lenient")]
    assert list(table["rows"]) == ["learned", "random", "text-only", "slidechat", *readings, "majority"]
    assert {entry["n"] for entry in table["rows"].values()} == {6}, "all questions of the file, whoever answered"
    assert table["rows"]["gpt-4o:random@5, strict"]["right"] <= 4, "the third slide is not there"
    assert (out / "table.png").exists()
    assert "| gpt-4o:random@5, strict |" in (out / "table.md").read_text()
    said = capsys.readouterr().out
    assert "gpt-4o:random@5: 20 asked now, 0 kept from before; 2,000 tokens in, 20 out, 0.01 USD." in said

    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    there = [record for record in records if record["n"]]
    assert {len(record["gpt-4o:random@5 texts"]) for record in there} == {5}
    assert {len(record["openai:x:learned@4 texts"]) for record in there} == {1}
    assert {record["slidechat"] for record in there} <= {"low", "high", "none"}
    shown = [json.loads(body)["messages"][0]["content"] for _, _, body in stand_in_server.received]
    counts = [sum(part["type"] == "image_url" for part in parts) for parts in shown]
    assert sorted(set(counts)) == [1, 4]
    assert all("TCGA" not in part.get("text", "") for parts in shown for part in parts), "no name is sent"

    command(monkeypatch, flags(out))
    assert len(stand_in_server.received) == asked, "its records are kept"
    command(monkeypatch, [*flags(tmp_path / "other"), "--answers", str(out / "answers.jsonl")])
    assert len(stand_in_server.received) == asked, "answers are kept for other runs"
    assert json.loads((tmp_path / "other" / "table.json").read_text())["rows"] == table["rows"]
    assert "gpt-4o:random@5: 0 asked now, 20 kept from before; 2,000 tokens in, 20 out" in capsys.readouterr().out


def test_a_run_that_is_killed_goes_on_and_asks_nobody_twice(flags, stand_in_server, tmp_path, monkeypatch):
    rows = ("gpt-4o:random@5", "gpt-4o:text-only", "openai:x:learned@4:each")
    whole = (5 + 4) * 4 + 6  # about slides that are there; the text alone is asked about all

    def slowly(body: dict[str, Any]) -> tuple[str, int, int]:
        time.sleep(0.05)
        return answer_by_px(body)

    stand_in_server.always = slowly
    words = flags(tmp_path / "out", rows)
    run = subprocess.Popen([sys.executable, "-m", "train.evaluate", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(stand_in_server.received) < 8:
        assert run.poll() is None, "it ended by itself"
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert len(stand_in_server.received) < whole
    command(monkeypatch, words)
    bodies = [body for _, _, body in stand_in_server.received]
    assert whole <= len(bodies) <= whole + 1, "at most the question that was under way is asked again"
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {entry["n"] for entry in table["rows"].values()} == {6}


def test_a_refusal_is_no_answer_and_a_dead_server_ends_the_run_with_a_sentence(
    flags, stand_in_server, tmp_path, monkeypatch, capsys
):
    stand_in_server.say(refusal="I cannot help with medical images.")
    command(monkeypatch, flags(tmp_path / "out", ("gpt-4o:thumbnail",)))
    assert "4 asked now, 0 kept from before, 1 refused" in capsys.readouterr().out
    stand_in_server.fail(401)
    with pytest.raises(SystemExit):
        command(monkeypatch, flags(tmp_path / "other", ("gpt-4o:thumbnail",)))
    assert "refused access to gpt-4o-2024-11-20" in capsys.readouterr().err


def test_a_rate_limit_is_waited_for_and_what_broke_off_is_asked_again_by_the_next_run(
    flags, stand_in_server, tmp_path, monkeypatch, capsys
):
    """A limit and a stream that drops before a word cost nothing; half an answer ends the run and is not kept."""
    given = flags(tmp_path / "out", ("gpt-4o:thumbnail",))
    stand_in_server.fail(429, "slow down", Retry_After="0.1")
    stand_in_server.say(end=None)
    stand_in_server.say("B")
    stand_in_server.say("It is not ", end=None)
    with pytest.raises(SystemExit):
        command(monkeypatch, given)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "broke off the answer of openai:gpt-4o-2024-11-20: what stands is not whole" in said
    kept = [json.loads(line)["text"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert kept == ["B"]
    command(monkeypatch, given)
    assert "gpt-4o:thumbnail: 3 asked now" in capsys.readouterr().out
    assert len(stand_in_server.received) == 4 + 3
    assert {entry["n"] for entry in json.loads((tmp_path / "out" / "table.json").read_text())["rows"].values()} == {6}


def test_most_votes_count_and_ties_are_drawn_with_a_seed():
    options = ("low", "high", "none")
    assert vote(["low", "high", "high", None], options, "x") == "high"
    assert vote([None, None], options, "x") is None
    drawn = {seed: vote(["low", "high", None], options, seed) for seed in map(str, range(40))}
    assert set(drawn.values()) == {"low", "high"}
    assert drawn == {seed: vote(["high", None, "low"], options, seed) for seed in drawn}, "whatever the order of votes"
    record = {"slide": "a", "number": 0, "options": options, "x:random@3 texts": ["B", "It is B.", "none"]}
    assert add_votes([record], ["learned", "x:random@3"]) == ["x:random@3, strict", "x:random@3, lenient"]
    assert record["x:random@3, lenient"] == "high"


def test_rows_are_told_apart_and_what_is_no_row_is_refused(flags, tmp_path, monkeypatch, capsys):
    assert parse_row("learned@8") is None
    row = parse_row("openai:llama3:8b:random@30:together")
    assert row is not None
    assert (row.system, row.shown, row.each) == ("openai:llama3:8b", "random@30", False)
    assert [parsed.each for name in ("gpt-4o:random@30", "gpt-4o:learned@32", "gpt-4o:mmr@8:each")
            if (parsed := parse_row(name))] == [True, False, True]  # fmt: skip
    for wrong in ("gpt-5:random@3", "gpt-4o:best@3", "gpt-4o:random@0", "gpt-4o:thumbnail:each", "hf::random@3"):
        with pytest.raises(ValueError, match="is no row"):
            check_rows([wrong])
    words = flags(tmp_path / "out", ("gpt-4o:thumbnail",))
    place = words.index("--slides")
    with pytest.raises(SystemExit):
        command(monkeypatch, [*words[:place], *words[place + 2 :]])
    assert "pass --slides" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["evaluate", "file", "--rows", "llava-med:random@3", "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit):
        run_command(main)
    assert "run python -m train.convert llava, then pass --reader llava-med=hf:FOLDER" in capsys.readouterr().err


def test_counts_are_told_with_what_they_cost():
    counts = {"gpt-4o:random@30": Count(3, 1, 0, 1_000_000, 100_000, 0), "x:thumbnail": Count(uncounted=2)}
    first, second = describe_counts(counts, {"gpt-4o": (2.5, 10.0)})
    assert first.endswith("1,000,000 tokens in, 100,000 out, 3.50 USD.")
    assert "2 answers came without a count" in second
