"""Is the evidence right? On mosaics it is known which patches show what was asked.

    python -m train.studies.evidence_check --model assets/demo-model --bank runs/b.safetensors --out runs/ev

Questions are those of train.evaluate about a tissue that is there: "which of these is present", and "does it contain X"
where it does. Two things are counted: how often the patch with the most evidence for the model's answer is a needle of
the asked kind, beside how often a patch drawn from the same selection would be; and how often the likeliest option
changes when the three patches with the most evidence are left out, against three drawn at random, on the same slides.
A killed run goes on where it stopped.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sparsewsi.model.selection import Selection
from sparsewsi.model.sparse_wsi import SparseWSI
from train.command import alone_in, fingerprint, run_command, write_whole
from train.data.mosaic import WORDS, mosaic_size
from train.data.packing import Question
from train.eval.scoring import wilson
from train.evaluate import Item, check_settings, mosaic_items, read_records

DROPPED = 3


def asked_kind(question: Question) -> str | None:
    """The kind of tissue that is asked for and that is in the slide; None for every other question."""
    kinds = {word: kind for kind, word in WORDS.items()}
    if question.family == "present":
        return kinds[question.answer]
    if question.family in ("contains", "diagnosis") and question.answer == "Yes":
        return kinds[question.question.removeprefix("Does this slide contain ").removesuffix("?")]
    return None


def cases(items: Iterator[Item], most: int) -> Iterator[tuple[Item, str]]:
    """The first `most` items whose question asks for a kind that is there, with that kind."""
    pairs = ((item, asked_kind(item.question)) for item in items)
    yield from itertools.islice(((item, kind) for item, kind in pairs if kind is not None), most)


def likeliest(model: SparseWSI, selection: Selection, question: Question) -> str:
    """The option the model holds likeliest."""
    return question.options[int(model.option_probs(selection, question.question, question.options).argmax())]


def check(model: SparseWSI, item: Item, kind: str, rng: np.random.Generator) -> dict:
    """One case: is the answer right, is its top patch a needle of the kind, does dropping patches change it."""
    selection, question = model.select(item.bag), item.question
    answer = likeliest(model, selection, question)
    chat = [{"role": "user", "content": question.question}]
    evidence = model.leave_one_out(selection, chat, answer, question.options)
    is_needle = item.kinds[selection.indices.numpy()] == kind  # (K,)
    first = evidence.order.tolist()
    random = rng.choice(len(first), min(DROPPED, len(first) - 1), replace=False).tolist()
    ranks = {"top": evidence.score_ranks[first[: len(random)]], "random": evidence.score_ranks[random]}
    changed = {
        name: likeliest(model, selection.without(dropped.tolist()), question) != answer
        for name, dropped in ranks.items()
    }
    return {
        "family": question.family,
        "kind": kind,
        "right": answer == question.answer,
        "top is needle": bool(is_needle[first[0]]),
        "top matters": float(evidence.effects[first[0]]) >= evidence.limit,
        "share of needles": float(is_needle.mean()),
        **{f"{name} changes": value for name, value in changed.items()},
    }


def sign_test(more: int, fewer: int) -> float:
    """Two-sided exact p of McNemar's test for pairs that differ one way and the other."""
    n = more + fewer
    tail = sum(math.comb(n, i) for i in range(min(more, fewer) + 1)) / 2**n
    return min(1.0, 2 * tail)


def table(records: list[dict]) -> str:
    """The counts as Markdown, over all cases, over those answered right, and over right ones where a patch matters."""
    right = [record for record in records if record["right"]]
    groups = {
        "all": records,
        "answered right": right,
        "answered right, a patch matters": [record for record in right if record["top matters"]],
    }
    lines = [
        "| cases | n | top patch is a needle of the kind | 95 % interval | a random kept patch is | "
        f"{DROPPED} top dropped: changed | {DROPPED} random dropped: changed | only top / only random | p |",
        "|" + "---|" * 9,
    ]
    for name, group in groups.items():
        hits = sum(record["top is needle"] for record in group)
        low, high = wilson(hits, len(group))
        top, random = (sum(record[f"{row} changes"] for record in group) for row in ("top", "random"))
        only_top = sum(record["top changes"] and not record["random changes"] for record in group)
        only_random = sum(record["random changes"] and not record["top changes"] for record in group)
        chance = np.mean([record["share of needles"] for record in group]) if group else math.nan
        lines.append(
            f"| {name} | {len(group)} | {hits / max(1, len(group)):.1%} | {low:.1%} to {high:.1%} | {chance:.1%} | "
            f"{top} | {random} | {only_top} / {only_random} | {sign_test(only_top, only_random):.2g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/demo-model"))
    parser.add_argument("--bank", type=Path, required=True, help="feature bank of labelled patches")
    parser.add_argument("--split", default="test")
    parser.add_argument("--n", type=mosaic_size, default=1024, help="patches a slide")
    parser.add_argument("--needles", type=int, nargs=2, default=[4, 12], help="least and most patches of a focus")
    parser.add_argument("--questions", type=int, default=200, help="cases, one mosaic each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for records.jsonl and table.md")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(getattr(given, name)) for name in ("bank", "split", "n", "needles", "seed")}
    check_settings(given.out, settings | {"weights": fingerprint(sorted(given.model.rglob("*.safetensors")))})
    log = given.out / "records.jsonl"
    records = read_records(log)
    model = SparseWSI.from_pretrained(given.model)
    fewest, most = given.needles
    questions = 10 * given.questions  # two in five are cases
    items = mosaic_items(given.bank, given.split, questions, given.n, given.seed, (fewest, most))
    with alone_in(log.parent), log.open("a") as file:
        for number, (item, kind) in enumerate(tqdm(cases(items, given.questions), total=given.questions, disable=None)):
            if number not in records:
                records[number] = check(model, item, kind, np.random.default_rng((given.seed, number)))
                file.write(json.dumps({"number": number, **records[number]}) + "\n")
                file.flush()
    text = table([records[number] for number in sorted(records)])
    write_whole(given.out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_command(main)
