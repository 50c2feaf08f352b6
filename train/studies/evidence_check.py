"""Is the evidence right? On mosaics it is known which patches show what was asked.

    python -m train.studies.evidence_check --model assets/demo-model --bank runs/b.safetensors --out runs/ev

Questions are those of train.evaluate about a tissue that is there: "which of these is present", and "does it contain X"
where it does. Two things are counted: how often the patch with the most evidence for the model's answer is a needle of
the asked kind, beside how often a patch drawn from the same selection would be; and how often the likeliest option
changes when the three patches with the most evidence are left out, against three drawn at random, on the same slides.
The same for whole foci (sparsewsi/model/foci.py): is the focus that the answer cites mostly of the asked kind, and does
the answer change without it, against as many patches drawn at random; and how often two patches of a focus are of one
kind, and two of one kind in one focus. A killed run goes on where it stopped.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from sparsewsi.files import append_line, write_text
from sparsewsi.model.foci import find_foci
from sparsewsi.model.selection import Selection
from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.example import Question
from train.data.kinds import WORDS
from train.eval.items import Item, make_mosaic_items
from train.eval.scoring import average
from train.eval.statistics import estimate_share, sign_test
from train.eval.table import write_percent, write_points, write_table
from train.flags import add_flag, make_parser, run_command
from train.run_folder import claim, digest_model, hold, read_records

DROPPED = 3


def find_asked_kind(question: Question) -> str | None:
    """The kind of tissue that is asked for and that is in the slide; None for every other question."""
    kinds = {word: kind for kind, word in WORDS.items()}
    if question.family == "present":
        return kinds[question.answer]
    if question.family in ("contains", "diagnosis") and question.answer == "Yes":
        return kinds[question.question.removeprefix("Does this slide contain ").removesuffix("?")]
    return None


def choose_cases(items: Iterator[Item], most: int) -> Iterator[tuple[Item, str]]:
    """The first `most` items whose question asks for a kind that is there, with that kind."""
    pairs = ((item, find_asked_kind(item.question)) for item in items)
    yield from itertools.islice(((item, kind) for item, kind in pairs if kind is not None), most)


def choose_option(model: SparseWSI, selection: Selection, question: Question) -> str:
    """The option the model holds likeliest."""
    return question.options[int(model.option_probs(selection, question.question, question.options).argmax())]


def check(model: SparseWSI, item: Item, kind: str, rng: np.random.Generator) -> dict:
    """One case: is the answer right, is its top patch a needle of the kind, does dropping patches change it."""
    selection, question, bag = model.select(item.bag), item.question, item.bag
    answer = choose_option(model, selection, question)
    chat = [{"role": "user", "content": question.question}]
    kept, ranks = selection.indices, selection.ranks
    foci = find_foci(bag.coords[kept], bag.features[kept], bag.patch_size, ranks.tolist())
    evidence = model.leave_one_out(selection, chat, answer, question.options, groups=[focus.places for focus in foci])
    kinds = item.kinds[kept.numpy()]  # (K,)
    is_needle = kinds == kind
    first = evidence.order.tolist()
    random = rng.choice(len(first), min(DROPPED, len(first) - 1), replace=False).tolist()
    dropped = {"top": first[: len(random)], "random": random}
    together = np.zeros((len(kinds), len(kinds)), bool)  # in one focus
    for focus in foci:
        together[np.ix_(focus.places, focus.places)] = True
    pairs = np.triu_indices(len(kinds), 1)
    same, alike = together[pairs], (kinds[:, None] == kinds[None])[pairs]
    cited = {}
    if foci:
        focus = foci[int(evidence.group_effects.argmax())]
        most = min(len(focus.places), len(kinds) - 1)
        dropped |= {"focus": list(focus.places)[:most], "group": rng.choice(len(kinds), most, replace=False).tolist()}
        cited = {
            "focus is the kind": bool(is_needle[list(focus.places)].mean() > 0.5),
            "focus matters": float(evidence.group_effects.max()) >= evidence.limit,
        }
    changed = {
        name: choose_option(model, selection.without(ranks[places].tolist()), question) != answer
        for name, places in dropped.items()
    }
    return {
        "family": question.family,
        "kind": kind,
        "right": answer == question.answer,
        "top is needle": bool(is_needle[first[0]]),
        "top matters": float(evidence.effects[first[0]]) >= evidence.limit,
        "share of needles": float(is_needle.mean()),
        "pairs in a focus": [int((same & alike).sum()), int(same.sum()), int(alike.sum())],
        **cited,
        **{f"{name} changes": value for name, value in changed.items()},
    }


def write_counts(records: list[dict]) -> str:
    """The counts as Markdown, over all cases, over those answered right, and over right ones where a patch matters."""
    right = [record for record in records if record["right"]]
    groups = {
        "all": records,
        "answered right": right,
        "answered right, a patch matters": [record for record in right if record["top matters"]],
    }
    head = ["cases", "n", "top patch is a needle of the kind, %", "a random kept patch is"]
    head += [f"{DROPPED} top dropped: changed", f"{DROPPED} random dropped: changed", "only top / only random", "p"]
    rows = []
    for name, group in groups.items():
        hits = estimate_share(sum(record["top is needle"] for record in group), len(group))
        top, random = (sum(record[f"{row} changes"] for record in group) for row in ("top", "random"))
        only_top = sum(record["top changes"] and not record["random changes"] for record in group)
        only_random = sum(record["random changes"] and not record["top changes"] for record in group)
        cells = [name, len(group), write_points(hits), write_percent(average(group, "share of needles"), 1)]
        p = f"{sign_test(only_top, only_random):.2g}"
        rows.append([*cells, top, random, f"{only_top} / {only_random}", p])
    return write_table(head, rows)


def write_foci(records: list[dict]) -> str:
    """The counts of foci as Markdown, of all cases with a focus, of those answered right, and where a focus matters."""
    with_focus = [record for record in records if "focus changes" in record]
    right = [record for record in with_focus if record["right"]]
    groups = {
        "with a focus": with_focus,
        "answered right": right,
        "answered right, a focus matters": [record for record in right if record["focus matters"]],
    }
    head = [
        "cases",
        "n",
        "cited focus is the asked tissue, %",
        "changed without it, %",
        "without a random group, %",
        "p",
    ]
    rows = []
    for name, group in groups.items():
        counts = (
            sum(record[key] for record in group) for key in ("focus is the kind", "focus changes", "group changes")
        )
        only = sum(record["focus changes"] and not record["group changes"] for record in group)
        other = sum(record["group changes"] and not record["focus changes"] for record in group)
        shares = [write_points(estimate_share(count, len(group))) for count in counts] if group else ["–"] * 3
        rows.append([name, len(group), *shares, f"{sign_test(only, other):.2g}"])
    both, same, alike = (sum(record["pairs in a focus"][i] for record in records) for i in range(3))
    pairs = (
        f"Two patches of a focus are of one kind in {both / max(same, 1):.1%} of {same:,} pairs; two of one kind are "
        f"in one focus in {both / max(alike, 1):.1%} of {alike:,}."
    )
    return f"{write_table(head, rows)}\n\n{pairs}"


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--model")
    add_flag(parser, "--bank", required=True)
    add_flag(parser, "--split")
    add_flag(parser, "--n")
    add_flag(parser, "--needles")
    add_flag(parser, "--questions", default=200, help="cases, one mosaic each")
    add_flag(parser, "--seed")
    add_flag(parser, "--out", help="folder for records.jsonl and table.md")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    settings = {name: str(getattr(given, name)) for name in ("bank", "split", "n", "needles", "seed")}
    claim(given.out, settings | {"weights": digest_model(given.model)})
    log = given.out / "records.jsonl"
    model = SparseWSI.from_pretrained(given.model)
    questions = 10 * given.questions  # two in five are cases
    items = make_mosaic_items(given.bank, given.split, questions, given.n, given.seed, tuple(given.needles))
    with hold(given.out):
        records = read_records(log)
        cases = choose_cases(items, given.questions)
        for number, (item, kind) in enumerate(tqdm(cases, total=given.questions, disable=None)):
            if number not in records:
                records[number] = check(model, item, kind, np.random.default_rng((given.seed, number)))
                append_line(log, {"number": number, **records[number]})
    found = [records[number] for number in sorted(records)]
    text = f"{write_counts(found)}\n\n{write_foci(found)}"
    write_text(given.out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_command(main)
