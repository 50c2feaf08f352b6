"""The nearest word of each patch (ours): stage 1 puts a patch where the LLM keeps the word for its tissue.

N patches, C words, H the LLM's width.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN = "other tissue"
# Words of a question that name nothing a patch could show.
_EMPTY = frozenset(
    re.findall(
        r"\w+",
        "about according and answer any are based best can does following for from has have how image kind likely most "
        "option options patch patches seen show shown shows slide that the their there these this type was what when "
        "where which whole with would",
    )
)


@dataclass(frozen=True, eq=False)
class Words:
    """What each patch is likest to. CPU tensors.

    vocabulary: C words. nearest: (N,) int64, number of the nearest word, -1 where none is near.
    cosine: (N,) float32 to that word, whether near or not.
    """

    vocabulary: tuple[str, ...]
    nearest: Tensor
    cosine: Tensor

    @property
    def shares(self) -> dict[str, float]:
        """Share of the patches with each word that any has, the commonest first."""
        counted = Counter(self.nearest.tolist())
        return {self.word(number): count / len(self.nearest) for number, count in counted.most_common()}

    def word(self, number: int) -> str:
        """The word of a number, UNKNOWN for -1."""
        return self.vocabulary[number] if number >= 0 else UNKNOWN


def pick_words(text: str) -> tuple[str, ...]:
    """The words of a question that can name something seen, each once, in lower case."""
    found = re.findall(r"[^\W\d_]{3,}", text.lower())
    return tuple(dict.fromkeys(word for word in found if word not in _EMPTY))


@torch.no_grad()
def place_words(embeddings: Tensor, tokenize: Callable[[str], Sequence[int]], words: Sequence[str]) -> Tensor:
    """Directions (C, H) of words: the mean of the input embeddings of their pieces less that of all embeddings.

    embeddings: the LLM's (V, H). tokenize: text -> ids.
    """
    mean = embeddings[:: max(1, len(embeddings) // 8192)].float().mean(0)
    pieces = [torch.tensor(list(tokenize(f" {word}")), device=embeddings.device) for word in words]
    return F.normalize(torch.stack([embeddings[ids].float().mean(0) for ids in pieces]) - mean, dim=1)


def find_nearest(directions: Tensor, table: Tensor, alike: float) -> tuple[Tensor, Tensor]:
    """Numbers (N,) of the words (C, H) nearest to directions (N, H), -1 below a cosine of `alike`; and the cosines."""
    cosine, nearest = (F.normalize(directions.float(), dim=1) @ table.T).max(1)
    return torch.where(cosine >= alike, nearest, -1), cosine
