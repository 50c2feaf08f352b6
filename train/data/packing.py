"""How several questions about one slide share its visual tokens, and several bags a pass of the LLM.

N patches. L = length of the packed sequence: of each bag the prefix, N visual tokens, then the questions one after
another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedTokenizerBase

from sparsewsi.model.prompt import build_prompt, end_of_turn, text_ids, visual_positions
from sparsewsi.model.sparse_wsi import SparseWSI
from train.attention import block_mask, causal, takes_blocks
from train.data.example import Example, Question


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


def word_target(question: Question, targets: str) -> str:
    """The answer as it is taught: its text, or with targets "letter" the letter of the option that it is."""
    if targets == "letter" and question.options:
        return ascii_uppercase[question.options.index(question.answer)]
    return question.answer


def pack(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    position: str,
    max_position: int | None,
    targets: str = "text",
) -> Packed:
    """Lay all questions of a bag behind one copy of its visual tokens.

    Every question sees the prefix, the visual tokens and itself, never another question, and gets the position ids it
    would have alone; the loss is that of separate sequences at the price of one visual prefix.
    """
    end = end_of_turn(tokenizer)
    segments: list[Tensor] = []
    answers: list[int] = []  # answer length of each segment
    prefix = torch.empty(0, dtype=torch.long)
    for question in example.questions:
        prompt = build_prompt(tokenizer, [{"role": "user", "content": question.question}], question.options or None)
        prefix = prompt.ids[: prompt.at]
        answer = [*text_ids(tokenizer, word_target(question, targets)), end]
        segments.append(torch.cat([prompt.ids[prompt.at :], torch.tensor(answer, dtype=torch.long)]))
        answers.append(len(answer))
    longest = max(len(segment) for segment in segments)
    places = visual_positions(example.indices, example.num_patches, len(prefix), longest, position, max_position)
    return lay_out(prefix, *places, segments, answers)


def lay_out(prefix: Tensor, visual: Tensor, start: int, segments: Sequence[Tensor], answers: Sequence[int]) -> Packed:
    """A prefix, visual tokens and the questions behind them, as one sequence.

    visual: position ids (N,) of the visual tokens; start: the first one of every question. segments: token ids of each
    question with its answer; answers: how many of them at the end are the answer
    """
    at, n = len(prefix), len(visual)
    positions = [torch.arange(at), visual] + [start + torch.arange(len(segment)) for segment in segments]
    owner = [torch.zeros(at + n, dtype=torch.long)] + [torch.full((len(s),), i + 1) for i, s in enumerate(segments)]
    keep, targets, begin = [], [], at + n
    for segment, length in zip(segments, answers):
        begin += len(segment)
        keep.append(torch.arange(begin - length - 1, begin - 1))
        targets.append(segment[-length:])
    text = torch.cat([prefix, *segments])
    placed = torch.cat([each.to(visual.device, non_blocking=True) for each in positions])
    order = torch.cat([torch.arange(at), len(text) + torch.arange(n), torch.arange(at, len(text))])
    asked = torch.cat(owner)  # (L,)
    return Packed(text, order, placed, torch.zeros_like(asked), asked, torch.cat(keep), torch.cat(targets))


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


def attention_mask(packed: Packed, device: torch.device, plain: bool, blocks: bool = False) -> Tensor | BlockMask:
    """The mask as transformers takes it: (1, 1, L, L) bool, a BlockMask, or no more than a word that it is causal.

    plain: use the last form where that is so. SDPA is then told is_causal and given no mask, which alone lets it take
    the flash kernel and grouped keys; a dense mask forbids both. Not on the CPU, where there is nothing to gain and
    sums would come out in another order. blocks: for an LLM that `attend` serves: a BlockMask in place of a dense mask,
    and `causal` in place of (1, L) ones. No mask at all would be wrong: position ids that jump are then read as several
    sequences.
    """
    if plain and packed.is_causal:  # not yet run on a GPU
        return causal(device) if blocks else torch.ones(1, len(packed.order), dtype=torch.long, device=device)
    bag, question = packed.bag.to(device, non_blocking=True), packed.question.to(device, non_blocking=True)
    return block_mask(bag, question) if blocks else visible(bag, question)[None, None]


def answer_logits(model: SparseWSI, visual: Tensor, packed: Packed) -> Tensor:
    """Logits (A, V) float32 of the answers' tokens, given the projected visual tokens (N, H) of all bags."""
    device = model.device
    ids, order, position_ids, keep = (
        each.to(device, non_blocking=True) for each in (packed.text_ids, packed.order, packed.position_ids, packed.keep)
    )
    text = model.llm.get_input_embeddings()(ids)  # (T, H)
    sequence = torch.cat([text, visual.to(text.dtype)])[order][None]
    with torch.autocast(sequence.device.type, torch.bfloat16, enabled=text.dtype == torch.bfloat16):
        output = model.llm(
            inputs_embeds=sequence,
            attention_mask=attention_mask(packed, device, device.type == "cuda", takes_blocks(model.llm)),
            position_ids=position_ids[None],
            logits_to_keep=keep,
            use_cache=False,
        )
    return output.logits[0].float()
