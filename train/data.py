"""Training examples and how several questions about one slide share its visual tokens.

L = length of the packed sequence: of each bag the prefix, N visual tokens, then the questions one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsewsi.model import SparseWSI
from sparsewsi.prompt import build_prompt, end_of_turn, text_ids, visual_positions

IGNORE = -100  # the label of a position that carries no loss


@dataclass(frozen=True)
class Question:
    """One question and its answer in words; options is empty for an open question."""

    question: str
    answer: str
    options: tuple[str, ...] = ()
    family: str = ""


@dataclass(frozen=True)
class Example:
    """One bag and the questions about it."""

    features: Tensor  # (N, D)
    indices: Tensor  # (N,) ascending: the patches' places among all num_patches of the slide
    num_patches: int
    questions: tuple[Question, ...]
    kinds: tuple[str, ...] = ()  # ground truth of the patches, where known


@dataclass(frozen=True)
class Packed:
    """Token ids, positions, mask and targets of bags with their questions, without the visual tokens themselves."""

    text_ids: Tensor  # (T,) of each bag the prefix, then the questions with their answers
    order: Tensor  # (L,) where each place of the sequence comes from: text i is i, visual token j is T + j
    position_ids: Tensor  # (L,)
    mask: Tensor  # (L, L) bool: True where a query (row) may see a key (column)
    keep: Tensor  # (A,) places in the sequence whose next token is part of an answer
    targets: Tensor  # (A,) those next tokens


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
    group = torch.cat(owner)  # (L,)
    causal = torch.ones(len(group), len(group), dtype=torch.bool).tril()
    mask = causal & ((group[None, :] == 0) | (group[None, :] == group[:, None]))
    return Packed(text, order, torch.cat(positions), mask, torch.cat(keep), torch.cat(targets))


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
        torch.block_diag(*(part.mask for part in parts)).bool(),
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


def answer_logits(model: SparseWSI, visual: Tensor, packed: Packed) -> Tensor:
    """Logits (A, V) float32 of the answers' tokens, given the projected visual tokens (N, H) of all bags."""
    text = model.llm.get_input_embeddings()(packed.text_ids)  # (T, H)
    sequence = torch.cat([text, visual.to(text.dtype)])[packed.order][None]
    with torch.autocast(sequence.device.type, torch.bfloat16, enabled=text.dtype == torch.bfloat16):
        output = model.llm(
            inputs_embeds=sequence,
            attention_mask=packed.mask[None, None],
            position_ids=packed.position_ids[None],
            logits_to_keep=packed.keep,
            use_cache=False,
        )
    return output.logits[0].float()
