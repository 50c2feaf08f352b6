"""What the learned top-K is compared with: other selectors, attention MIL, and its own training path.

    python -m train.studies.rivals --checkpoint runs/demo2/checkpoints/last --bank runs/real.safetensors --out runs/gap

asks a checkpoint the same questions on three paths: the hard top-K of inference, the same through the denoiser, and the
soft path of training at its last temperature. How much they differ is the gap between training and inference.

    python -m train.studies.rivals --model assets/demo-model --bank runs/real.safetensors --seed 0 1 2 \\
        --questions 340 --mil-banks runs/real.safetensors runs/phantom.safetensors --out runs/rivals

asks one model the same questions about the patches that each selector keeps, a set of questions for each seed.
Attention MIL is trained first, on the train split of --mil-banks, on as many bags as the demo's stage 2.
train/studies/grid.py compares selectors with a language model trained on each.

    python -m train.studies.rivals --tables --out train/studies/answers/rivals-real

prints the tables again, from the answers that are there.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from sparsewsi.files import write_json, write_text
from sparsewsi.model.selector import SELECTORS
from train.eval.items import make_mosaic_items
from train.eval.running import Way, evaluate
from train.eval.scoring import Record, add_majority, average, is_right, score_rows, write_scores
from train.eval.statistics import Estimate, estimate_mean, estimate_share
from train.eval.table import write_percent, write_points, write_table
from train.flags import add_flag, make_parser, run_command
from train.run_folder import claim, digest_model, read_records
from train.studies.contenders import PATHS, Contender, load_contender
from train.studies.mil import MIL, load_or_train_mil


def estimate_accuracy(records: Sequence[Record], row: str) -> Estimate:
    """Accuracy of a row over the questions that it was asked."""
    asked = [record for record in records if row in record]
    return estimate_share(sum(is_right(record, row) for record in asked), len(asked))


def compare(records: Sequence[Record], row: str, other: str = "learned") -> Estimate | None:
    """Paired difference in accuracy, row minus other, over the questions that both were asked."""
    both = [record for record in records if row in record and other in record]
    values = [float(is_right(record, row)) - float(is_right(record, other)) for record in both]
    return estimate_mean(np.array([values])) if values else None


def leave_out(records: Sequence[Record], family: str) -> list[Record]:
    """The records of all other families of questions."""
    return [record for record in records if record["family"] != family]


def write_comparison(records: Sequence[Record], rows: Sequence[str]) -> str:
    """Rows as Markdown: overall, microscopy and diagnosis in percent, and the paired difference from learned.

    Needle recall is the share of needle patches that are kept, kinds found that of the needle kinds of which one is.
    The difference also without the family "dominant", which is about the background and not about what is planted.
    """
    head = ["row", "overall", "microscopy", "diagnosis", "needle recall", "kinds found", "minus learned"]
    head += ["the same without dominant", "n"]
    microscopy, planted = leave_out(records, "diagnosis"), leave_out(records, "dominant")
    diagnosis = [record for record in records if record["family"] == "diagnosis"]
    lines = []
    for row in rows:
        cells = [row, *(write_points(estimate_accuracy(part, row)) for part in (records, microscopy, diagnosis))]
        cells += [write_percent(average(records, f"{row} {what}")) for what in ("recall", "kinds")]
        for asked in (records, planted):
            cells.append(write_points(compare(asked, row), "+") if row != "learned" else "")
        lines.append([*cells, sum(row in record for record in records)])
    return write_table(head, lines)


def write_tables(known: dict[int, Record], rows: Sequence[str] | None = None, out: Path | None = None) -> str:
    """The tables of answers in Markdown, of all rows that were asked or of these; out: also table.json, table.md."""
    records = [known[number] for number in sorted(known)]
    add_majority(records)
    names = (*PATHS, *SELECTORS, MIL, "all", "text-only")
    rows = tuple(rows or (name for name in names if any(name in record for record in records)))
    scores = score_rows(records, rows)
    text = write_scores(scores)
    if "learned" in rows:
        text += "\n\n" + write_comparison(records, (*rows, "majority"))
    if out is not None:
        write_json(out / "table.json", {"rows": {name: asdict(score) for name, score in scores.items()}})
        write_text(out / "table.md", text + "\n")
    return text


def main() -> None:
    parser = make_parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", type=Path, help="of train.run; knows its training path as well")
    what.add_argument("--model", type=Path, help="a released model")
    add_flag(parser, "--bank")
    add_flag(parser, "--n")
    add_flag(parser, "--questions", help="of each seed, one mosaic each")
    add_flag(parser, "--seed", nargs="+", default=[0])
    add_flag(parser, "--needles")
    parser.add_argument(
        "--mil-banks", type=Path, nargs="+", help="what attention MIL is trained on; without, it is no row"
    )
    parser.add_argument("--rows", nargs="+", help="default: the paths of a checkpoint, the selectors for a model")
    add_flag(parser, "--out", help="folder for records.jsonl, table.json and table.md")
    add_flag(parser, "--tables")
    given = parser.parse_args()
    log = given.out / "records.jsonl"
    if given.tables:
        print(write_tables(find_answers(log), given.rows))
        return
    source = given.checkpoint or given.model
    if source is None or given.bank is None:
        raise ValueError("Say what is asked, with --checkpoint or --model, and about what, with --bank.")
    settings = {name: str(getattr(given, name)) for name in ("checkpoint", "model", "bank", "n", "seed", "needles")}
    if len(given.seed) > 1:  # else more questions can be asked later
        settings["questions"] = str(given.questions)
    claim(given.out, settings | {"weights": digest_model(source)})
    if given.checkpoint:
        model, rows = load_contender(given.checkpoint), PATHS
    else:
        model, rows = Contender.from_pretrained(given.model), ("learned", *SELECTORS, "text-only")
        assert isinstance(model, Contender)
    if given.mil_banks:
        model.add_selector(MIL, load_or_train_mil(given.mil_banks, given.out / f"{MIL}.safetensors").select)
        rows = (*rows, MIL)
    rows = tuple(given.rows or rows)
    items = chain.from_iterable(
        make_mosaic_items(given.bank, "test", given.questions, given.n, seed, tuple(given.needles))
        for seed in given.seed
    )
    evaluate(model, items, given.questions * len(given.seed), Way(rows), log)
    print(write_tables(read_records(log), rows, given.out))


def find_answers(log: Path) -> dict[int, Record]:
    """The records of a log. Raises ValueError if there are none."""
    known = read_records(log)
    if not known:
        raise ValueError(f"{log.parent} holds no answers; --out is the folder of answers that were asked for.")
    return known


if __name__ == "__main__":
    run_command(main)
