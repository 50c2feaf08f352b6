"""What other seeds of the recipe answer beside the shipped model, and how many of the phantoms' questions differ.

    python -m train.studies.seeds           # the table "Other seeds" of results/README.md, from the answers in results/
    python -m train.studies.seeds --phantoms 26   # how many of README's questions about phantoms are different ones

Folder seed-S holds the answers of a model trained with seed S to the first questions of test seed S; rivals-real those
of the shipped model, trained with seed 0, to QUESTIONS of each test seed in turn. Intervals: Wilson's; of a difference,
a bootstrap over questions.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.command import run_command
from train.data.mosaic import FAMILIES, Facts, ask, phantom_seeds
from train.evaluate import read_records
from train.studies.grid import interval, points
from train.studies.rivals import share

QUESTIONS = 340  # of each test seed in rivals-real
PER_SLIDE, SIZE = 16, 16_000  # README's --per-slide and --size


def right(records: Sequence[dict], row: str) -> np.ndarray:
    """(Q,) 0 or 1."""
    return np.array([float(record[row] == record["answer"]) for record in records])


def difference(one: np.ndarray, other: np.ndarray) -> str:
    """Paired, in points."""
    return points(interval((one - other)[None]), "+")


def table(results: Path, seeds: Sequence[int]) -> str:
    """A line for each training; raises ValueError where its questions are not those of the shipped model."""
    shipped = read_records(results / "rivals-real" / "records.jsonl")
    trained = {seed: read_records(results / f"seed-{seed}" / "records.jsonl") for seed in seeds}
    count = min(map(len, trained.values()))
    if not shipped or not count:
        raise ValueError(f"{results} lacks the answers in rivals-real or in a seed-S. Pass --results and --seeds.")
    trained[0] = shipped
    lines = [
        "| seed | learned | minus shipped | farthest | random | text-only | learned minus farthest | not dominant |"
    ]
    lines.append("|" + "---|" * 8)
    for seed in sorted(trained):
        mine = [trained[seed][number] for number in range(count)]
        same = [shipped[QUESTIONS * seed + number] for number in range(count)]
        if [(r["answer"], r["options"]) for r in mine] != [(r["answer"], r["options"]) for r in same]:
            raise ValueError(f"seed-{seed} was asked other questions than the shipped model.")
        planted = [record for record in mine if record["family"] != "dominant"]
        cells = [str(seed), share(mine, "learned")]
        cells.append(difference(right(mine, "learned"), right(same, "learned")) if seed else "(shipped)")
        cells += [f"{100 * right(mine, row).mean():.1f}" for row in ("farthest", "random", "text-only")]
        cells += [difference(right(part, "learned"), right(part, "farthest")) for part in (mine, planted)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def different_questions(slides: int) -> tuple[int, int]:
    """(questions, different ones) that train.evaluate asks of the first so many test phantoms."""
    from sparsewsi.phantom import ground_truth

    asked = []
    for seed in phantom_seeds("test", slides):
        truth, rng = ground_truth(seed, SIZE), np.random.default_rng((seed, 1))  # as phantom_items draws them
        facts = Facts("phantom", truth.dominant, tuple(truth.present))
        drawn = [ask(facts, str(family), rng) for family in rng.permutation(FAMILIES * PER_SLIDE)]
        found = [question for question in drawn if question is not None][:PER_SLIDE]
        asked += [(seed, question.question, question.answer, tuple(sorted(question.options))) for question in found]
    return len(asked), len(set(asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--phantoms", type=int, help="count the questions about so many phantoms instead")
    given = parser.parse_args()
    if given.phantoms:
        print("{} questions, {} different ones".format(*different_questions(given.phantoms)))
    else:
        print(table(given.results, given.seeds))


if __name__ == "__main__":
    run_command(main)
