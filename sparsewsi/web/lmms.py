"""An entry point for lmms-eval: `--model sparsewsi --model_args root=/slides`, answered in its own process.

A task names its slide as `sparsewsi serve` takes it: a part {"type": "image", "url": "slide://NAME"}, or slide://NAME
in the text. Imported by lmms-eval alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from sparsewsi.model.config import DEFAULT_MODEL
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.slides.remote import ANY
from sparsewsi.web.completions import MODEL, read_request
from sparsewsi.web.library import Library


def describe() -> ModelManifest:
    """What lmms-eval's registry asks of the entry-point group lmms_eval.models."""
    return ModelManifest(model_id=MODEL, chat_class_path=f"{__name__}.SlideReader")


class SlideReader(lmms):
    """root: folder of the slides; model: folder or hub repository; slide_mpp: of slides that state none."""

    is_simple = False

    def __init__(
        self,
        root: str | None = None,
        model: str = str(DEFAULT_MODEL),
        slide_mpp: float | None = None,
        batch_size: Any = 1,
        device: Any = None,
        max_batch_size: Any = None,
    ):
        super().__init__()
        self._library = Library(SparseWSI.from_pretrained(model), None if root is None else Path(root), hosts=ANY)
        self._slide_mpp = slide_mpp

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer a request, in their order; slides in a row are opened once. Raises Refused for a bad request."""
        return [self._answer(*request.args) for request in tqdm(requests, desc="Model Responding")]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Tasks that compare likelihoods are not had; choose one that generates.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not had; choose one of a single round.")

    def _answer(self, _text: str, to_messages: Any, settings: dict, doc_id: int, task: str, split: str) -> str:
        messages = to_messages(self.task_dict[task][split][doc_id])
        most = {"max_tokens": settings["max_new_tokens"]} if settings.get("max_new_tokens") else {}
        asked = read_request({"model": MODEL, "messages": messages, "slide_mpp": self._slide_mpp, **most})
        case = self._library.open(asked.slides)
        pieces = []
        for piece in case.answer(self._library.reader, asked.messages, asked.options):
            pieces.append(piece)
            if len(pieces) == asked.most:
                break
        return "".join(pieces).strip()
