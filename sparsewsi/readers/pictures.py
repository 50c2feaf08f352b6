"""Reading the kept patches as pictures: what a reader is shown, how it is asked, and which patches it cites.

Nothing here loads a model. K kept patches.
"""

import io
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsewsi.model.evidence import MATTERS, NOISE, Evidence, find_option
from sparsewsi.model.prompt import chat_turns

Messages = Sequence[Mapping[str, str]]
Part = str | np.ndarray  # a picture is uint8 (h, w, 3)
Turns = Sequence[tuple[str, Sequence[Part]]]  # role and content
ANSWER_TOKENS = 512
JPEG_QUALITY = 90

# "patch 5", "Patch #5", "patches 3, 5 and 9", "patches 3-5"; after the singular only one number is the patch's.
_ONE = re.compile(r"\bpatch\b[\s#:*(\[]*(?:(?:no|nr)\b\.?|number\b)?[\s#]*(\d+)", re.IGNORECASE)
_MANY = re.compile(r"\bpatches\b[\s#:*(\[]*(\d+(?:(?:[\s,;&/#–-]|and\b|or\b|to\b)+\d+)*)", re.IGNORECASE)
_MARKED = re.compile(r"(?<!&)#(\d+)")
_RANGE = re.compile(r"(\d+)\s*(?:-|–|to)\s*#?(\d+)")


class ReaderError(ValueError):
    """A reader that could not answer; the message is one sentence for people."""


class Refused(ReaderError):
    """A reader that would not answer."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a reader of pictures may be shown of a slide, in the order of selection.indices.

    patches:  K times uint8 (p, p, 3), as they were encoded
    ranks:    their numbers, Selection.ranks: 1 is the best score
    mpp:      um/px of the patches
    overview: uint8 (h, w, 3), the whole slide; None where it is not to be shown. Never the label or macro image
    """

    patches: tuple[np.ndarray, ...]
    ranks: tuple[int, ...]
    mpp: float | None = None
    overview: np.ndarray | None = None


class PictureReader:
    """A reader that is shown the patches themselves: best first, each with its number.

    name:            as it was asked for, for people: never a path
    host:            the other machine that pictures and questions go to; None if they stay in this program
    images_per_call: how many patches it takes at most, the best first; None: all
    overview:        whether it is shown the whole slide, too
    likelihoods:     whether `score` works: without it nothing can be measured, and options have no probabilities
    exact:           its log-likelihoods are float32 throughout
    tokens:          how many the last answer took and had, once it is whole; None where nobody counts
    request:         how many pictures and bytes the last request sent to another program; None where nothing was sent
    """

    name: str
    host: str | None = None
    images_per_call: int | None = None
    overview: bool = False
    likelihoods: bool = False
    exact: bool = False
    tokens: tuple[int, int] | None = None
    request: tuple[int, int] | None = None

    def stream(self, turns: Turns) -> Iterator[str]:
        """The next turn, piece by piece; an empty piece says that it is still waited for."""
        raise NotImplementedError

    def score(self, turns: Turns, answers: Sequence[str], end: bool) -> tuple[Tensor, Tensor]:
        """Log-likelihoods (n,) float32 of each answer as the next turn, and the tokens (n,) it has. CPU.

        end: the end of the turn belongs to the answer
        """
        raise ReaderError(f"{self.name} gives no likelihoods.")

    @property
    def sends(self) -> str:
        """What leaves this program with each question, and where it goes, to be shown before the first one."""
        if self.host is None:
            return ""
        most = "the kept patches" if self.images_per_call is None else f"the best {self.images_per_call} kept patches"
        also = ", an overview of the slide" if self.overview else ""
        return (
            f"Each question sends {most} as pictures{also} and the text of the chat to {self.host}. "
            "No file name, no metadata, no label image is sent."
        )

    @property
    def again(self) -> str:
        """What it takes to put the last question once more, without some of its patches; "" where nothing is sent."""
        if self.request is None:
            return ""
        pictures, size = self.request
        tokens = "" if self.tokens is None else f", {self.tokens[0]:,} tokens in and {self.tokens[1]:,} out"
        return (
            "To ask again without a focus takes one more request, of what this one took at most: "
            f"{pictures} pictures, {size / 1e6:.1f} MB{tokens}."
        )

    def answer(self, pictures: Pictures, messages: Messages, options: Sequence[str] | None = None) -> Iterator[str]:
        """The assistant's next turn, piece by piece. Raises ValueError for messages that are not a chat."""
        return self.stream(lay_out_turns(pictures, self._shown(pictures), messages, options))

    def option_probs(self, pictures: Pictures, question: str | Messages, options: Sequence[str]) -> Tensor:
        """Probability of each option, (n,) float32: softmax over mean log-likelihoods; an empty option gets 0.

        question: in words, or the whole chat with it as the last turn
        """
        real = [number for number, option in enumerate(options) if option.strip()]
        asked = [{"role": "user", "content": question}] if isinstance(question, str) else question
        turns = lay_out_turns(pictures, self._shown(pictures), asked, options)
        totals, lengths = self.score(turns, [options[number].strip() for number in real], True)
        probs = torch.zeros(len(options))
        probs[real] = (totals / lengths).softmax(0)
        return probs

    def leave_one_out(
        self,
        pictures: Pictures,
        messages: Messages,
        answer: str,
        options: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evidence:
        """How much less likely `answer` gets without each of the patches shown, as SparseWSI.leave_one_out says.

        A patch is left out by not showing it; the others keep their numbers. K + 2 prompts of nearly all pictures:
        minutes on a GPU. Patches that are never shown have no effect.
        """
        offered = [(letter, option.strip()) for letter, option in zip(ascii_uppercase, options or ()) if option.strip()]
        chosen = find_option(answer, offered) if len(offered) > 1 else None
        texts = [answer.strip()] if chosen is None else [option for _, option in offered]
        shown = self._shown(pictures)
        views = [shown, [], *([other for other in shown if other != place] for place in shown)]
        values, longest = [], 1
        for done, view in enumerate(views):
            if progress is not None:
                progress(done, len(views))
            totals, lengths = self.score(
                lay_out_turns(pictures, view, messages, options), texts, end=chosen is not None
            )
            longest = max(longest, int(lengths.max()))
            if chosen is None:
                values.append(float(totals[0]))
            else:
                mean = totals / lengths
                others = [number for number in range(len(offered)) if number != chosen]
                values.append(float(mean[chosen] - mean[others].logsumexp(0)))
        effects = torch.zeros(len(pictures.patches))
        effects[shown] = values[0] - torch.tensor(values[2:])
        # Twice the rounding of our own LLM, whose last layer is exact: that of others was not measured.
        rounding = 0.0 if self.exact or chosen is not None else 2 * NOISE * math.sqrt(longest)
        return Evidence(
            effects=effects,
            without_any=values[0] - values[1],
            baseline=values[0],
            score_ranks=torch.tensor(pictures.ranks),
            option=chosen is not None,
            limit=max(MATTERS, rounding),
        )

    def _shown(self, pictures: Pictures) -> list[int]:
        """Places of the patches that are shown, best first."""
        return sorted(range(len(pictures.ranks)), key=lambda place: pictures.ranks[place])[: self.images_per_call]


def lay_out_turns(
    pictures: Pictures, places: Sequence[int], messages: Messages, options: Sequence[str] | None = None
) -> Turns:
    """The chat as a reader is given it: the pictures of these places open the first user turn, each with its number."""
    turns: list[tuple[str, list[Part]]] = [(role, [content]) for role, content in chat_turns(messages, options)]
    parts: list[Part] = []
    if pictures.overview is not None:
        parts += ["An overview of a whole-slide image:", pictures.overview]
    if places:
        wide = f", each {pictures.patches[places[0]].shape[1] * pictures.mpp:.0f} µm wide" if pictures.mpp else ""
        parts.append(
            f"{len(places)} patches of one whole-slide image{wide}. Name a patch that an answer rests on by its "
            "number, as in: Patch 1."
        )
    for place in places:
        parts += [f"Patch {pictures.ranks[place]}:", pictures.patches[place]]
    first = next(content for role, content in turns if role == "user")
    first[:0] = parts
    return turns


def find_cited(text: str, ranks: Collection[int]) -> tuple[int, ...]:
    """Numbers, of these, of the patches that a text names, in the order of their first mention."""
    spots = [(match.start(1), int(match[1])) for pattern in (_ONE, _MARKED) for match in pattern.finditer(text)]
    for match in _MANY.finditer(text):
        spots += [(match.start(1) + one.start(), int(one[0])) for one in re.finditer(r"\d+", match[1])]
        for span in _RANGE.finditer(match[1]):
            low, high = int(span[1]), int(span[2])
            spots += [(match.start(1) + span.start(), rank) for rank in sorted(ranks) if low < rank < high]
    return tuple(dict.fromkeys(rank for _, rank in sorted(spots) if rank in ranks))


def encode_jpeg(picture: np.ndarray) -> bytes:
    """uint8 (h, w, 3) as a JPEG of its px alone: no EXIF, no colour profile, no comment."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()
