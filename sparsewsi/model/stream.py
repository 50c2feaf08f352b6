"""The text of a model of transformers, piece by piece, while it generates in a thread."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


def stream_text(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Iterator[str]:
    """What model.generate(**settings) writes, as it comes. Closing the iterator stops it within about one token.

    Special tokens are left out. An error while generating is raised by the iterator.
    """
    settings = dict(settings)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    criteria = StoppingCriteriaList([*settings.pop("stopping_criteria", []), _StopEvent(stop)])
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            model.generate(**settings, streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:  # whatever it is, it belongs to the caller, who must not wait for ever
            errors.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=generate, name="sparsewsi-answer", daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]


class _StopEvent(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
