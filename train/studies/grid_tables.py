"""The three tables of the grid (train/studies/grid.py), from the answers that there are.

S seeds, Q questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.eval.scoring import add_majority, average, is_right
from train.eval.statistics import Estimate, estimate_from_seeds, estimate_mean
from train.eval.table import write_percent, write_points, write_table
from train.run_folder import read_records
from train.studies.cells import CELLS, FREE, SWEEP, Plan, count_asked
from train.studies.mil import MIL

DIAGNOSIS = ("diagnosis",)  # families of questions; all others are microscopy


@dataclass(frozen=True)
class Answers:
    """What one row of one cell answered, over the seeds that are complete."""

    right: dict[int, np.ndarray]  # seed -> (Q,) 0 or 1
    recall: dict[int, float]  # seed -> mean needle recall
    families: np.ndarray  # (Q,) str

    def matrix(self, families: Sequence[str] | None = None, but: Sequence[str] = ()) -> np.ndarray:
        """(S, Q) of the seeds, of some families of questions."""
        keep = ~np.isin(self.families, but) if families is None else np.isin(self.families, families)
        return np.stack([self.right[seed] for seed in sorted(self.right)])[:, keep]


def read_answers(plan: Plan, out: Path, cell: str, row: str) -> Answers | None:
    """What is known of a row of a cell; None before one seed is complete. "majority" is a row of every cell."""
    right, recall, families = {}, {}, np.empty(0, str)
    for folder in sorted(out.glob("seed-*")):
        known = read_records(folder / cell / "records.jsonl")
        records = [known[number] for number in sorted(known) if number < count_asked(plan, row)]
        if not records or len(records) < count_asked(plan, row):
            continue
        add_majority(records)
        if all(row in record for record in records):
            seed = int(folder.name.removeprefix("seed-"))
            right[seed] = np.array([float(is_right(record, row)) for record in records])
            found = average(records, f"{row} recall")
            if found is not None and row != "soft":  # it holds all patches, if only as noise
                recall[seed] = found
            families = np.array([record["family"] for record in records])
    return Answers(right, recall, families) if right else None


@dataclass(frozen=True)
class Line:
    """A line of a table: which row of which cell it shows, and the difference in points that the paper reports."""

    name: str
    cell: str
    row: str = "learned"
    paper: float | None = None


def list_lines() -> dict[str, list[Line]]:
    """The lines of each table, by its title."""
    which = [Line("learned top-K", "learned")]
    which += [Line(f"{cell} top-K", cell) for cell in ("straight-through", "gumbel")]
    for selector in (MIL, *FREE):
        which.append(Line(f"{selector}, LLM of dense", "dense", selector))
        if selector in CELLS[0].rows:
            which.append(Line(f"{selector}, LLM of learned", "learned", selector))
        if selector in FREE:
            which.append(Line(f"{selector}, LLM tuned on it", f"{selector}-tuned", selector))
    for row in ("all", "text-only"):
        which += [Line(f"{row}, LLM of {cell}", cell, row) for cell in ("dense", "learned")]
    which.append(Line("majority", "learned", "majority"))
    ablations = [Line(cell.name, cell.name, paper=cell.paper) for cell in CELLS if cell.table == 2]
    ablations += [Line(f"learned, asked with K = {k}", "learned", f"learned@{k}") for k in SWEEP]
    paths = [
        Line("hard top-K, as at inference", "learned"),
        Line("hard top-K through the denoiser", "learned", "denoised"),
        Line("soft path at the last tau, all N tokens, noise and denoiser", "learned", "soft"),
    ]
    return {
        "Table 1: which patches": which,
        "Table 2: ablations, as paired differences from the learned cell": ablations,
        "Table 3: training path and inference path of one checkpoint": paths,
    }


@dataclass(frozen=True)
class Entry:
    """The figures of a line; differences are from the learned cell, over the seeds and first questions of both."""

    seeds: list[int]
    questions: int
    overall: Estimate
    microscopy: Estimate | None
    diagnosis: Estimate | None
    by_seed: dict[int, float]
    needle_recall: float | None
    difference: Estimate | None
    difference_by_seed: dict[int, float]
    recall_difference: Estimate | None
    paper: float | None


def measure(found: Answers, reference: Answers | None, paper: float | None) -> Entry:
    """The figures of a row of a cell. reference: what it is compared with, None for itself."""
    parts = [found.matrix(), found.matrix(but=DIAGNOSIS), found.matrix(families=DIAGNOSIS)]
    overall, microscopy, diagnosis = (estimate_mean(values) if values.size else None for values in parts)
    assert overall is not None
    changes, recalls = {}, []
    if reference is not None:
        both = min(len(found.families), len(reference.families))
        seeds = sorted(set(found.right) & set(reference.right))
        changes = {seed: found.right[seed][:both] - reference.right[seed][:both] for seed in seeds}
        if both == len(found.families) == len(reference.families):
            counted = [seed for seed in seeds if seed in found.recall and seed in reference.recall]
            recalls = [found.recall[seed] - reference.recall[seed] for seed in counted]
    return Entry(
        sorted(found.right),
        len(found.families),
        overall,
        microscopy,
        diagnosis,
        {seed: float(values.mean()) for seed, values in sorted(found.right.items())},
        float(np.mean(list(found.recall.values()))) if found.recall else None,
        estimate_mean(np.stack(list(changes.values()))) if changes else None,
        {seed: float(values.mean()) for seed, values in changes.items()},
        estimate_from_seeds(recalls),
        paper,
    )


def make_tables(plan: Plan, out: Path) -> dict[str, dict[str, Entry]]:
    """The entries of each table, by title and line, from the records that there are."""
    reference = read_answers(plan, out, "learned", "learned")
    tables: dict[str, dict[str, Entry]] = {}
    for title, lines in list_lines().items():
        tables[title] = {}
        for line in lines:
            found = read_answers(plan, out, line.cell, line.row)
            if found is not None:
                other = None if (line.cell, line.row) == ("learned", "learned") else reference
                tables[title][line.name] = measure(found, other, line.paper)
    return tables


def write_tables(plan: Plan, tables: dict[str, dict[str, Entry]]) -> str:
    """The tables as Markdown."""
    sections = [f"## {title}\n\n{write_entries(entries)}" for title, entries in tables.items() if entries]
    sections.append(
        f"{count_asked(plan)} questions of each seed ({count_asked(plan, 'all')} for all patches and for other K) "
        f"on mosaics of {plan.n} patches, the same for all rows; points with 95 % intervals, Student's t over seeds "
        "(of one: questions resampled); differences are paired by question and seed, those of recall by seed."
    )
    return "\n\n".join(sections)


def write_entries(entries: dict[str, Entry]) -> str:
    """The lines of a table as Markdown, with what the paper reports where it reports anything."""
    with_paper = any(entry.paper is not None for entry in entries.values())
    head = ["row", "overall", "by seed", "microscopy", "diagnosis", "minus learned", "needle recall"]
    head += ["recall minus learned", "seeds x questions"]
    if with_paper:
        head += ["the paper's", "agreement"]
    rows = []
    for name, entry in entries.items():
        by_seed = ", ".join(f"{100 * value:.1f}" for value in entry.by_seed.values())
        cells = [name, write_points(entry.overall), by_seed]
        cells += [write_points(entry.microscopy), write_points(entry.diagnosis), write_points(entry.difference, "+")]
        cells += [write_percent(entry.needle_recall), write_points(entry.recall_difference, "+")]
        cells.append(f"{len(entry.seeds)} x {entry.questions}")
        if with_paper:
            paper = "" if entry.paper is None else f"{entry.paper:+.1f}"
            cells += [paper, describe_agreement(entry.difference, entry.paper)]
        rows.append(cells)
    return write_table(head, rows)


def describe_agreement(difference: Estimate | None, paper: float | None) -> str:
    """Whether our paired difference and the paper's say the same, in words."""
    if difference is None or paper is None:
        return ""
    _, low, high = (100 * value for value in difference)
    if low <= 0 <= high:
        clear = "no clear difference here"
    else:
        clear = "same direction" if (high < 0) == (paper < 0) else "the other direction"
    return f"{clear}; the paper's figure is {'within' if low <= paper <= high else 'outside'} our interval"
