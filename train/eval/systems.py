"""Rows of the table in which another system reads: what the paper's Table 1 compares with, and any reader.

A row is READER:SHOWN. READER is hf:<id or folder>, openai:<model> or a name in SYSTEMS. SHOWN is a selector, as
learned@32 or random@30; `thumbnail`, the whole slide in one picture; or `text-only`. After SHOWN may stand :each (every
patch is asked about alone and the answer that most of them give counts, as SlideChat asked its rivals: 2410.11761,
section 4; a tie is drawn with a seed) or :together (all in one question). random is asked :each unless told otherwise,
all other selectors :together. The row `slidechat` is an imported artefact (train/convert.py) on features of its own.

Patches are cut from the slides themselves. An answer is kept by reader, slide, patches and question, so that nobody is
asked twice, whatever the row and however a run ends.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparsewsi.bags.bag import Bag, check_bag
from sparsewsi.files import append_line, read_lines
from sparsewsi.model.prompt import format_question
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import LEARNED, QUESTION, SELECTORS
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.readers.choice import ReaderChoice, open_reader
from sparsewsi.readers.pictures import PictureReader, Pictures, Refused, Turns, lay_out_turns
from sparsewsi.report.plots import cut_patches
from sparsewsi.slides.find import find_slides_in
from sparsewsi.slides.slide import Slide, SlideError, open_slide
from train.data.example import Question
from train.data.slides import FeatureFolder, barcode_of, slide_name
from train.eval.items import Item
from train.eval.reading import READINGS

SLIDECHAT = "slidechat"
THUMBNAIL = 1024  # px of the longer side, as SlideChat showed its rivals
CHOICES = (*LEARNED, QUESTION, *SELECTORS)  # what a row may select by
ASK = "Answer with the letter of the right option."


@dataclass(frozen=True)
class System:
    """A system of Table 1. reader: how it is read where nothing else is said; None: `how` says what to do first"""

    reader: str | None
    how: str = ""


_CONVERT = "run python -m train.convert llava, then pass --reader"
SYSTEMS = {
    "gpt-4o": System("openai:gpt-4o-2024-11-20"),
    "llava-med": System(None, f"{_CONVERT} llava-med=hf:FOLDER"),
    "quilt-llava": System(None, f"{_CONVERT} quilt-llava=hf:FOLDER"),
    "meddr": System(None, "serve it with vLLM (it needs code of its own), then --reader meddr=openai:MedDr_0401"),
}


@dataclass(frozen=True)
class ReaderRow:
    """A row that another reader answers. shown: "thumbnail", "text-only", or a selector with its K"""

    name: str
    system: str
    shown: str
    each: bool


def parse_row(row: str) -> ReaderRow | None:
    """A row of another reader; None for one of ours. Raises ValueError for one that can be neither."""
    parts = row.split(":")
    if len(parts) == 1:
        return None
    mode = parts.pop() if parts[-1] in ("each", "together") else ""
    shown, system = parts.pop(), ":".join(parts)
    selector, at, own = shown.partition("@")
    drawn = shown not in ("thumbnail", "text-only")
    if drawn and not (selector in CHOICES and (not at or (own.isdecimal() and int(own)))):
        names = ", ".join(("thumbnail", "text-only", *CHOICES))
        raise ValueError(f"{row!r} is no row: what is shown is one of {names}, the selectors also as NAME@K.")
    kind, colon, what = system.partition(":")
    if system not in SYSTEMS and not (kind in ("hf", "openai") and colon and what):
        raise ValueError(f"{row!r} is no row: a reader is hf:<id>, openai:<model> or one of {', '.join(SYSTEMS)}.")
    if mode and not drawn:
        raise ValueError(f"{row!r} is no row: {mode} is for patches, and {shown} shows none.")
    return ReaderRow(row, system, shown, drawn and (mode == "each" or (not mode and selector == "random")))


def find_reader(system: str, given: Mapping[str, str]) -> str:
    """hf:... or openai:... of a row's system; given: by the name of a system. Raises ValueError with what to do."""
    if system not in SYSTEMS:
        return system
    found = given.get(system) or SYSTEMS[system].reader
    if found is None:
        raise ValueError(f"{system} cannot be fetched as it is: {SYSTEMS[system].how}.")
    return found


# ---- slides, and what was answered


class SlideFolder:
    """The slides under a folder by the names that files of questions give them, as FeatureFolder finds features."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder. Pass the one that holds the slides.")
        self.folder = folder
        self._files: dict[str, Path] = {}
        for file in find_slides_in(folder).slides:
            name = slide_name(Path(file).name)
            for key in {name, barcode_of(name)}:
                self._files.setdefault(key, Path(file))

    def find(self, slide: str) -> Path | None:
        """The file of a slide; None if it is not there."""
        return self._files.get(slide) or self._files.get(barcode_of(slide))


@dataclass
class Count:
    """What a row took. usd: None where no price was given"""

    asked: int = 0
    kept: int = 0
    refused: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0  # answers that came without a count of tokens


class Answers:
    """Answers by reader, slide, patches and question, a line each in a file that survives a kill."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = {line["key"]: line for line in read_lines(path) if isinstance(line.get("key"), str)}

    def ask(self, reader: PictureReader, about: Mapping[str, Any], turns: Callable[[], Turns], count: Count) -> str:
        """What a reader answers; asked once. A refusal is an answer without words. Raises ReaderError."""
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        line = self._known.get(key)
        if line is None:
            refused = False
            try:
                text = "".join(reader.stream(turns())).strip()
            except Refused as error:
                text, refused = "", bool(error)
            line = {"key": key, **about, "text": text, "refused": refused, "tokens": reader.tokens}
            append_line(self.path, line)
            self._known[key] = line
            count.asked += 1
        else:
            count.kept += 1
        count.refused += bool(line["refused"])
        count.uncounted += line["tokens"] is None
        count.tokens_in += (line["tokens"] or (0, 0))[0]
        count.tokens_out += (line["tokens"] or (0, 0))[1]
        return str(line["text"])


# ---- asking


@dataclass
class Systems:
    """Answers the rows of other systems about items.

    rows:      by name
    readers:   by system, opened
    slidechat: the imported artefact and the folder of its features
    counts:    what each row took
    """

    rows: Mapping[str, ReaderRow]
    readers: Mapping[str, PictureReader]
    answers: Answers
    slides: SlideFolder | None = None
    slidechat: tuple[SparseWSI, FeatureFolder] | None = None
    counts: dict[str, Count] = field(default_factory=dict)
    _open: tuple[Path, Slide] | None = None

    def reader_of(self, row: str) -> str:
        """The name of the reader that answers a row."""
        return self.readers[self.rows[row].system].name

    def ask(self, item: Item, name: str, select: Callable[[str], Selection]) -> dict[str, Any]:
        """The texts that a row's reader writes about an item; nothing where its slide is not at hand.

        select: the patches that a row of ours, as learned@32, keeps of the item's bag
        """
        texts = self._ask(item, self.rows[name], select)
        return {} if texts is None else {f"{name} texts": texts, f"{name} reader": self.reader_of(name)}

    def _ask(self, item: Item, row: ReaderRow, select: Callable[[str], Selection]) -> list[str] | None:
        question = item.question
        count = self.counts.setdefault(row.name, Count())
        if not len(item.bag.features) and row.shown not in ("thumbnail", "text-only"):
            return None
        slide = self._slide(item) if row.shown != "text-only" else None
        if slide is None and row.shown != "text-only":
            return None
        reader = self.readers[row.system]
        words = f"{format_question(question.question, question.options)}\n{ASK}"
        about = {"reader": reader.name, "slide": item.slide or item.bag.slide, "question": words}
        if slide is None or row.shown == "thumbnail":
            picture = None if slide is None else slide.thumbnail(THUMBNAIL)[0]
            turns: Turns = [("user", [words] if picture is None else [picture, words])]
            return [self.answers.ask(reader, about | {"shown": row.shown}, lambda: turns, count)]
        if item.bag.mpp is None:
            raise ValueError(f"the features of {item.bag.slide} do not say at which resolution their patches lie.")
        selection = select(row.shown)
        if row.each:
            texts = []
            for place in selection.indices.tolist():
                one = replace(selection, indices=torch.tensor([place]), tokens=selection.tokens[:1])
                shown = about | {"shown": [_corner(item.bag, place)]}
                texts.append(self.answers.ask(reader, shown, self._lone(slide, item.bag, one, words), count))
            return texts
        best = selection.indices[selection.best_first][: reader.images_per_call].tolist()
        shown = about | {"shown": [_corner(item.bag, place) for place in best], "together": True}
        return [self.answers.ask(reader, shown, self._all(slide, item.bag, selection, words), count)]

    def _lone(self, slide: Slide, bag: Bag, selection: Selection, words: str) -> Callable[[], Turns]:
        return lambda: [("user", [*cut_patches(slide, bag, selection), words])]

    def _all(self, slide: Slide, bag: Bag, selection: Selection, words: str) -> Callable[[], Turns]:
        def turns() -> Turns:
            best_first = cut_patches(slide, bag, selection)
            ranks = selection.ranks[selection.best_first].tolist()
            pictures = Pictures(tuple(best_first), tuple(ranks), bag.mpp)
            return lay_out_turns(pictures, range(len(best_first)), [{"role": "user", "content": words}])

        return turns

    def ask_slidechat(self, item: Item, choose: Callable[[SparseWSI, Selection, Question], str]) -> dict[str, Any]:
        """The option that the imported SlideChat finds likeliest; nothing where its features are not at hand."""
        assert self.slidechat is not None
        model, features = self.slidechat
        try:
            bag = features.load((item.slide or item.bag.slide).split(" + "))
            check_bag(bag, model.config.encoder, model.config.feature_dim)
            return {SLIDECHAT: choose(model, model.select(bag), item.question)}
        except ValueError:
            return {}

    def _slide(self, item: Item) -> Slide | None:
        path = None if self.slides is None else self.slides.find(item.slide or item.bag.slide)
        if path is None:
            return None
        if self._open is None or self._open[0] != path:
            self.close()
            try:
                self._open = path, open_slide(path)
            except SlideError:
                return None
        return self._open[1]

    def close(self) -> None:
        """Close the slide that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _corner(bag: Bag, place: int) -> list[float]:
    """What tells a patch from others of its slide: corner and side in level-0 px, and um/px it is read at."""
    return [*(int(value) for value in bag.coords[place]), bag.patch_size, bag.mpp or 0.0]


def open_systems(
    rows: Sequence[str],
    given: Mapping[str, str],
    answers: Path,
    slides: Path | None,
    slidechat: tuple[Path, Path] | None,
    environ: Mapping[str, str],
    device: str | None = None,
) -> Systems | None:
    """What answers these rows; None if all are ours. Raises ValueError before anything is loaded."""
    found = {row: parsed for row in rows if (parsed := parse_row(row))}
    if not found and SLIDECHAT not in rows:
        return None
    endpoint, key = environ.get("SPARSEWSI_ENDPOINT"), environ.get("OPENAI_API_KEY")
    names = {row.system: find_reader(row.system, given) for row in found.values()}
    choices = {system: ReaderChoice(name, endpoint, key) for system, name in names.items()}
    seen = [row.name for row in found.values() if row.shown != "text-only"]
    if seen and slides is None:
        raise ValueError(f"{seen[0]} is shown pictures: pass --slides, the folder that holds the slides.")
    folder = SlideFolder(slides) if slides is not None else None
    if SLIDECHAT in rows:
        if slidechat is None:
            raise ValueError("slidechat needs --slidechat MODEL, made by python -m train.convert slidechat.")
        theirs = SparseWSI.from_pretrained(slidechat[0], device=device), FeatureFolder(slidechat[1])
    else:
        theirs = None
    readers = {system: open_reader(choice, count=True) for system, choice in choices.items()}
    return Systems(found, readers, Answers(answers), folder, theirs)


# ---- what was said


def vote(chosen: Sequence[str | None], options: Sequence[str], seed: str) -> str | None:
    """The option that most of the answers choose; of equals one that is drawn; None where none chooses any."""
    votes = Counter(option for option in chosen if option is not None)
    most = max(votes.values(), default=0)
    first = [option for option in options if option in votes and votes[option] == most]
    return random.Random(seed).choice(first) if first else None


def add_votes(records: Sequence[dict], rows: Sequence[str]) -> list[str]:
    """Read what readers wrote, strictly and leniently, add what most of it chooses; returns the names of these rows."""
    added = []
    for row in (row for row in rows if ":" in row):
        for reading, choice in READINGS.items():
            name = f"{row}, {reading}"
            added.append(name)
            for record in records:
                options = record["options"]
                chosen = [choice(text, options) for text in record.get(f"{row} texts", ())]
                record[name] = vote(chosen, options, f"{record['slide']} {record.get('number')}")
    return added


def describe_counts(counts: Mapping[str, Count], prices: Mapping[str, tuple[float, float]]) -> list[str]:
    """A sentence for each row: how often it was asked, with how many tokens, for how much.

    prices: USD for a million tokens in and out, by row's system or reader
    """
    said = []
    for row, count in counts.items():
        tokens = f"{count.tokens_in:,} tokens in, {count.tokens_out:,} out"
        if count.uncounted:
            tokens += f" ({count.uncounted:,} answers came without a count)"
        price = next((price for name, price in prices.items() if row.startswith(f"{name}:")), None)
        cost = "" if price is None else f", {(count.tokens_in * price[0] + count.tokens_out * price[1]) / 1e6:.2f} USD"
        refused = f", {count.refused:,} refused" if count.refused else ""
        said.append(f"{row}: {count.asked:,} asked now, {count.kept:,} kept from before{refused}; {tokens}{cost}.")
    return said
