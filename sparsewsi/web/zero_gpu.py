"""A model on a Hugging Face Space that is lent a GPU for one call at a time (ZeroGPU).

A call runs in another process, to which its arguments are copied. So the model is loaded, and put on the GPU, before
the first call, and what goes there is features, a selection and text: never a case, a slide or its name. Slides are
read and encoded outside, on the CPU, as that lasts longer than a GPU is lent for. Not yet run on a GPU.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsewsi.bags.bag import Bag
from sparsewsi.model.evidence import Evidence
from sparsewsi.model.selection import Selection
from sparsewsi.model.words import Words
from sparsewsi.report.case import Model, Progress

# The longest that each call may take, in seconds. A visitor's allowance is charged with it beforehand.
SECONDS = {"select": 20, "tokens_of": 20, "words": 20, "answer": 60, "option_probs": 20, "leave_one_out": 60}

Messages = Sequence[Mapping[str, str]]


def is_lent() -> bool:
    """Whether this is a Space that is lent a GPU."""
    return bool(os.environ.get("SPACE_ID")) and importlib.util.find_spec("spaces") is not None


def borrow(model: Model) -> Model:
    """The model on this Space's GPU. Has to be called before the Space serves its page."""
    import spaces  # type: ignore[import-not-found]  # only a Space has it

    return OnLoan(model, spaces.GPU)  # type: ignore[return-value]  # what it does not define is the model's own


class OnLoan:
    """A model whose calls run on the GPU that is lent for them; everything else is the model's own.

    lend: spaces.GPU, called as lend(duration=seconds)(function)
    """

    def __init__(self, model: Model, lend: Callable[..., Callable]):
        self._model = model

        def answer(*given: Any, **named: Any) -> Iterator[str]:
            yield from model.answer(*given, **named)  # a generator, as spaces.GPU wants to be told

        self._lent = {
            name: lend(duration=seconds)(answer if name == "answer" else getattr(model, name))
            for name, seconds in SECONDS.items()
        }

    def __getattr__(self, name: str) -> Any:
        return self._lent.get(name) or getattr(self._model, name)

    # Arguments are passed on as they come, so that a new one of the model's is no one's to repeat here; but another
    # process cannot tell how far it is.
    def select(self, bag: Bag, *given: Any, progress: Progress | None = None, **named: Any) -> Selection:
        return self._lent["select"](_bare(bag), *given, **named)

    def option_probs(
        self,
        selection: Selection,
        question: str | Messages,
        options: Sequence[str],
        progress: Progress | None = None,
    ) -> Tensor:
        return self._lent["option_probs"](selection, question, options)

    def tokens_of(self, bag: Bag, *given: Any, **named: Any) -> Tensor:
        return self._lent["tokens_of"](_bare(bag), *given, **named)

    def words(self, bag: Bag, progress: Progress | None = None) -> Words:
        return self._lent["words"](_bare(bag))

    def leave_one_out(
        self,
        selection: Selection,
        messages: Messages,
        answer: str,
        options: Sequence[str] | None = None,
        progress: Progress | None = None,
        *given: Any,
        **named: Any,
    ) -> Evidence:
        """As the model's, but for progress, which another process cannot tell: it is called before and after."""
        if progress is not None:
            progress(0, 1)
        found = self._lent["leave_one_out"](selection, messages, answer, options, None, *given, **named)
        if progress is not None:
            progress(1, 1)
        return found


def _bare(bag: Bag) -> Bag:
    """The bag without what tells whose slide it is."""
    return replace(bag, slide="the slide", note="", parts=())
