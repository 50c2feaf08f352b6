"""A vision-language model of transformers in this program: LLaVA, InternVL, Qwen-VL, Gemma, MedGemma, ..."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sparsewsi.bags.hub import explain_refusal, first_line, require_hub
from sparsewsi.model.llm import default_device, default_dtype
from sparsewsi.model.prompt import text_ids
from sparsewsi.model.stream import stream_text
from sparsewsi.readers.pictures import ANSWER_TOKENS, PictureReader, ReaderError, Turns


class LocalReader(PictureReader):
    """Any AutoModelForImageTextToText with the processor and chat template it is published with."""

    likelihoods = True

    def __init__(
        self, name: str, model: Any, processor: Any, images_per_call: int | None = None, overview: bool = False
    ):
        if not processor.chat_template:
            raise ReaderError(f"{name} has no chat template. Choose an instruction-tuned model.")
        self.name, self.model, self.processor = name, model, processor
        self.images_per_call, self.overview = images_per_call, overview
        self.exact = model.dtype == torch.float32

    def stream(self, turns: Turns) -> Iterator[str]:
        return self._count(self._encode(turns))

    def _count(self, given: dict[str, Tensor]) -> Iterator[str]:
        """The next turn, piece by piece, and then its tokens."""
        settings = {"do_sample": False, "max_new_tokens": ANSWER_TOKENS}
        said, self.tokens = "", None
        pieces: Any = stream_text(self.model, self.processor.tokenizer, {**given, **settings})
        with closing(pieces):
            for piece in pieces:
                said += piece
                yield piece
        self.tokens = given["input_ids"].shape[1], len(text_ids(self.processor.tokenizer, said))

    @torch.no_grad()
    def score(self, turns: Turns, answers: Sequence[str], end: bool) -> tuple[Tensor, Tensor]:
        given = self._encode(turns)
        totals, lengths = [], []
        for answer in answers:
            ids = [*text_ids(self.processor.tokenizer, answer), *([self._end_of_turn()] if end else [])]
            row = torch.tensor([ids], device=self.model.device)
            output = self.model(**_append(given, row), logits_to_keep=len(ids) + 1, use_cache=False)
            likelihoods = output.logits[0, -len(ids) - 1 : -1].float().log_softmax(-1)  # (A, V)
            totals.append(likelihoods.gather(1, row[0, :, None]).sum())
            lengths.append(len(ids))
        return torch.stack(totals).cpu(), torch.tensor(lengths)

    def _encode(self, turns: Turns) -> dict[str, Tensor]:
        """What the model is given: ids (1, L) with a place for every part of a picture, and the pictures."""
        chat = [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part}
                    if isinstance(part, str)
                    else {"type": "image", "image": Image.fromarray(part)}
                    for part in parts
                ],
            }
            for role, parts in turns
        ]
        given = self.processor.apply_chat_template(
            chat,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,  # "<image>" or an end of turn that somebody types is text
        ).to(self.model.device, self.model.dtype)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and given["input_ids"].shape[1] + ANSWER_TOKENS > longest:
            raise ReaderError(
                f"The pictures and the chat are {given['input_ids'].shape[1]:,} tokens, and {self.name} reads "
                f"{longest:,} with its answer. Show it fewer patches (--reader-images), or start a new chat."
            )
        return dict(given)

    def _end_of_turn(self) -> int:
        """The token that ends an answer: of those that end a text, the one that the chat template writes."""
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        ends = [ends] if isinstance(ends, int) else list(ends)
        template = self.processor.chat_template
        return next((end for end in ends if tokenizer.convert_ids_to_tokens(end) in template), ends[0])


def load_reader(source: str, images_per_call: int | None = None, overview: bool = False) -> LocalReader:
    """The model of a hub id or folder. Its safetensors alone are read; code from its repository is never executed.

    Raises ReaderError, with what to do, for a model that cannot be had or is none that reads pictures and chats.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(source).expanduser()
    name = f"hf:{folder.name if folder.is_dir() else source}"
    cached = folder.is_dir() or isinstance(try_to_load_from_cache(source, "config.json"), str)
    device = default_device()
    try:
        if not cached:
            require_hub(name, source)
        place = str(folder) if folder.is_dir() else source
        processor = AutoProcessor.from_pretrained(place, local_files_only=cached)
        pair: Any = AutoModelForImageTextToText.from_pretrained(
            place,
            local_files_only=cached,
            dtype=default_dtype(device),
            use_safetensors=True,
            output_loading_info=True,
        )
        model, found = pair
    except ImportError as error:
        raise ReaderError(f"{name} needs a package that is not installed: {first_line(error)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ReaderError(_explain(name, source, folder.is_dir(), error)) from error
    lost = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if lost:
        raise ReaderError(f"{name} lacks {len(lost)} of its weights, or has them in another shape: {lost[0]}, ...")
    if found["unexpected_keys"]:
        warnings.warn(
            f"{name} has weights that its network does not use: {sorted(found['unexpected_keys'])[:3]}.", stacklevel=1
        )
    return LocalReader(name, model.eval().to(device), processor, images_per_call, overview)


def _explain(name: str, source: str, is_folder: bool, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"{name} is not part of transformers: it needs code from its repository, which is not executed here. "
            "Serve it with vLLM and read it through openai:."
        )
    if "Unrecognized configuration class" in text or "AutoProcessor" in text or "Unrecognized processing" in text:
        return f"{name} is no model that reads pictures. Choose one whose task is image-text-to-text."
    if is_folder:
        return f"{name} cannot be loaded: {first_line(error)}"
    return str(error) if "local cache" in text else str(explain_refusal(name, source, error))


def _append(given: dict[str, Tensor], row: Tensor) -> dict[str, Tensor]:
    """What the model is given, with the tokens of a row (1, A) after its ids."""
    grown = dict(given)
    for key, value in given.items():
        if key == "input_ids":
            grown[key] = torch.cat([value, row.to(value.dtype)], 1)
        elif value.shape == given["input_ids"].shape:  # a mask: 1; a type of token, of which text is 0
            more = torch.full_like(row, int(key == "attention_mask"), dtype=value.dtype)
            grown[key] = torch.cat([value, more], 1)
    return grown
