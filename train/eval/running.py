"""Asking a model: every item once for each row of the table, a line for each as it is answered.

N patches, K kept, D_v width of a visual token.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from sparsewsi.bags.bag import Bag
from sparsewsi.files import append_line
from sparsewsi.model.prompt import format_question, text_ids
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import QUESTION
from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.example import Example, Question
from train.data.kinds import NEEDLE_KINDS
from train.data.packing import Packed, answer_logits, pack, visible
from train.eval.items import Item
from train.eval.systems import CHOICES, SLIDECHAT, Systems, parse_row
from train.run_folder import hold, read_records

ROWS = ("learned", "random", "uniform", "all", "text-only")
WITHOUT_K = ("all", "text-only")


def check_rows(rows: Sequence[str]) -> None:
    """Raise ValueError for a row that the table cannot have."""
    for row in rows:
        if row == SLIDECHAT or parse_row(row):
            continue
        selector, at, own = row.partition("@")
        known = row in WITHOUT_K or (selector in CHOICES and (own.isdecimal() or not at))
        if not known or (at and int(own) < 1):
            names = ", ".join((*CHOICES, *WITHOUT_K, SLIDECHAT))
            raise ValueError(
                f"{row!r} is no row. Choose of {names}, the selectors also as NAME@K, and READER:SHOWN as in "
                "gpt-4o:random@30 (train/eval/systems.py)."
            )


def word_question(question: Question, preset: str) -> Question:
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
    prompt = word_question(question, preset)
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


@dataclass(frozen=True)
class Way:
    """How questions are asked."""

    rows: tuple[str, ...] = ROWS
    k: int | None = None  # patches kept by rows that name no K; None: the model's
    preset: str = "slidechat"
    generate: bool = False  # answer in writing as well


def choose_option(
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


def write_answer(model: SparseWSI, selection: Selection, question: Question, preset: str = "slidechat") -> str:
    """What the model writes, greedily."""
    prompt = word_question(question, preset)
    message = {"role": "user", "content": prompt.question}
    return "".join(model.answer(selection, [message], prompt.options or None)).strip()


@torch.inference_mode()
def select_row(
    model: SparseWSI, bag: Bag, row: str, k: int | None, seed: int, question: Question | None = None
) -> Selection:
    """The patches a row of the table lets the LLM see; "selector@K" keeps K instead of k.

    question: what the selector "question" also takes
    The text alone stands at the positions it has where there is no slide.
    """
    if row in WITHOUT_K:
        x = model.encode(bag.features).cpu() if row == "all" else torch.empty(0, model.config.dim)
        return Selection(torch.arange(len(x)), torch.zeros(len(bag.features)), x, len(x))
    selector, _, own = row.partition("@")
    words = " ".join((question.question, *question.options)) if question and selector == QUESTION else ""
    return model.select(bag, int(own) if own else k, selector=selector, seed=seed, question=words)


class Asker:
    """Asks items one after another; consecutive items about one bag share its selections and its visual prefix."""

    def __init__(self, model: SparseWSI, way: Way, systems: Systems | None = None):
        self.model, self.way, self.systems = model, way, systems
        self._bag: Bag | None = None
        self._seed = 0  # of the bag: the number of its first item
        self._selections: dict[str, Selection] = {}
        self._prefix = Prefix()

    def ask(self, item: Item, number: int, known: dict) -> dict:
        """What is not known yet of each row: the likeliest option, what is written, and the needles that are kept."""
        if item.bag is not self._bag:
            self._bag, self._seed, self._selections, self._prefix = item.bag, number, {}, Prefix()
        found: dict = {}
        for row in self.way.rows:
            if row == SLIDECHAT or ":" in row:
                found |= self._ask_system(item, row, known)
            elif row == "text-only" or len(item.bag.features):
                found |= self._ask_row(item, row, known)
        return found

    def _ask_system(self, item: Item, row: str, known: dict) -> dict:
        """What another system says, if it is not known yet."""
        assert self.systems is not None, "a row of another system needs who answers it"
        if row == SLIDECHAT:
            return {} if row in known else self.systems.ask_slidechat(item, choose_option)
        if f"{row} texts" in known and known.get(f"{row} reader") == self.systems.reader_of(row):
            return {}

        return self.systems.ask(item, row, lambda shown: self._select(item, shown))

    def _select(self, item: Item, row: str) -> Selection:
        """The patches of a row; those that the question decides belong to that question alone."""
        key = f"{row} {item.question}" if row.partition("@")[0] == QUESTION else row
        if key not in self._selections:
            self._selections[key] = select_row(self.model, item.bag, row, self.way.k, self._seed, item.question)
        return self._selections[key]

    def _ask_row(self, item: Item, row: str, known: dict) -> dict:
        needles = np.flatnonzero(np.isin(item.kinds, NEEDLE_KINDS))
        counts = row not in WITHOUT_K and len(needles) > 0
        to_write = self.way.generate and f"{row} text" not in known
        if row in known and not to_write and (not counts or f"{row} kinds" in known):
            return {}
        selection = self._select(item, row)
        placed = item.place(selection)
        found: dict = {}
        if row not in known:
            prefix = self._prefix if row == "all" else None
            found[row] = choose_option(self.model, placed, item.question, self.way.preset, prefix)
        if counts:
            kept, planted = np.intersect1d(selection.indices.numpy(), needles), set(item.kinds[needles])
            found[f"{row} recall"] = len(kept) / len(needles)
            found[f"{row} kinds"] = len(planted & set(item.kinds[kept])) / len(planted)
        if to_write:
            found[f"{row} text"] = write_answer(self.model, placed, item.question, self.way.preset)
        return found


def evaluate(
    model: SparseWSI, items: Iterable[Item], total: int, way: Way, log: Path, systems: Systems | None = None
) -> list[dict]:
    """Answer every item once per row and return one record per item.

    The log gets a JSON line for every item as it is answered; what it holds already is not asked again, so that a
    killed run goes on where it stopped and rows can be added later. Items without features get no line but for the text
    alone; they are tried again next time. systems: who answers rows of others
    Raises ValueError if the log holds answers about other features.
    """
    asker = Asker(model, way, systems)
    with hold(log.parent):
        records = read_records(log)
        for number, item in enumerate(tqdm(items, total=total, desc=log.stem, disable=None)):
            record, facts = records.setdefault(number, {}), describe(item)
            if facts["n"] and record.get("n") and record.get("features", facts["features"]) != facts["features"]:
                raise ValueError(f"{log} holds answers about other features of {facts['slide']}. Choose another --out.")
            record |= {"number": number, **facts}
            new = asker.ask(item, number, record)
            if new:
                record |= new
                append_line(log, {"number": number, **facts, **new})
            if not len(item.bag.features):
                missing = {row for row in way.rows if row != "text-only" and ":" not in row} - record.keys()
                record |= dict.fromkeys(missing)
                if way.generate:
                    record |= dict.fromkeys((f"{row} text" for row in missing), "")
            if SLIDECHAT in way.rows:
                record.setdefault(SLIDECHAT)
    return [records[number] for number in sorted(records)]


def describe(item: Item) -> dict:
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
