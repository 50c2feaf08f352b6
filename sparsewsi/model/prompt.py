"""Chat messages -> token ids, where the visual tokens go, and which position ids they get.

K kept patches of N, T text tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, TypeAlias

import torch
from torch import Tensor

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # ChatML
Tokenizer: TypeAlias = Any  # of transformers, which takes seconds to import: the page words a question without it
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """A tokenised chat: the visual tokens go before ids[at]."""

    ids: Tensor  # (T,) int64
    at: int


def format_question(question: str, options: Sequence[str] | None = None, letters: bool = True) -> str:
    """The question as the LLM reads it, then one line per option: "A. ...", or without its letter.

    Empty options are skipped, the others keep their letters. Raises ValueError for an empty question and for more
    options than letters.
    """
    options = options or ()
    if not question.strip():
        raise ValueError("the question is empty. Write one.")
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"a question may have at most {len(ascii_uppercase)} options, got {len(options)}.")
    lines = [question]
    for letter, option in zip(ascii_uppercase, options):
        if option.strip():
            lines.append(f"{letter}. {option}" if letters else option)
    return "\n".join(lines)


def build_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], options: Sequence[str] | None = None
) -> Prompt:
    """The chat up to and with the header of the assistant's next turn; the visual tokens open the first user turn.

    messages: [{"role": "user" | "assistant" | "system", "content": str}], the user's last; options belong to it.
    ChatML is written directly, without a system turn unless one is given; other tokenizers' chat templates are applied.
    Text from outside is tokenised as plain text: "<|im_end|>" in it is spelt out and ends nothing.
    Raises ValueError for messages that are not a chat, and for a tokenizer without any chat format.
    """
    turns = chat_turns(messages, options)
    first = next(i for i, (role, _) in enumerate(turns) if role == "user")
    markers = chatml_markers(tokenizer)
    if markers is not None:
        return _chatml(tokenizer, turns, first, *markers)
    return _from_template(tokenizer, turns, first)


def chatml_markers(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Ids of <|im_start|> and <|im_end|>, or None if the tokenizer does not know both as single tokens."""
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (TURN_START, TURN_END))
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    # Tokenizers answer with the unknown token's id for what they do not know.
    known = tokenizer.convert_ids_to_tokens([start, end]) == [TURN_START, TURN_END]
    return (start, end) if known else None


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends an answer: <|im_end|> where there is one, else the end-of-text token."""
    markers = chatml_markers(tokenizer)
    found = markers[1] if markers else tokenizer.eos_token_id
    if not isinstance(found, int):
        raise ValueError("the tokenizer has neither <|im_end|> nor an end-of-text token; choose a chat model.")
    return found


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text from outside; never a special token, whatever is typed."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for token, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids):
        if token in text and number in ids:
            raise ValueError(f"this LLM's tokenizer cannot read {token} as plain text. Remove it from the text.")
    return ids


def visual_positions(
    indices: Tensor, num_patches: int, at: int, text_len: int, mode: str, max_position: int | None
) -> tuple[Tensor, int]:
    """Position ids of the visual tokens, (K,) int64 on indices' device, and the first position of the text after them.

    indices: (K,) ascending places among the slide's num_patches. at: text tokens before them. text_len: text tokens
    after them, with those still to be generated. max_position: positions the LLM was trained for; None: no end.
    mode: "original": at + index, text goes on at at + num_patches (the paper);
          "scaled": the same as long as all fits into max_position, else the slide is squeezed linearly into the rest;
          "compact": consecutive, as if the slide had K patches.
    Raises ValueError if the kept patches and the text do not fit. Past the end go "original", as the paper has it, and
    "compact" where all patches are shown, for comparison.
    """
    assert mode in ("original", "scaled", "compact"), mode
    indices = indices.long()
    room = num_patches if max_position is None else max_position - at - text_len
    if mode == "compact":
        beyond = len(indices) == num_patches and room > 0
        indices, num_patches = torch.arange(len(indices), device=indices.device), len(indices)
    else:
        beyond = mode == "original"
    if beyond or num_patches <= room:
        return at + indices, at + num_patches
    if room < len(indices):
        raise ValueError(
            f"{at + text_len} text tokens and {len(indices)} visual tokens do not fit into the LLM's {max_position} "
            "positions. Shorten the chat or start a new one."
        )
    return at + indices * room // num_patches, at + room


def chat_turns(messages: Sequence[Mapping[str, str]], options: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(role, content) of every message, the options under the last. Raises ValueError for what is no chat."""
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"the chat is a list of messages, got {type(message).__name__} in place of one.")
        role, content = message.get("role"), message.get("content")
        if isinstance(content, str) and any("\ud800" <= letter <= "\udfff" for letter in content):
            raise ValueError("the text holds half a character (a lone surrogate). Write it again.")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f'a message must be {{"role": {" | ".join(ROLES)}, "content": text}}, '
                f"got role {role!r} with content of type {type(content).__name__}."
            )
        turns.append((role, content))
    if not turns or turns[-1][0] != "user":
        raise ValueError("the last message must be the user's. Add the question to be answered.")
    turns[-1] = ("user", format_question(turns[-1][1], options))
    return turns


def _chatml(tokenizer: Tokenizer, turns: list[tuple[str, str]], first: int, start: int, end: int) -> Prompt:
    newline = text_ids(tokenizer, "\n")
    ids: list[int] = []
    at = 0
    for number, (role, content) in enumerate(turns):
        ids += [start, *text_ids(tokenizer, f"{role}\n")]
        if number == first:
            at, content = len(ids), f"\n{content}"
        ids += [*text_ids(tokenizer, content), end, *newline]
    ids += [start, *text_ids(tokenizer, "assistant\n")]
    return Prompt(torch.tensor(ids), at)


def _from_template(tokenizer: Tokenizer, turns: list[tuple[str, str]], first: int) -> Prompt:
    """Render the template around placeholders, so that its special tokens are parsed and the turns' are not."""
    if not tokenizer.chat_template:
        raise ValueError("the LLM's tokenizer has no chat format. Choose an instruction-tuned LLM.")
    places = [f"sparsewsi-turn-{number}-content" for number in range(len(turns))]
    chat = [{"role": role, "content": place} for (role, _), place in zip(turns, places)]
    rest = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert isinstance(rest, str)
    ids: list[int] = []
    at = 0
    for number, place in enumerate(places):
        head, found, rest = rest.partition(place)
        if not found:
            raise ValueError(f"the LLM's chat template drops the {turns[number][0]} turn {number + 1}. Leave it out.")
        ids += tokenizer(head, add_special_tokens=False)["input_ids"]
        content = turns[number][1]
        if number == first:
            at, content = len(ids), f"\n{content}"
        ids += text_ids(tokenizer, content)
    ids += tokenizer(rest, add_special_tokens=False)["input_ids"]
    return Prompt(torch.tensor(ids), at)
