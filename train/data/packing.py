"""Training examples, where they come from, and how several questions about one slide share its visual tokens.

N patches, D feature dim. L = length of the packed sequence: of each bag the prefix, N visual tokens, then the questions
one after another.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsewsi.bags.bag import Bag, check_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.model.prompt import build_prompt, end_of_turn, text_ids, visual_positions
from sparsewsi.model.sparse_wsi import SparseWSI
from train.command import IMAGE_SUFFIXES, SLIDE_SUFFIXES, walk


@dataclass(frozen=True)
class Question:
    """One question and its answer in words; options is empty for an open question."""

    question: str
    answer: str
    options: tuple[str, ...] = ()
    family: str = ""


@dataclass(frozen=True)
class Record:
    """A question as a file of questions states it, about one slide or several (train/data/questions.py reads them)."""

    slides: tuple[str, ...]  # as the file names them, without folder and ending
    question: Question
    file: str = ""
    row: int = 0  # from 1; the header of a CSV is not counted
    detail: str = ""  # a narrower category than question.family, where the file has one


@dataclass(frozen=True)
class Example:
    """One bag and the questions about it."""

    features: Tensor  # (N, D)
    indices: Tensor  # (N,) or (K,) ascending: places, among all num_patches of the slide, of the patches the LLM sees
    num_patches: int
    questions: tuple[Question, ...]
    kinds: tuple[str, ...] = ()  # ground truth of these patches, where known
    rows: Tensor | None = None  # (K,) of features, the patches the LLM sees; None: all N

    def keep(self, rows: Tensor) -> "Example":
        """The example with K of its patches for the LLM; the slide encoder still sees all N, as at inference."""
        kinds = tuple(self.kinds[i] for i in rows.tolist()) if self.kinds else ()
        return replace(self, indices=self.indices[rows], kinds=kinds, rows=rows)


@dataclass(frozen=True)
class Packed:
    """Token ids, positions, targets of bags with their questions, and who sees whom; without the visual tokens."""

    text_ids: Tensor  # (T,) of each bag the prefix, then the questions with their answers
    order: Tensor  # (L,) where each place of the sequence comes from: text i is i, visual token j is T + j
    position_ids: Tensor  # (L,)
    bag: Tensor  # (L,) number of the bag a place belongs to
    question: Tensor  # (L,) number of the question from 1; 0 for prefix and visual tokens, which all questions see
    keep: Tensor  # (A,) places in the sequence whose next token is part of an answer
    targets: Tensor  # (A,) those next tokens

    @property
    def mask(self) -> Tensor:
        """(L, L) bool: True where a query (row) may see a key (column)."""
        return visible(self.bag, self.question)

    @property
    def is_causal(self) -> bool:
        """Whether every place sees all before it: one bag with one question."""
        return not self.bag.any() and int(self.question.max()) <= 1


def visible(bag: Tensor, question: Tensor, queries: slice = slice(None)) -> Tensor:
    """(L, L) bool, on the tensors' device: a query sees what lies before it in its bag, but for other questions.

    queries: of which queries the rows are wanted.
    """
    place = torch.arange(len(bag), device=bag.device)
    causal = place[None, :] <= place[queries, None]
    mine = (question[None, :] == 0) | (question[None, :] == question[queries, None])
    return causal & mine & (bag[None, :] == bag[queries, None])


def pack(tokenizer: PreTrainedTokenizerBase, example: Example, position: str, max_position: int | None) -> Packed:
    """Lay all questions of a bag behind one copy of its visual tokens.

    Every question sees the prefix, the visual tokens and itself, never another question, and gets the position ids it
    would have alone; the loss is that of separate sequences at the price of one visual prefix.
    """
    n = len(example.indices)
    end = end_of_turn(tokenizer)
    segments: list[Tensor] = []
    answers: list[int] = []  # answer length of each segment
    at, prefix = 0, torch.empty(0, dtype=torch.long)
    for question in example.questions:
        prompt = build_prompt(tokenizer, [{"role": "user", "content": question.question}], question.options or None)
        at, prefix = prompt.at, prompt.ids[: prompt.at]
        answer = [*text_ids(tokenizer, question.answer), end]
        segments.append(torch.cat([prompt.ids[at:], torch.tensor(answer, dtype=torch.long)]))
        answers.append(len(answer))
    longest = max(len(segment) for segment in segments)
    visual, start = visual_positions(example.indices, example.num_patches, at, longest, position, max_position)
    positions = [torch.arange(at), visual] + [start + torch.arange(len(segment)) for segment in segments]
    owner = [torch.zeros(at + n, dtype=torch.long)] + [torch.full((len(s),), i + 1) for i, s in enumerate(segments)]
    keep, targets, begin = [], [], at + n
    for segment, length in zip(segments, answers):
        begin += len(segment)
        keep.append(torch.arange(begin - length - 1, begin - 1))
        targets.append(segment[-length:])
    text = torch.cat([prefix, *segments])
    order = torch.cat([torch.arange(at), len(text) + torch.arange(n), torch.arange(at, len(text))])
    asked = torch.cat(owner)  # (L,)
    bag = torch.zeros_like(asked)
    return Packed(text, order, torch.cat(positions), bag, asked, torch.cat(keep), torch.cat(targets))


def join(parts: Sequence[Packed]) -> Packed:
    """Several bags as one sequence in which no bag sees another: small bags then cost one pass of the LLM together.

    The visual tokens of the bags follow one another in the same order.
    """
    texts = [len(part.text_ids) for part in parts]
    visuals = [len(part.order) - text for part, text in zip(parts, texts)]
    total, text, visual, place = sum(texts), 0, 0, 0
    orders, keeps = [], []
    for part, n_text, n_visual in zip(parts, texts, visuals):
        is_text = part.order < n_text
        orders.append(torch.where(is_text, part.order + text, part.order - n_text + total + visual))
        keeps.append(part.keep + place)
        text, visual, place = text + n_text, visual + n_visual, place + len(part.order)
    return Packed(
        torch.cat([part.text_ids for part in parts]),
        torch.cat(orders),
        torch.cat([part.position_ids for part in parts]),
        torch.cat([torch.full_like(part.bag, number) for number, part in enumerate(parts)]),
        torch.cat([part.question for part in parts]),
        torch.cat(keeps),
        torch.cat([part.targets for part in parts]),
    )


def passes(packed: Sequence[Packed], most: int) -> list[list[int]]:
    """Numbers of the bags that share a pass: consecutive ones of `most` tokens together; a longer one goes alone."""
    groups: list[list[int]] = []
    length = most + 1
    for number, part in enumerate(packed):
        if length + len(part.order) > most:
            groups.append([])
            length = 0
        groups[-1].append(number)
        length += len(part.order)
    return groups


def attention_mask(packed: Packed, device: torch.device, plain: bool) -> Tensor:
    """The mask as transformers takes it: (1, 1, L, L) bool, or (1, L) of ones.

    plain: use the second form where the sequence is causal. transformers then passes no mask but is_causal to SDPA,
    which alone lets it take the flash kernel and grouped keys; a dense mask forbids both. Not on the CPU, where there
    is nothing to gain and sums would come out in another order. No mask at all would be wrong: position ids that jump
    are then read as several sequences.
    """
    if plain and packed.is_causal:
        return torch.ones(1, len(packed.order), dtype=torch.long, device=device)
    return visible(packed.bag.to(device), packed.question.to(device))[None, None]


def answer_logits(model: SparseWSI, visual: Tensor, packed: Packed) -> Tensor:
    """Logits (A, V) float32 of the answers' tokens, given the projected visual tokens (N, H) of all bags."""
    device = model.device
    text = model.llm.get_input_embeddings()(packed.text_ids.to(device))  # (T, H)
    sequence = torch.cat([text, visual.to(text.dtype)])[packed.order.to(device)][None]
    with torch.autocast(sequence.device.type, torch.bfloat16, enabled=text.dtype == torch.bfloat16):
        output = model.llm(
            inputs_embeds=sequence,
            attention_mask=attention_mask(packed, device, device.type == "cuda"),
            position_ids=packed.position_ids[None].to(device),
            logits_to_keep=packed.keep.to(device),
            use_cache=False,
        )
    return output.logits[0].float()


# ---- questions about slides whose features lie in files

ENDINGS = (".safetensors", ".h5", ".hdf5", ".pt", ".npy", ".csv")  # of feature files; the first there is, is read
_ALL_ENDINGS = (*ENDINGS, *SLIDE_SUFFIXES, *IMAGE_SUFFIXES, ".dcm")
_TCGA = re.compile(r"(TCGA-\w{2}-\w{4})(-\w+)*")  # a case, and a slide of it; a UUID may follow after a dot


def slide_name(file: str) -> str:
    """The name of a slide or feature file without folder and endings: x/12.jpg.h5 -> 12."""
    name = re.split(r"[\\/]", file.strip())[-1]
    while ending := next((end for end in _ALL_ENDINGS if name.lower().endswith(end)), ""):
        name = name[: -len(ending)]
    return name


class FeatureFolder:
    """The feature files under a folder, found by the names that files of questions give to slides.

    A name is that of the file without its endings. TCGA slides are found with and without the UUID after their barcode,
    and a TCGA case (TCGA-AR-A1AI) stands for all its slides.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder. Pass the folder that holds the slides' feature files.")
        self._files: dict[str, dict[str, list[Path]]] = {}  # name, barcode or case -> name -> files
        for path in sorted(Path(where, name) for where, names in walk(self.folder) for name in names):
            if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
                name = slide_name(path.name)
                barcode = _TCGA.match(name)
                for key in {name, *((barcode[0], barcode[1]) if barcode else ())}:
                    self._files.setdefault(key, {}).setdefault(name, []).append(path)

    def find(self, slide: str) -> list[Path]:
        """The feature file of a slide; of a case, one file for each of its slides; empty where there is none.

        Raises ValueError where two files could be meant.
        """
        barcode = _TCGA.match(slide)
        found = self._files.get(slide) or self._files.get(barcode[0] if barcode else slide, {})
        if slide in found:
            found = {slide: found[slide]}
        files = []
        for paths in found.values():
            best = min(ENDINGS.index(path.suffix.lower()) for path in paths)
            files += [path for path in paths if ENDINGS.index(path.suffix.lower()) == best]
        is_case = barcode is not None and barcode[1] == slide
        if len(files) > len(found) or (len(files) > 1 and not is_case):
            names = ", ".join(str(path.relative_to(self.folder)) for path in files[:3])
            raise ValueError(f"several feature files could be slide {slide}: {names}. Pass a folder that holds one.")
        return files

    def load(self, slides: Sequence[str]) -> Bag:
        """The bag of a slide, or of several as one, in any format of load_bag.

        Raises ValueError for a slide without features, and for a file that cannot be read.
        """
        bags = []
        for slide in slides:
            files = self.find(slide)
            if not files:
                raise ValueError(f"no feature file for slide {slide} under {self.folder}. Extract its features.")
            bags += [load_bag(file) for file in files]
        return stack(bags)


def stack(bags: Sequence[Bag]) -> Bag:
    """Several slides as one bag, each below the one before it, so that rows stay in raster order.

    Raises ValueError where their features do not belong together.
    """
    first, *others = bags
    if not others:
        return first
    coords, below = [], 0
    for bag in bags:
        check_bag(bag, first.encoder, first.features.shape[1])
        shifted = bag.coords + torch.tensor([0, below], dtype=torch.int32)
        coords.append(shifted)
        below = int(shifted[:, 1].max()) + bag.patch_size if len(shifted) else below
    features = torch.cat([bag.features for bag in bags])
    return replace(first, features=features, coords=torch.cat(coords), slide_size=None)


def evenly(n: int, most: int | None) -> Tensor:
    """Rows of n that are kept when at most `most` may be: evenly spaced, first and last among them (as SlideChat)."""
    if most is None or n <= most:
        return torch.arange(n)
    return torch.from_numpy(np.linspace(0, n - 1, most).astype(np.int64))


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n,) in which an epoch visits n examples; depends on its arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class SlideVQADataset:
    """Epoch after epoch of questions about slides; only the bag that is asked for is read.

    Consecutive questions about the same slides share an example, `questions_per_bag` at most. All bags must be of the
    encoder and dimension of the first one. Raises ValueError for no records, and for bags that cannot be trained on.
    """

    def __init__(self, records: Sequence[Record], features: FeatureFolder, seed: int = 0, questions_per_bag: int = 4):
        if not records:
            raise ValueError("there is no question to train on. python -m train.data.questions check FILE says why.")
        by_slides: dict[tuple[str, ...], list[Question]] = {}
        for record in records:
            by_slides.setdefault(record.slides, []).append(record.question)
        self.groups = [
            (slides, tuple(questions[start : start + questions_per_bag]))
            for slides, questions in by_slides.items()
            for start in range(0, len(questions), questions_per_bag)
        ]
        self.features, self.seed = features, seed
        first = features.load(self.groups[0][0])
        self.encoder, self.feature_dim = first.encoder, first.features.shape[1]

    def __len__(self) -> int:
        """Examples of one epoch."""
        return len(self.groups)

    def example(self, index: int, n: int) -> Example:
        """Example number `index` of the endless sequence, with at most n patches, evenly spaced over the slide's."""
        epoch, place = divmod(index, len(self))
        slides, questions = self.groups[epoch_order(len(self), self.seed, epoch)[place]]
        bag = self.features.load(slides)
        if not len(bag.features):
            raise ValueError(f"slide {', '.join(slides)} has no patches. Leave its questions out.")
        try:
            check_bag(bag, self.encoder, self.feature_dim)
        except ValueError as error:
            raise ValueError(f"The features of {', '.join(slides)}: {error}") from error
        rows = evenly(len(bag.features), n)
        return Example(bag.features[rows], rows, len(bag.features), questions)
