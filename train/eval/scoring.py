"""From answers to shares: how often each row is right, overall and by kind of question and size of slide.

A record is a dict of one item: number, slide, family, answer, options, n (patches), and per row of the table what it
chose (text of an option, or None where it chose none); "<row> text" is what it wrote, "<row> recall" the share of
needle patches it kept, "<row> kinds" the share of needle kinds of which it kept one. A row is a selector, or
"selector@K", "all" or "text-only"; "<row>, strict" and "<row>, lenient" are readings of what the row wrote.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data.kinds import FAMILIES
from train.eval.statistics import Estimate, estimate_grouped_share, estimate_share
from train.eval.table import write_percent, write_table

Record = dict[str, Any]
Counts = dict[str, tuple[int, int]]  # of what -> right, asked


@dataclass(frozen=True)
class Score:
    """How a row did on the items that it was asked."""

    right: int
    n: int
    wilson: Estimate  # takes questions about one slide for independent
    slides: int
    slide_bootstrap: Estimate | None  # where slides are asked several times; too narrow where they are few
    needle_recall: float | None
    kinds_found: float | None
    by_family: Counts
    by_detail: Counts
    by_size: Counts

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.n)

    @property
    def estimate(self) -> Estimate:
        """Accuracy with the wider of its two intervals."""
        other = self.slide_bootstrap or self.wilson
        return Estimate(self.accuracy, min(self.wilson.low, other.low), max(self.wilson.high, other.high))


def is_right(record: Record, row: str) -> bool:
    """Whether a row of a record chose the answer."""
    return record[row] == record["answer"]


def add_majority(records: Sequence[Record], letters: bool = False) -> None:
    """Add the most frequent answer of the record's family as the row "majority".

    letters: the most frequent letter instead, in families where that is right more often; in a file where every
    question has its own options it is.
    """
    answers: dict[str, Counter] = defaultdict(Counter)
    places: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        answers[record["family"]][record["answer"]] += 1
        if letters:
            places[record["family"]][record["options"].index(record["answer"])] += 1
    for record in records:
        [(record["majority"], count)] = answers[record["family"]].most_common(1)
        for place, right in places[record["family"]].most_common(1):
            if right > count:
                record["majority"] = record["options"][place] if place < len(record["options"]) else None


def score_rows(records: Sequence[Record], rows: Sequence[str]) -> dict[str, Score]:
    """The score of each row and of the majority answer; n tells where a slow row was asked fewer items."""
    seen = {record["family"] for record in records}
    families = [*(family for family in FAMILIES if family in seen), *sorted(seen - set(FAMILIES))]
    return {row: _score(records, row, families) for row in (*rows, "majority")}


def _score(records: Sequence[Record], row: str, families: Sequence[str]) -> Score:
    asked = [record for record in records if row in record]
    right = sum(is_right(record, row) for record in asked)
    by_slide = _count(asked, row, (record["slide"] for record in asked))
    bootstrap = None
    if 1 < len(by_slide) < len(asked):
        bootstrap = estimate_grouped_share([r for r, _ in by_slide.values()], [n for _, n in by_slide.values()])
    by_family = dict.fromkeys(families, (0, 0)) | _count(asked, row, (record["family"] for record in asked))
    detailed = [record for record in asked if record.get("detail")]
    sized = sorted((record for record in asked if record["n"]), key=lambda record: record["n"])
    return Score(
        right,
        len(asked),
        estimate_share(right, len(asked)),
        len(by_slide),
        bootstrap,
        average(asked, f"{row} recall"),
        average(asked, f"{row} kinds"),
        by_family,
        dict(sorted(_count(detailed, row, (record["detail"] for record in detailed)).items())),
        _count(sized, row, (size_range(record["n"]) for record in sized)),
    )


def _count(records: Sequence[Record], row: str, names: Iterable[str]) -> Counts:
    counts: Counts = {}
    for record, name in zip(records, names):
        right, n = counts.get(name, (0, 0))
        counts[name] = right + is_right(record, row), n + 1
    return counts


def average(records: Iterable[Record], name: str) -> float | None:
    """Mean of a figure over the records that have it; None where none has."""
    found = [record[name] for record in records if name in record]
    return float(np.mean(found)) if found else None


def size_range(n: int) -> str:
    """The range [2^i, 2^(i + 1)) that n patches fall into."""
    low = 1 << (n.bit_length() - 1)
    return f"{low:,} to {2 * low - 1:,}"


def list_sizes(scores: dict[str, Score]) -> list[str]:
    """The ranges of N that occur, from small to large."""
    found = {name for score in scores.values() for name in score.by_size}
    return sorted(found, key=lambda name: int(name.split()[0].replace(",", "")))


def write_scores(scores: dict[str, Score]) -> str:
    """The scores as a Markdown table, and a second one per range of N where there are several."""
    families = list(next(iter(scores.values())).by_family) if scores else []
    head = ["row", "accuracy", "95 % interval", "n", "needle recall", *(name or "all" for name in families)]
    rows = []
    for row, score in scores.items():
        _, low, high = score.estimate
        cells = [row, write_percent(score.accuracy, 1), f"{100 * low:.1f} to {100 * high:.1f}", score.n]
        rows.append([*cells, write_percent(score.needle_recall), *(f"{r}/{n}" for r, n in score.by_family.values())])
    text, sizes = write_table(head, rows), list_sizes(scores)
    if len(sizes) > 1:
        cells = [[_write_counts(score.by_size.get(size)) for score in scores.values()] for size in sizes]
        text += "\n\n" + write_table(["N", *scores], ([size, *row] for size, row in zip(sizes, cells)))
    return text


def _write_counts(counts: tuple[int, int] | None) -> str:
    return f"{write_percent(counts[0] / counts[1], 1)} ({counts[0]}/{counts[1]})" if counts else ""
