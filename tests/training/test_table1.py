"""The paper's table, and ours under it: what ran is told apart from what did not."""

import json
import sys
from pathlib import Path

import pytest

from train.flags import run_command
from train.table1 import TABLE, main, write_table1


def score(right: int, n: int, **families: tuple[int, int]) -> dict:
    share = right / n
    return {"right": right, "n": n, "wilson": [share, share - 0.02, share + 0.02], "slide_bootstrap": None} | {
        "by_family": families
    }


def test_without_a_run_the_papers_figures_stand_alone():
    text = write_table1({})
    assert len(text.split("\n\n")[0].splitlines()) == 2 + len(TABLE)
    assert "| SparseLearn (paper) | 1.73T | 81.68 | 70.09 | 73.32 | 56.89 | 60.76 |" in text
    assert "Ran here: none of them. Did not run here: slidechat, gpt-4o:random@30, llava-med:random@30" in text


def test_what_was_measured_stands_under_its_row(tmp_path: Path, monkeypatch, capsys):
    rows = {
        "learned": score(60, 100, Microscopy=(30, 40), Diagnosis=(30, 60)),
        "gpt-4o:random@30, strict": score(40, 100),
        "gpt-4o:random@30, lenient": score(50, 100),
        "text-only": score(25, 100),
    }
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(sys, "argv", ["table1", "--tcga", str(tmp_path)])
    main()
    said = capsys.readouterr().out
    assert "| SparseLearn, here: learned |  | 75.0 (" in said
    assert "| 60.0 (58.0 to 62.0), n = 100 |  |  |" in said
    assert said.index("GPT-4o (paper)") < said.index("here: gpt-4o:random@30, strict") < said.index("LLaVA-Med (paper)")
    assert "not in the paper: text-only" in said
    assert "Ran here: gpt-4o:random@30, strict, gpt-4o:random@30, lenient, learned." in said


def test_a_folder_without_a_table_is_a_sentence(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table1", "--bcnb", str(tmp_path)])
    with pytest.raises(SystemExit):
        run_command(main)
    assert "holds no table.json" in capsys.readouterr().err
