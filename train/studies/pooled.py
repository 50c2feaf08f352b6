"""The pooled validation: real slides, mosaics and whole phantoms of the val split, and what is chosen on them.

    python -m train.studies.pooled --model my-model --slides runs/slides.safetensors --bank runs/tiles.safetensors \\
        --phantoms runs/phantoms --out runs/val

Ten real slides with two malignant ones decide nothing. A case is a patient's slides, a mosaic of an open world or a
phantom; of each, everything is asked that its facts answer, in all wordings of real slides. A kind of question counts
for what it is: balanced accuracy for yes and no, accuracy among four options; within a kind all cases count alike, and
the criterion is the mean over kinds. The folder gets a line a case and row (answers.jsonl); a run that was stopped goes
on.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.files import append_line, read_lines, write_text
from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.bank import Bank, load_bank
from train.data.example import Question
from train.data.kinds import Facts, ask
from train.data.open_world import WITHOUT, OpenWorld, absent_slides
from train.data.phantoms import Phantom, load_phantoms
from train.data.real import YES_NO, SlideFacts, load_slides, slide_bag
from train.data.tumours import BENIGN, MALIGNANT, UNCLEAR, ask_tumours
from train.eval.table import write_table
from train.flags import add_flag, make_parser, run_command
from train.stage import find_model_folder
from train.studies.real import all_questions, auc, is_right, keep, option_probs, says_yes

CHOSEN_ON = ("malignant", "carcinoma", "neoplasm", "organ", "category", "present", "absent", "contains")
YES_NO_KINDS = ("malignant", "carcinoma", "neoplasm", "contains")
MOSAICS = 24
DRAWS = 1000
Case = tuple[str, str, Bag, list[Question]]  # domain, name, bag, what is asked


def slide_cases(bank: Bank, slides: Sequence[SlideFacts]) -> Iterator[Case]:
    """Real slides; the case of a record is the patient's."""
    for slide in slides:
        asked = [question for question in all_questions(slide, slides) if question.family in CHOSEN_ON]
        if asked:
            yield "slides", slide.case, slide_bag(bank, slide.slide), asked


def mosaic_cases(bank: Bank, slides: Bank | None, count: int, n: int, seed: int) -> Iterator[Case]:
    """Mosaics of an open world, half of them with carcinoma."""
    world = OpenWorld(bank, slides, seed)
    side = int(np.ceil(np.sqrt(n)))
    row, column = np.divmod(np.arange(n), side)
    coords = torch.from_numpy(np.stack([column, row], 1).astype(np.int32) * 224)
    for number in range(count):
        rng = np.random.default_rng((seed, 37, number))
        mosaic = world.draw(n, (4, 12), rng, carcinoma=bool(number % 2))
        kinds = {kind for kind in set(mosaic.kinds.tolist()) if not kind.startswith(WITHOUT)}
        asked = tumour_questions(kinds, rng)
        if mosaic.certain:
            asked += other_questions(mosaic.facts, rng)
        else:
            asked = [question for question in asked if question.family != "neoplasm"]
        bag = Bag(mosaic.features, coords, 224, 0.5, bank.encoder, f"mosaic {number}")
        yield "mosaics", bag.slide, bag, asked


def phantom_cases(phantoms: Sequence[Phantom]) -> Iterator[Case]:
    """Whole phantoms."""
    for number, phantom in enumerate(phantoms):
        rng = np.random.default_rng((number, 41))
        facts = Facts("phantom", phantom.dominant, phantom.present)
        yield (
            "phantoms",
            phantom.bag.slide,
            phantom.bag,
            tumour_questions(phantom.present, rng) + other_questions(facts, rng),
        )


def tumour_questions(kinds: Sequence[str] | set[str], rng: np.random.Generator) -> list[Question]:
    """Tumours, in every wording; nothing where there is another tumour than carcinoma, which training has not seen."""
    others = {*MALIGNANT, *BENIGN, *(kind for some in UNCLEAR.values() for kind in some)} - {"carcinoma"}
    return [] if others & set(kinds) else ask_tumours(kinds, rng, every=True)


def other_questions(facts: Facts, rng: np.random.Generator) -> list[Question]:
    """Which tissue is there, which is not, and whether some are."""
    drawn = [ask(facts, family, rng) for family in ("present", "absent", *["contains"] * 4)]
    return list(
        dict.fromkeys(q for q in drawn if q is not None and (q.family != "contains" or "carcinoma" not in q.question))
    )


def answer_cases(model: SparseWSI, cases: Iterator[Case], rows: Sequence[str], log: Path) -> list[dict[str, Any]]:
    """One record per question and row; the log has a line per bag and row."""
    lines = list(read_lines(log))
    done = {(line["domain"], line["slide"], line["row"]) for line in lines}
    for domain, case, bag, questions in cases:
        for row in rows:
            if (domain, bag.slide, row) in done or not questions:
                continue
            probs = option_probs(model, keep(model, bag, row, model.config.num_tokens, 0), questions)
            asked = [
                {"kind": q.family, "question": q.question, "options": list(q.options), "answer": q.answer, "probs": p}
                for q, p in zip(questions, probs)
            ]
            line = {"domain": domain, "case": case, "slide": bag.slide, "row": row, "n": len(bag.features)}
            append_line(log, line | {"asked": asked})
            lines.append(line | {"asked": asked})
    return spread(lines)


def spread(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record per question of the lines of answers.jsonl."""
    return [
        {name: value for name, value in line.items() if name != "asked"} | asked
        for line in lines
        for asked in line["asked"]
    ]


def read_pooled(log: Path, row: str = "learned") -> list[dict[str, Any]]:
    """The records of a row of answers.jsonl."""
    return [record for record in spread(list(read_lines(log))) if record["row"] == row]


# ---------------------------------------------------------------------------------------------------------- scores


def share_right(records: Sequence[dict[str, Any]], right: Callable[[dict[str, Any]], bool] = is_right) -> float:
    """Share of right answers with all cases alike; NaN where there is none."""
    by_case = defaultdict(list)
    for record in records:
        by_case[record["domain"], record["case"]].append(right(record))
    return float(np.mean([np.mean(each) for each in by_case.values()])) if by_case else np.nan


def score_kind(
    records: Sequence[dict[str, Any]], kind: str, right: Callable[[dict[str, Any]], bool] = is_right
) -> float:
    """Balanced accuracy of a kind that is answered by yes and no, accuracy of another."""
    some = [record for record in records if record["kind"] == kind]
    if kind not in YES_NO_KINDS:
        return share_right(some, right)
    return float(np.mean([share_right([r for r in some if r["answer"] == answer], right) for answer in ("Yes", "No")]))


def score(records: Sequence[dict[str, Any]], right: Callable[[dict[str, Any]], bool] = is_right) -> float:
    """The criterion: mean over kinds."""
    return float(np.nanmean([score_kind(records, kind, right) for kind in CHOSEN_ON]))


def resample_cases(
    records: Sequence[dict[str, Any]], measure: Callable[[Sequence[dict[str, Any]]], float], draws: int = DRAWS
) -> np.ndarray:
    """The measure of `draws` resamples of cases, within each domain; the same resamples for the same cases."""
    by_case: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_case[record["domain"]][record["case"]].append(record)
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = []
        for _, cases in sorted(by_case.items()):
            names = sorted(cases)
            for number, name in enumerate(rng.choice(names, len(names))):
                drawn += [record | {"case": f"{name} {number}"} for record in cases[str(name)]]
        found.append(measure(drawn))
    return np.array(found)


# ---------------------------------------------------------------------------- the cut between Yes and No


def log_odds(record: dict[str, Any]) -> float:
    """Of Yes."""
    p = min(1 - 1e-4, max(1e-4, says_yes(record)))
    return float(np.log(p / (1 - p)))


def fit_shift(records: Sequence[dict[str, Any]]) -> float:
    """What to add to the log-odds of Yes so that the answers are likeliest; Yes counts as No, a case as a case."""
    number = defaultdict(int)
    for record in records:
        number[record["domain"], record["case"], record["answer"]] += 1
    z = np.array([log_odds(record) for record in records])
    yes = np.array([record["answer"] == "Yes" for record in records])
    weights = np.array([1 / number[r["domain"], r["case"], r["answer"]] for r in records])
    for some in (yes, ~yes):
        weights[some] /= max(1e-9, weights[some].sum())
    sign = np.where(yes, -1, 1)
    shifts = np.linspace(-4, 4, 321)
    loss = [(weights * np.logaddexp(0, sign * (z + shift))).sum() for shift in shifts]
    return float(shifts[int(np.argmin(loss))])


def shift_left_out(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a kind, each with the shift that is fitted on all other cases."""
    found = []
    for case in sorted({(record["domain"], record["case"]) for record in records}):
        shift = fit_shift([record for record in records if (record["domain"], record["case"]) != case])
        for record in records:
            if (record["domain"], record["case"]) == case:
                p = 1 / (1 + np.exp(-(log_odds(record) + shift)))
                found.append(record | {"options": ["Yes", "No"], "probs": [p, 1 - p]})
    return found


def table_of_shifts(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: the shift of each kind that asks for tumours, and what it does to cases that it was not fitted on."""
    lines = []
    for kind in YES_NO:
        some = [record for record in records if record["kind"] == kind]
        shifted = score_kind(shift_left_out(some), kind)
        lines.append([kind, f"{fit_shift(some):+.2f}", _percent(score_kind(some, kind)), _percent(shifted)])
    return write_table(["kind", "shift of the log-odds of Yes", "balanced", "balanced, shift of other cases"], lines)


def table_of_kinds(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per kind and domain, and the criterion."""
    lines = []
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        for kind in CHOSEN_ON:
            for domain in ("slides", "mosaics", "phantoms", ""):
                some = [r for r in mine if r["kind"] == kind and domain in ("", r["domain"])]
                if not some:
                    continue
                cells: list[Any] = [row, kind, domain or "all", len({(r["domain"], r["case"]) for r in some})]
                if kind in YES_NO_KINDS:
                    yes = [r for r in some if r["answer"] == "Yes"]
                    no = [r for r in some if r["answer"] == "No"]
                    cells += [f"{auc(some):.2f}", _percent(share_right(yes)), _percent(share_right(no))]
                    cells += [" / ".join(_median(each) for each in (yes, no))]
                else:
                    cells += ["", "", "", ""]
                lines.append([*cells, _percent(score_kind(some, kind))])
        draws = resample_cases(mine, score, 200)
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        cells = [row, "criterion", "all", len({(r["domain"], r["case"]) for r in mine}), "", "", "", ""]
        lines.append([*cells, f"{100 * score(mine):.1f} ({100 * low:.1f} to {100 * high:.1f})"])
    head = ["row", "kind", "domain", "cases", "AUC", "sensitivity", "specificity", "P(Yes) where Yes / No", "score"]
    return write_table(head, lines)


def _percent(share: float) -> str:
    return "" if np.isnan(share) else f"{share:.0%}"


def _median(records: Sequence[dict[str, Any]]) -> str:
    return f"{np.median([says_yes(record) for record in records]):.2f}" if records else ""


def compare(before: Path, after: Path, row: str = "learned") -> str:
    """How much the criterion of one folder's answers exceeds another's, over the same resamples of cases."""
    old, new = (read_pooled(folder / "answers.jsonl", row) for folder in (before, after))
    gap = resample_cases(new, score) - resample_cases(old, score)
    low, high = np.percentile(100 * gap, [2.5, 97.5])
    return (
        f"{100 * (score(new) - score(old)):+.1f} points ({low:+.1f} to {high:+.1f}); better in {(gap > 0).mean():.0%} "
        f"of {len(gap)} resamples"
    )


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--model")
    parser.add_argument("--slides", type=Path, required=True, help="bank of python -m train.data.real bank")
    add_flag(parser, "--bank", required=True)
    parser.add_argument("--phantoms", type=Path, required=True, help="folder of python -m train.data.phantoms")
    parser.add_argument("--rows", nargs="+", default=["learned"])
    parser.add_argument("--mosaics", type=int, default=MOSAICS, help="how many")
    parser.add_argument("--than", type=Path, help="--out of another model: say how much better this one is")
    add_flag(parser, "--n")
    add_flag(parser, "--seed")
    add_flag(parser, "--out")
    given = parser.parse_args()
    model = SparseWSI.from_pretrained(find_model_folder(given.model))
    given.out.mkdir(parents=True, exist_ok=True)
    bank, slides = load_slides(given.slides, "val")
    clean = [slide.slide for slide in slides if slide.facts["carcinoma"] == slide.facts["malignant"] == "No"]
    tiles = load_bank(given.bank, "val")
    log = given.out / "answers.jsonl"

    def cases() -> Iterator[Case]:
        yield from slide_cases(bank, slides)
        yield from phantom_cases(load_phantoms(given.phantoms, "val"))
        yield from mosaic_cases(tiles, absent_slides(bank, clean), given.mosaics, given.n, given.seed)

    records = answer_cases(model, cases(), given.rows, log)
    text = table_of_kinds(records)
    text += "\n\n" + table_of_shifts([record for record in records if record["row"] == given.rows[0]])
    if given.than:
        text += "\n\n" + compare(given.than, given.out)
    write_text(given.out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_command(main)
