"""How often the model answers right, with which patches, against what.

    python -m train.evaluate mosaic --model assets/demo-model --bank runs/real.safetensors --n 1024 --questions 400
    python -m train.evaluate phantom --model assets/demo-model --slides 30 --out runs/eval-phantom

Every question is multiple choice and is answered by the likeliest option (mean log-likelihood per token of the option's
text). Rows: the learned top-K, K random patches and all N patches of the same artefact; the text alone (no visual
token); the majority answer, that is the most frequent answer of each question family in this very set, an optimistic
constant. Intervals are Wilson's at 95 %; where several questions share a slide, a bootstrap over slides as well.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sparsewsi.bag import Bag, extract_bag, load_bag, save_bag
from sparsewsi.model import Selection, SparseWSI
from sparsewsi.prompt import text_ids
from train.data import Example, Question, answer_logits, pack
from train.mosaic import FAMILIES, NEEDLE_KINDS, Facts, ask, balanced_set, load_bank

ROWS = ("learned", "random", "all", "text-only")


@dataclass(frozen=True)
class Item:
    """One test question: a bag, the kinds of its patches, and what was asked."""

    bag: Bag
    kinds: np.ndarray  # (N,) str
    question: Question


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, centre = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@torch.inference_mode()
def option_log_likelihoods(
    model: SparseWSI, tokens: Tensor, indices: Tensor, num_patches: int, question: Question
) -> Tensor:
    """Mean log-likelihood per token of each option as the answer, all options in one pass over one visual prefix.

    tokens: (K, D_v) with their original indices (K,); K = 0 asks the text alone. Returns (n_options,) float32.
    """
    variants = tuple(Question(question.question, option, question.options) for option in question.options)
    example = Example(tokens, indices, num_patches, variants)
    packed = pack(model.tokenizer, example, model.config.position, model.max_position)
    logits = answer_logits(model, model.project(tokens), packed)
    nll = F.cross_entropy(logits, packed.targets, reduction="none")  # (A,)
    ends = torch.cumsum(torch.tensor([len(text_ids(model.tokenizer, option)) + 1 for option in question.options]), 0)
    return -torch.stack([part.mean() for part in torch.tensor_split(nll, ends[:-1])])


def selection_of(model: SparseWSI, bag: Bag, row: str, k: int | None, seed: int) -> Selection:
    """The patches a row of the table lets the LLM see."""
    if row in ("all", "text-only"):
        x = model.encode(bag.features.float()) if row == "all" else torch.empty(0, model.config.dim)
        return Selection(torch.arange(len(x)), torch.zeros(len(bag.features)), x, len(bag.features))
    return model.select(bag, k, selector=row, seed=seed)


def evaluate(
    model: SparseWSI, items: Iterator[Item], total: int, rows: tuple[str, ...], k: int | None, log: Path
) -> list[dict]:
    """Answer every item once per row and return one record per item.

    The log gets a JSON line for every item as it is answered; what it holds already is not asked again, so that a
    killed run goes on where it stopped and rows can be added later.
    """
    records = read_records(log)
    with log.open("a") as file:
        for number, item in enumerate(tqdm(items, total=total, desc=log.stem, disable=None)):
            record = records.setdefault(number, {})
            missing = [row for row in rows if row not in record]
            if missing:
                new = {"number": number, **facts_of(item), **answers(model, item, missing, k, seed=number)}
                record |= new
                file.write(json.dumps(new) + "\n")
                file.flush()
    return [records[number] for number in sorted(records)]


def read_records(log: Path) -> dict[int, dict]:
    """Records by item number; lines about the same item are merged."""
    records: dict[int, dict] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        record = json.loads(line)
        records.setdefault(record["number"], {}).update(record)
    return records


def facts_of(item: Item) -> dict:
    """What a record says of an item whatever the row."""
    question = item.question
    return {
        "slide": item.bag.slide,
        "family": question.family,
        "answer": question.answer,
        "n": len(item.bag.features),
    }


def answers(model: SparseWSI, item: Item, rows: list[str], k: int | None, seed: int) -> dict:
    """The likeliest option per row, and the share of needle patches among the patches kept."""
    needles = np.flatnonzero(np.isin(item.kinds, NEEDLE_KINDS))
    found: dict = {}
    for row in rows:
        selection = selection_of(model, item.bag, row, k, seed)
        likelihoods = option_log_likelihoods(
            model, selection.tokens, selection.indices, selection.num_patches, item.question
        )
        found[row] = item.question.options[int(likelihoods.argmax())]
        if row not in ("all", "text-only") and len(needles):
            found[f"{row} recall"] = len(np.intersect1d(selection.indices.numpy(), needles)) / len(needles)
    return found


def majority(records: list[dict]) -> None:
    """Add the most frequent answer of the record's family as the row "majority"."""
    answers = defaultdict(Counter)
    for record in records:
        answers[record["family"]][record["answer"]] += 1
    for record in records:
        record["majority"] = answers[record["family"]].most_common(1)[0][0]


def slide_interval(records: list[dict], row: str, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy that resamples slides, not questions (seed 0)."""
    by_slide = defaultdict(list)
    for record in records:
        by_slide[record["slide"]].append(record[row] == record["answer"])
    right = np.array([sum(v) for v in by_slide.values()])
    n = np.array([len(v) for v in by_slide.values()])
    pick = np.random.default_rng(0).integers(0, len(n), (draws, len(n)))
    low, high = np.quantile(right[pick].sum(1) / n[pick].sum(1), [0.025, 0.975])
    return float(low), float(high)


def summary(records: list[dict], rows: tuple[str, ...]) -> dict:
    """Accuracy with its interval per row, overall and per family, and mean needle recall.

    A row counts the items that it was asked: n tells where a slow row was asked fewer.
    """
    table = {}
    for row in (*rows, "majority"):
        asked = [record for record in records if row in record]
        right = [record for record in asked if record[row] == record["answer"]]
        entry: dict = {"right": len(right), "n": len(asked), "wilson": wilson(len(right), len(asked))}
        entry["accuracy"] = len(right) / max(1, len(asked))
        slides = {record["slide"] for record in asked}
        if len(slides) < len(asked):
            entry |= {"slides": len(slides), "slide_bootstrap": slide_interval(asked, row)}
        recall = [record[f"{row} recall"] for record in asked if f"{row} recall" in record]
        if recall:
            entry["needle_recall"] = float(np.mean(recall))
        entry["families"] = {
            family: [sum(r["family"] == family for r in right), sum(r["family"] == family for r in asked)]
            for family in FAMILIES
        }
        table[row] = entry
    return table


def markdown(table: dict) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| row | accuracy | 95 % interval | n | needle recall | " + " | ".join(FAMILIES) + " |",
        "|" + "---|" * (5 + len(FAMILIES)),
    ]
    for row, entry in table.items():
        low, high = entry.get("slide_bootstrap", entry["wilson"])
        recall = f"{100 * entry['needle_recall']:.0f} %" if "needle_recall" in entry else ""
        shares = " | ".join(f"{right}/{n}" for right, n in entry["families"].values())
        accuracy = f"{100 * entry['accuracy']:.1f} % | {100 * low:.1f} to {100 * high:.1f}"
        lines.append(f"| {row} | {accuracy} | {entry['n']} | {recall} | {shares} |")
    return "\n".join(lines)


def mosaic_items(bank_file: Path, split: str, questions: int, n: int, seed: int) -> Iterator[Item]:
    """Balanced questions on mosaics of one split of a bank, one mosaic each."""
    for number, (bag, kinds, question) in enumerate(balanced_set(load_bank(bank_file, split), questions, n, seed)):
        yield Item(
            Bag(bag.features, bag.coords, bag.patch_size, bag.mpp, bag.encoder, f"mosaic {number}"), kinds, question
        )


def phantom_items(
    folder: Path, seeds: range, size: int, per_slide: int, progress: Callable[[str], None] = print
) -> Iterator[Item]:
    """Questions on whole phantom slides, written, opened and encoded as any slide is; bags are cached in folder."""
    from sparsewsi.phantom import load_truth, write_phantom

    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        slide, cached = folder / f"phantom-{seed}.tiff", folder / f"phantom-{seed}.safetensors"
        if not cached.exists():
            write_phantom(slide, seed=seed, size=size)
            save_bag(extract_bag(slide, "efficientnet-lite0"), cached)
            slide.unlink()  # the truth stays beside it, and the features are all that is asked about
            progress(f"phantom {seed}: {len(load_bag(cached).features)} patches")
        bag, truth = load_bag(cached), load_truth(slide)
        kinds = np.asarray(truth.label_at(bag.coords.numpy(), bag.patch_size))
        facts = Facts("phantom", truth.dominant, tuple(truth.present))
        rng = np.random.default_rng((seed, 1))
        asked = 0
        for family in rng.permutation(FAMILIES * per_slide):
            question = ask(facts, str(family), rng)
            if question is not None and asked < per_slide:
                asked += 1
                yield Item(bag, kinds, question)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["mosaic", "phantom"])
    parser.add_argument("--model", type=Path, default=Path("assets/demo-model"))
    parser.add_argument("--bank", type=Path, help="mosaic: the feature bank")
    parser.add_argument("--split", default="test")
    parser.add_argument("--n", type=int, default=1024, help="mosaic: patches a slide")
    parser.add_argument("--questions", type=int, default=400, help="mosaic: number of questions, one mosaic each")
    parser.add_argument("--slides", type=int, default=40, help="phantom: number of slides")
    parser.add_argument("--per-slide", type=int, default=10, help="phantom: questions a slide")
    parser.add_argument("--size", type=int, default=10_000, help="phantom: side of a slide in px")
    parser.add_argument("--k", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=Path, required=True, help="folder for records.jsonl, table.json and table.md")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.benchmark == "mosaic":
        items = mosaic_items(arguments.bank, arguments.split, arguments.questions, arguments.n, arguments.seed)
        total = arguments.questions
    else:
        items = phantom_items(
            arguments.out / "slides", range(3000, 3000 + arguments.slides), arguments.size, arguments.per_slide
        )
        total = arguments.slides * arguments.per_slide
    model = SparseWSI.from_pretrained(arguments.model)
    rows = tuple(arguments.rows)
    records = evaluate(model, items, total, rows, arguments.k, arguments.out / "records.jsonl")
    majority(records)
    table = summary(records, rows)
    settings = {name: str(value) for name, value in vars(arguments).items()}
    (arguments.out / "table.json").write_text(json.dumps({"settings": settings, "rows": table}, indent=2) + "\n")
    (arguments.out / "table.md").write_text(markdown(table) + "\n")
    print(markdown(table))


if __name__ == "__main__":
    main()
