"""What is trained on and asked: questions, records of files, examples. No model is loaded for these.

N patches, K kept, D feature dim.
"""

from dataclasses import dataclass, replace

from torch import Tensor


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
    kinds: tuple[str, ...] = ()  # ground truth of all N patches, where known
    rows: Tensor | None = None  # (K,) of features, the patches the LLM sees; None: all N

    def keep(self, rows: Tensor) -> "Example":
        """The example with K of its patches for the LLM; the slide encoder still sees all N, as at inference."""
        return replace(self, indices=self.indices.to(rows.device, non_blocking=True)[rows], rows=rows)
