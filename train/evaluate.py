"""How often the model answers right, with which patches, against what.

    python -m train.evaluate mosaic --model assets/demo-model --bank runs/real.safetensors --n 1024 --questions 400 \\
        --out runs/eval-real
    python -m train.evaluate phantom --model assets/demo-model --slides 30 --out runs/eval-phantom
    python -m train.evaluate tcga-1494 --data SlideBench-VQA-TCGA.csv --features features/ --model my-model \\
        --out runs/eval-tcga

The named benchmarks and the files they come as are in train/data/questions.py; `python -m train.data.questions check`
says beforehand what is missing. Every question is multiple choice and is answered by the likeliest option (mean
log-likelihood per token of the option's text); with --generate it is also answered in writing, which is read twice:
strict (a letter, or the text of one option, and nothing else) and lenient (train/eval/scoring.py).

Rows: the learned top-K, K random patches, K patches on a uniform grid and all N patches through the same artefact; the
text alone (no visual token); the majority answer, that is the most frequent answer of each question family in this very
set, an optimistic constant. A row "learned@8" keeps 8 patches, whatever --k says. Questions about slides without
features count as wrong (but for the text alone and the majority) unless --skip-missing leaves them out. Intervals are
Wilson's at 95 %; where several questions share a slide, a bootstrap over slides as well.

The folder --out gets a line per question as it is answered; a run that is stopped goes on, and asks no question twice.
"""

import argparse
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from sparsewsi.bags.bag import Bag, check_bag, save_bag
from sparsewsi.bags.extract import extract_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.prompt import format_question, text_ids
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import SELECTORS
from sparsewsi.model.sparse_wsi import SparseWSI
from train.command import alone_in, fingerprint, run_command, write_whole
from train.data.mosaic import FAMILIES, NEEDLE_KINDS, Facts, ask, balanced_set, load_bank, mosaic_size, phantom_seeds
from train.data.packing import Example, FeatureFolder, Packed, Question, Record, answer_logits, evenly, pack, visible
from train.data.questions import BENCHMARKS, BadRow, closed_questions, without_features
from train.eval.scoring import add_readings, majority, markdown, picture, summary

ROWS = ("learned", "random", "uniform", "all", "text-only")
WITHOUT_K = ("all", "text-only")


@dataclass(frozen=True)
class Item:
    """One test question: a bag, the kinds of its patches, and what was asked."""

    bag: Bag  # without patches where the slide has no usable features
    kinds: np.ndarray  # (N,) str; (0,) where they are not known
    question: Question
    slide: str = ""  # as the file of questions names it; "": bag.slide
    detail: str = ""
    missing: str = ""  # why there are no features
    rows: Tensor | None = None  # (N,) ascending: the bag's patches among all num_patches; None: they are all there are
    num_patches: int = 0

    def placed(self, selection: Selection) -> Selection:
        """A selection from the bag, with indices among all patches of the slide, as in training (train/data)."""
        if self.rows is None or not len(selection.indices):
            return selection
        return replace(selection, indices=self.rows[selection.indices], num_patches=self.num_patches)


def worded(question: Question, preset: str) -> Question:
    """A question in the words of a prompt preset.

    "slidechat": the options a line each after their letters, as SlideChat asks (and as train/data/packing.py trains);
    "plain": without letters, for an LLM to which letters mean nothing.
    """
    if preset == "slidechat" or not question.options:
        return question
    return replace(question, question=format_question(question.question, question.options, letters=False), options=())


class Prefix:
    """Keys and values of a slide's visual tokens, so that many questions about all N patches cost one pass over N."""

    def __init__(self) -> None:
        self.position_ids = torch.empty(0)
        self.cache = DynamicCache()

    def answer_logits(self, model: SparseWSI, tokens: Tensor, packed: Packed) -> Tensor:
        """What train.data.packing.answer_logits returns for tokens (N, D_v), which must be the same in every call."""
        length = len(packed.order) - len(packed.text_ids) + int((packed.order >= len(packed.text_ids)).nonzero()[0])
        position_ids = packed.position_ids[:length]
        embed = model.llm.get_input_embeddings()
        if not torch.equal(position_ids, self.position_ids):  # the first question, or one that squeezes positions
            self.position_ids, self.cache = position_ids, DynamicCache()
            text = embed(packed.text_ids.to(model.device))  # (T, H)
            sequence = torch.cat([text, model.project(tokens).to(text.dtype)])[packed.order[:length].to(model.device)]
            self._forward(model, sequence, packed, slice(0, length), 1)
        text = embed(packed.text_ids[packed.order[length:]].to(model.device))
        logits = self._forward(model, text, packed, slice(length, None), (packed.keep - length).to(model.device))
        self.cache.crop(-len(text))
        return logits

    def _forward(self, model: SparseWSI, embeds: Tensor, packed: Packed, part: slice, keep: Tensor | int) -> Tensor:
        if self.cache.get_seq_length():  # a question's rows alone: the whole mask would be quadratic in N
            mask = visible(packed.bag, packed.question, part)[None, None]
        else:
            mask = torch.ones(1, len(embeds), dtype=torch.long)  # causal
        with torch.autocast(embeds.device.type, torch.bfloat16, enabled=embeds.dtype == torch.bfloat16):
            output = model.llm(
                inputs_embeds=embeds[None],
                attention_mask=mask.to(embeds.device),
                position_ids=packed.position_ids[part][None].to(embeds.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return output.logits[0].float()


@torch.inference_mode()
def option_log_likelihoods(
    model: SparseWSI,
    tokens: Tensor,
    indices: Tensor,
    num_patches: int,
    question: Question,
    preset: str = "slidechat",
    prefix: Prefix | None = None,
) -> Tensor:
    """Mean log-likelihood per token of each option as the answer, all options in one pass over one visual prefix.

    tokens: (K, D_v) with their original indices (K,); K = 0 asks the text alone. prefix: shared by questions about the
    same tokens. Returns (n_options,) float32 on the CPU, -inf for an option that is empty.
    """
    prompt = worded(question, preset)
    real = [number for number, option in enumerate(question.options) if option.strip()]
    variants = tuple(replace(prompt, answer=question.options[number]) for number in real)
    example = Example(tokens, indices, num_patches, variants)
    packed = pack(model.tokenizer, example, model.config.position, model.max_position)
    if prefix is None:
        logits = answer_logits(model, model.project(tokens), packed).cpu()
    else:
        logits = prefix.answer_logits(model, tokens, packed).cpu()
    nll = F.cross_entropy(logits, packed.targets, reduction="none")  # (A,)
    ends = torch.cumsum(torch.tensor([len(text_ids(model.tokenizer, v.answer)) + 1 for v in variants]), 0)
    likelihoods = torch.full((len(question.options),), -torch.inf)
    likelihoods[real] = -torch.stack([part.mean() for part in torch.tensor_split(nll, ends[:-1])])
    return likelihoods


def likeliest(
    model: SparseWSI,
    selection: Selection,
    question: Question,
    preset: str = "slidechat",
    prefix: Prefix | None = None,
) -> str:
    """The option the model finds likeliest; by the options' letters if that is how its config says it was trained."""
    if model.config.option_scoring == "letter" and preset == "slidechat":
        scores = model.option_probs(selection, question.question, question.options)
    else:
        scores = option_log_likelihoods(
            model, selection.tokens, selection.indices, selection.num_patches, question, preset, prefix
        )
    return question.options[int(scores.argmax())]


def written_answer(model: SparseWSI, selection: Selection, question: Question, preset: str = "slidechat") -> str:
    """What the model writes, greedily."""
    prompt = worded(question, preset)
    message = {"role": "user", "content": prompt.question}
    return "".join(model.answer(selection, [message], prompt.options or None)).strip()


@torch.inference_mode()
def selection_of(model: SparseWSI, bag: Bag, row: str, k: int | None, seed: int) -> Selection:
    """The patches a row of the table lets the LLM see; "selector@K" keeps K instead of k.

    The text alone stands at the positions it has where there is no slide.
    """
    if row in WITHOUT_K:
        x = model.encode(bag.features).cpu() if row == "all" else torch.empty(0, model.config.dim)
        return Selection(torch.arange(len(x)), torch.zeros(len(bag.features)), x, len(x))
    selector, _, own = row.partition("@")
    return model.select(bag, int(own) if own else k, selector=selector, seed=seed)


def evaluate(
    model: SparseWSI,
    items: Iterator[Item],
    total: int,
    rows: tuple[str, ...],
    k: int | None,
    log: Path,
    preset: str = "slidechat",
    generate: bool = False,
) -> list[dict]:
    """Answer every item once per row and return one record per item.

    The log gets a JSON line for every item as it is answered; what it holds already is not asked again, so that a
    killed run goes on where it stopped and rows can be added later. Items without features get no line but for the text
    alone; they are tried again next time.
    """
    records = read_records(log)
    cut_off = log.exists() and log.read_bytes()[-1:] not in (b"", b"\n")
    whole: dict[
        int, tuple[Bag, Selection, Prefix]
    ] = {}  # the present slide's; the bag is held so that its id stays its
    with alone_in(log.parent), log.open("a") as file:
        file.write("\n" * cut_off)
        for number, item in enumerate(tqdm(items, total=total, desc=log.stem, disable=None)):
            record, facts = records.setdefault(number, {}), facts_of(item)
            if facts["n"] and record.get("n") and record.get("features", facts["features"]) != facts["features"]:
                raise ValueError(
                    f"the features of {facts['slide']} are others than those that {log} holds answers about. Choose "
                    "another --out."
                )
            record |= {"number": number, **facts}
            possible = [row for row in rows if row == "text-only" or len(item.bag.features)]
            if id(item.bag) not in whole:
                whole.clear()
            new = answers(model, item, possible, record, k, number, preset, generate, whole)
            if new:
                record |= new
                file.write(json.dumps({"number": number, **facts, **new}) + "\n")
                file.flush()
            for row in set(rows) - set(possible):
                record |= {row: None} | ({f"{row} text": ""} if generate else {})
    return [records[number] for number in sorted(records)]


def read_records(log: Path) -> dict[int, dict]:
    """Records by item number; lines about the same item are merged, a line cut off by a kill is left out."""
    records: dict[int, dict] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records.setdefault(record["number"], {}).update(record)
    return records


def facts_of(item: Item) -> dict:
    """What a record says of an item whatever the row."""
    question = item.question
    return {
        "slide": item.slide or item.bag.slide,
        "family": question.family,
        "answer": question.answer,
        "options": list(question.options),
        "n": len(item.bag.features),
        "features": f"{zlib.crc32(item.bag.features.numpy().data):08x}",
        "detail": item.detail,
        "missing": item.missing,
    }


def answers(
    model: SparseWSI,
    item: Item,
    rows: list[str],
    known: dict,
    k: int | None,
    seed: int,
    preset: str,
    generate: bool,
    whole: dict[int, tuple[Bag, Selection, Prefix]],
) -> dict:
    """What is not known yet: per row the likeliest option, what is written, the share of needle patches kept, and that
    of the needle kinds of which at least one patch is kept.

    whole: what the questions about all patches of one bag share, by the bag's id.
    """
    needles = np.flatnonzero(np.isin(item.kinds, NEEDLE_KINDS))
    planted = set(item.kinds[needles])
    found: dict = {}
    for row in rows:
        told = [row, *[f"{row} text"] * generate, *[f"{row} kinds"] * (row not in WITHOUT_K and len(needles) > 0)]
        if all(name in known for name in told):
            continue
        prefix = None
        if row == "all":
            if id(item.bag) not in whole:
                whole[id(item.bag)] = item.bag, selection_of(model, item.bag, row, k, seed), Prefix()
            _, selection, prefix = whole[id(item.bag)]
        else:
            selection = selection_of(model, item.bag, row, k, seed)
        placed = item.placed(selection)
        if row not in known:
            found[row] = likeliest(model, placed, item.question, preset, prefix)
        if row not in WITHOUT_K and len(needles):
            kept = np.intersect1d(selection.indices.numpy(), needles)
            found[f"{row} recall"] = len(kept) / len(needles)
            found[f"{row} kinds"] = len(planted & set(item.kinds[kept])) / len(planted)
        if generate and f"{row} text" not in known:
            found[f"{row} text"] = written_answer(model, placed, item.question, preset)
    return found


# ---- what is asked


def data_items(
    records: Sequence[Record],
    features: FeatureFolder,
    config: SparseWSIConfig,
    max_patches: int | None = None,
    progress: Callable[[str], object] = print,
) -> Iterator[Item]:
    """Questions of a file about slides whose features lie in a folder; a slide at a time is in memory.

    Slides whose features are missing, broken or not the model's become items without patches; each is named once.
    """
    said: set[str] = set()
    loaded: tuple[str, ...] = ()
    bag, missing, rows, num_patches = None, "", None, 0
    for record in records:
        name = " + ".join(record.slides)
        if bag is None or record.slides != loaded:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # positions that a file does not hold
                    whole = features.load(record.slides)
                check_bag(whole, config.encoder, config.feature_dim)
                rows = evenly(len(whole.features), max_patches)
                bag = replace(whole, features=whole.features[rows], coords=whole.coords[rows])
                num_patches = len(whole.features)
                missing = "" if len(rows) else "it has no patches"
            except ValueError as error:
                empty = torch.empty(0, config.feature_dim).half()
                bag = Bag(empty, torch.empty(0, 2).int(), 1, None, config.encoder, name)
                missing, rows = str(error), None
            loaded = record.slides
        if missing and name not in said:
            said.add(name)
            progress(f"{name} counts as missing: {missing}")
        yield Item(bag, np.empty(0, str), record.question, name, record.detail, missing, rows, num_patches)


def mosaic_items(
    bank_file: Path, split: str, questions: int, n: int, seed: int, per_needle: tuple[int, int] = (4, 12)
) -> Iterator[Item]:
    """Balanced questions on mosaics of one split of a bank, one mosaic each; per_needle: patches of a focus."""
    asked = balanced_set(load_bank(bank_file, split), questions, n, seed, per_needle)
    for number, (bag, kinds, question) in enumerate(asked):
        named = f"mosaic {number} of {n} patches, seed {seed}"
        yield Item(Bag(bag.features, bag.coords, bag.patch_size, bag.mpp, bag.encoder, named), kinds, question)


def phantom_items(
    folder: Path, seeds: range, size: int, per_slide: int, progress: Callable[[str], None] = print
) -> Iterator[Item]:
    """Questions on whole phantom slides, written, opened and encoded as any slide is; bags are cached in folder.

    Families come in random order. There are fewer facts than questions: a slide is asked some of them again, with the
    options in another order or with others.
    """
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


# ---- the command


def say(line: str) -> None:
    """A line above the progress bar."""
    tqdm.write(line, file=sys.stderr)


def check_settings(folder: Path, settings: dict) -> None:
    """Write the settings that the answers in a folder depend on, or raise ValueError if it holds those of others."""
    path = folder / "settings.json"
    if (folder / "records.jsonl").exists():
        if not path.exists():
            raise ValueError(f"{folder} holds answers, but not what was asked (settings.json). Choose another --out.")
        before = json.loads(path.read_text())
        other = sorted(name for name in settings if before.get(name) != settings[name])
        if other:
            changes = "; ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in other)
            raise ValueError(f"{folder} holds answers of another evaluation ({changes}). Choose another --out.")
    write_whole(path, json.dumps(settings, indent=2) + "\n")


def check_rows(rows: Sequence[str]) -> None:
    """Raise ValueError for a row that the table cannot have."""
    for row in rows:
        selector, at, own = row.partition("@")
        known = row in WITHOUT_K or ((selector == "learned" or selector in SELECTORS) and (own.isdecimal() or not at))
        if not known or (at and int(own) < 1):
            names = ", ".join(("learned", *SELECTORS, *WITHOUT_K))
            raise ValueError(f"{row!r} is no row. Choose of {names}, the selectors also as NAME@K.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["mosaic", "phantom", "file", *BENCHMARKS])
    parser.add_argument("--model", type=Path, default=Path("assets/demo-model"))
    parser.add_argument("--data", type=Path, nargs="+", help="named benchmarks, file: the files of questions")
    parser.add_argument("--features", type=Path, help="named benchmarks, file: folder of the slides' feature files")
    parser.add_argument("--max-patches", type=int, help="of a larger slide, so many patches, evenly spaced")
    parser.add_argument("--skip-missing", action="store_true", help="leave out questions about slides without features")
    parser.add_argument("--bank", type=Path, help="mosaic: the feature bank")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--n", type=mosaic_size, nargs="+", default=[1024], help="mosaic: patches a slide; several: each in turn"
    )
    parser.add_argument("--questions", type=int, default=400, help="mosaic: number of questions per N, one mosaic each")
    parser.add_argument("--slides", type=int, default=40, help="phantom: number of slides")
    parser.add_argument("--per-slide", type=int, default=10, help="phantom: questions a slide")
    parser.add_argument("--size", type=int, default=10_000, help="phantom: side of a slide in px")
    parser.add_argument("--k", type=int, default=None, help="patches kept; default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="selector, selector@K, all, text-only")
    parser.add_argument("--prompt", choices=["slidechat", "plain"], default="slidechat")
    parser.add_argument(
        "--generate", action="store_true", help="answer in writing as well, read strictly and leniently"
    )
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for records.jsonl, table.json, table.md, table.png"
    )
    arguments = parser.parse_args()
    run_command(lambda: print(run(arguments)))


def run(arguments: argparse.Namespace) -> str:
    """Evaluate as the flags say, write the tables, and return the one in Markdown with notes under it."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    config = SparseWSIConfig.load(arguments.model)
    notes: list[str] = []
    bad: list[BadRow] = []
    check_rows(arguments.rows)
    for name in ("questions", "slides", "per_slide"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}.")
    if arguments.seed and arguments.benchmark != "mosaic":
        raise ValueError("--seed is for mosaics: other questions are always the same ones.")
    if arguments.benchmark == "mosaic":
        if arguments.bank is None:
            raise ValueError("mosaic needs --bank, a file of python -m train.data.mosaic bank.")
        what: dict = {name: getattr(arguments, name) for name in ("bank", "split", "seed")} | {"n": arguments.n}
        items = (
            item
            for n in arguments.n
            for item in mosaic_items(arguments.bank, arguments.split, arguments.questions, n, arguments.seed)
        )
        total = arguments.questions * len(arguments.n)
        what |= {"questions": arguments.questions} if len(arguments.n) > 1 else {}  # else more can be asked later
    elif arguments.benchmark == "phantom":
        what = {"size": arguments.size, "per_slide": arguments.per_slide}
        seeds = phantom_seeds("test", arguments.slides)
        items = phantom_items(out / "slides", seeds, arguments.size, arguments.per_slide)
        total = arguments.slides * arguments.per_slide
    else:
        if not arguments.data or not arguments.features:
            raise ValueError(f"{arguments.benchmark} needs --data FILE and --features FOLDER.")
        records, bad, notes = closed_questions(arguments.benchmark, arguments.data)
        what = {"questions": fingerprint(arguments.data), "features": arguments.features}
        what |= {"max_patches": arguments.max_patches}
        features = FeatureFolder(arguments.features)
        slides = {slide for record in records for slide in record.slides}
        if len(list(without_features(records, features))) == len(slides):
            raise ValueError(f"none of the {len(slides)} slides has a feature file under {arguments.features}.")
        items, total = data_items(records, features, config, arguments.max_patches, say), len(records)
    what |= {"benchmark": arguments.benchmark, "k": arguments.k, "prompt": arguments.prompt}
    what = {name: [str(v) for v in value] if isinstance(value, list) else str(value) for name, value in what.items()}
    what["model"] = fingerprint(sorted(arguments.model.rglob("*.safetensors")))
    check_settings(out, what | {"config": str(replace(config, note="", demo=False, adapter=None))})
    model = SparseWSI.from_pretrained(arguments.model, device=arguments.device)
    rows = tuple(arguments.rows)
    log = out / "records.jsonl"
    answered = evaluate(model, iter(items), total, rows, arguments.k, log, arguments.prompt, arguments.generate)
    without = [record for record in answered if record.get("missing")]
    if without:
        how = "left out" if arguments.skip_missing else "counted as wrong"
        slides = len({record["slide"] for record in without})
        notes.append(f"{len(without)} questions about {slides} slides without usable features are {how}.")
    if len(without) == len(answered):
        raise ValueError(f"no slide has usable features; the first: {answered[0]['missing'] if answered else 'none'}")
    if arguments.skip_missing:
        answered = [record for record in answered if not record.get("missing")]
    readings = add_readings(answered, rows)
    majority(answered, letters=arguments.benchmark not in ("mosaic", "phantom"))
    if bad and not arguments.skip_missing:
        notes.append(f"{len(bad)} rows of the files cannot be asked and are counted as wrong.")
        nothing = dict.fromkeys((*rows, *readings, "majority"))
        answered += [
            {"slide": problem.slide or f"{problem.file}, row {problem.row}", "family": "unreadable", "answer": "?"}
            | {"options": [], "n": 0, "detail": "", **nothing}
            for problem in bad
        ]
    table = summary(answered, (*rows, *readings))
    settings = {name: str(value) for name, value in vars(arguments).items()}
    text = "\n".join([markdown(table), *("", *notes) * bool(notes)])
    write_whole(out / "table.json", json.dumps({"settings": settings, "rows": table, "notes": notes}, indent=2) + "\n")
    write_whole(out / "table.md", text + "\n")
    picture(table, arguments.k or config.num_tokens, out / "table.png")
    return text


if __name__ == "__main__":
    main()
