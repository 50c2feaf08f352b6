"""Shares per row, with intervals that are never narrower than they may be, and their picture."""

from pathlib import Path

from train.eval.picture import draw_scores
from train.eval.scoring import add_majority, list_sizes, score_rows, write_scores


def test_an_interval_is_never_narrower_than_either_kind() -> None:
    records = [
        {"slide": f"s{i % 2}", "family": "x", "answer": "a", "options": ["a"], "n": 9, "row": "a"} for i in range(10)
    ]
    entry = score_rows(records, ("row",))["row"]
    assert entry.slide_bootstrap == (1.0, 1.0, 1.0)
    assert "| row | 100.0 % | 72.2 to 100.0 | 10 |" in write_scores({"row": entry})


def test_majority_is_by_letter_where_every_question_has_its_own_options() -> None:
    options = (("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"))
    records = [{"family": "", "options": list(o), "answer": o[i]} for o, i in zip(options, (0, 0, 0, 1))]
    add_majority(records, letters=True)
    assert [record["majority"] for record in records] == ["a", "c", "e", "g"]
    add_majority(records)
    assert [record["majority"] for record in records] == ["a"] * 4


def test_accuracy_per_interval_of_n_and_its_picture(tmp_path: Path) -> None:
    records = [
        {"slide": f"s{n}", "family": "x", "answer": "a", "options": ["a", "b"], "n": n, "learned": answer, "all": "a"}
        for n, answer in ((64, "a"), (127, "b"), (128, "a"), (10_240, "a"), (0, None))
    ]
    for record in records:
        record |= {f"learned@{k}": record["learned"] for k in (8, 128)}
    add_majority(records)
    table = score_rows(records, ("learned", "learned@8", "learned@128", "all"))
    assert table["learned"].by_size == {"64 to 127": (1, 2), "128 to 255": (1, 1), "8,192 to 16,383": (1, 1)}
    assert list_sizes(table) == ["64 to 127", "128 to 255", "8,192 to 16,383"]
    assert "| 64 to 127 | 50.0 % (1/2) |" in write_scores(table)
    draw_scores(table, 32, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000
