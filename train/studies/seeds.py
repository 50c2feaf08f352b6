"""What other seeds of the recipe answer beside the shipped model, and how many of the phantoms' questions differ.

    python -m train.studies.seeds                # a line a seed
    python -m train.studies.seeds --phantoms 26  # how many of the questions about phantoms are different ones

Folder seed-S holds the answers of a model trained with seed S to the first questions of test seed S; rivals-real those
of the shipped model, trained with seed 0, to QUESTIONS of each test seed in turn. Intervals: Wilson's; of a difference,
a bootstrap over questions.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.bank import list_phantom_seeds
from train.data.kinds import FAMILIES, Facts, ask
from train.eval.scoring import Record, is_right
from train.eval.statistics import estimate_mean
from train.eval.table import write_points, write_table
from train.flags import make_parser, run_command
from train.run_folder import read_records
from train.studies.rivals import compare, estimate_accuracy, leave_out

ANSWERS = Path(__file__).with_name("answers")
QUESTIONS = 340  # of each test seed in rivals-real
PER_SLIDE, SIZE = 16, 16_000  # of train.evaluate phantom, as docs/results.md has it
HEAD = (
    *("seed", "learned", "minus shipped", "farthest", "random", "text-only", "learned minus farthest"),
    "the same without dominant",
)


def list_right(records: Sequence[Record], row: str) -> np.ndarray:
    """(Q,) 0 or 1."""
    return np.array([float(is_right(record, row)) for record in records])


def write_seeds(answers: Path, seeds: Sequence[int]) -> str:
    """A line for each training; raises ValueError where its questions are not those of the shipped model."""
    shipped = read_records(answers / "rivals-real" / "records.jsonl")
    trained = {seed: read_records(answers / f"seed-{seed}" / "records.jsonl") for seed in seeds}
    count = min(map(len, trained.values()))
    if not shipped or not count:
        raise ValueError(f"{answers} lacks the answers in rivals-real or in a seed-S. Pass --answers and --seeds.")
    trained[0] = shipped
    lines = []
    for seed in sorted(trained):
        mine = [trained[seed][number] for number in range(count)]
        same = [shipped[QUESTIONS * seed + number] for number in range(count)]
        if [(r["answer"], r["options"]) for r in mine] != [(r["answer"], r["options"]) for r in same]:
            raise ValueError(f"seed-{seed} was asked other questions than the shipped model.")
        change = estimate_mean((list_right(mine, "learned") - list_right(same, "learned"))[None])
        cells = [seed, write_points(estimate_accuracy(mine, "learned"))]
        cells.append(write_points(change, "+") if seed else "(shipped)")
        cells += [f"{100 * list_right(mine, row).mean():.1f}" for row in ("farthest", "random", "text-only")]
        for part in (mine, leave_out(mine, "dominant")):
            cells.append(write_points(compare(part, "learned", "farthest"), "+"))
        lines.append(cells)
    return write_table(HEAD, lines)


def count_questions(slides: int) -> tuple[int, int]:
    """(questions, different ones) that train.evaluate asks of the first so many test phantoms."""
    from sparsewsi.phantom import ground_truth

    asked = []
    for seed in list_phantom_seeds("test", slides):
        truth, rng = ground_truth(seed, SIZE), np.random.default_rng((seed, 1))  # as make_phantom_items draws them
        facts = Facts("phantom", truth.dominant, tuple(truth.present))
        drawn = [ask(facts, str(family), rng) for family in rng.permutation(FAMILIES * PER_SLIDE)]
        found = [question for question in drawn if question is not None][:PER_SLIDE]
        asked += [(seed, question.question, question.answer, tuple(sorted(question.options))) for question in found]
    return len(asked), len(set(asked))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--answers", type=Path, default=ANSWERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--phantoms", type=int, help="count the questions about so many phantoms instead")
    given = parser.parse_args()
    if given.phantoms:
        asked, different = count_questions(given.phantoms)
        print(f"{asked} questions, {different} different ones")
    else:
        print(write_seeds(given.answers, given.seeds))


if __name__ == "__main__":
    run_command(main)
