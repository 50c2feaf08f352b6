"""Which of the kept patches an answer rests on, and what would be answered from others.

Evidence is measured, not told: every kept patch is left out in turn and the answer it had is scored again. What the LLM
writes about patches plays no part.
K kept, N patches, D_v width of a visual token, L tokens of a prompt with its answers, H the LLM's width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from sparsewsi.bags.bag import Bag, check_bag
from sparsewsi.model.prompt import build_prompt, end_of_turn, text_ids
from sparsewsi.report.export import ranks as score_ranks

if TYPE_CHECKING:  # model.py stands above this file
    from sparsewsi.model.sparse_wsi import Selection, SparseWSI

# A patch matters if the answer is at least twice as likely with it as without it: it then holds one bit of the answer.
MATTERS = math.log(2)
# Largest error of an effect that a bfloat16 LLM was seen to make against float32, over the root of the answer's tokens.
NOISE = 0.13
TOKENS = {"cpu": 768, "cuda": 16_384}  # tokens of one pass: more saves no time, and logits take 200 kB a token
RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # settings of LLMs that change logits further


@dataclass(frozen=True, eq=False)
class Evidence:
    """How much the answer loses when patches are left out, in nats: exp(effect) is how many times less likely it gets.

    effects:     (K,) float32, one per selection.indices, for leaving out that patch alone; negative: the patch speaks
                 against the answer
    without_any: the same for leaving out all K at once
    baseline:    log-likelihood (option False) or log-odds (option True) of the answer from all K
    score_ranks: (K,) int64, rank by score, 1 = highest: the number of a patch on the overlay and in citations
    option:      the answer is one of the offered options, so likely means: against the other options
    limit:       effect from which a patch matters: MATTERS, or more where rounding alone could do as much
    """

    effects: Tensor
    without_any: float
    baseline: float
    score_ranks: Tensor
    option: bool
    limit: float = MATTERS

    @property
    def order(self) -> Tensor:
        """(K,) int64: places in selection.indices, most evidence first; ties go to the better score."""
        by_score = self.score_ranks.argsort()
        return by_score[self.effects[by_score].argsort(descending=True, stable=True)]

    @property
    def ranks(self) -> Tensor:
        """(K,) int64: the rank by evidence of each of selection.indices, 1 = the answer loses most without it."""
        return self.order.argsort() + 1

    @property
    def sentence(self) -> str:
        """What the numbers mean, for people who do not know what a likelihood is."""
        k, best = len(self.effects), int(self.order[0])
        patch, effect = f"#{int(self.score_ranks[best])}", float(self.effects[best])
        against = " against the other options" if self.option else ""
        if effect >= self.limit:
            more = int((self.effects >= self.limit).sum()) - 1
            others = f"; {more} more of the {k} patches matter, too" if more else "; no other patch matters much"
            return (
                f"Without patch {patch} the model would find this answer {_times(effect)} less likely{against}{others}."
            )
        weak = "No patch matters much to this answer: "
        if effect < math.log(1.05):
            weak += "it is hardly less likely without any single one."
        else:
            weak += f"without patch {patch}, which weighs most, it would be {_times(effect)} less likely{against}."
        if self.without_any >= self.limit:
            return f"{weak} Without all {k} it would be {_times(self.without_any)} less likely: they repeat each other."
        return f"{weak} The model would give it as readily without any patch: it does not rest on what the slide shows."


def _times(effect: float) -> str:
    """3.2 times, for an effect of log(3.2)."""
    factor = math.exp(min(effect, 700))
    return "more than 1,000 times" if factor > 1000 else f"{factor:.2g} times" if factor < 10 else f"{factor:.0f} times"


def cite(evidence: Evidence, most: int = 3) -> str:
    """Links to the patches the answer rests on, most evidence first: "[#5](#patch-5), [#1](#patch-1)"; "" if none.

    Only patches that matter (see Evidence.limit) are cited, and at most `most`. 5 is the rank by score.
    """
    places = [place for place in evidence.order.tolist() if evidence.effects[place] >= evidence.limit][:most]
    return ", ".join(f"[#{rank}](#patch-{rank})" for rank in evidence.score_ranks[places].tolist())


@torch.no_grad()
def leave_one_out(
    model: SparseWSI,
    selection: Selection,
    messages: Sequence[Mapping[str, str]],
    answer: str,
    options: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """How much less likely `answer` gets when one of the K patches is left out, for each of them, and for all K.

    messages, options: as they were given to model.answer. progress: called with (passes done, passes in all).
    Where the answer is one of the options (its text, its letter, or both), its log-odds among the options are compared,
    scored as model.option_probs does. Otherwise it is the answer's total log-likelihood: the total says how many times
    less likely the whole answer gets; the mean per token would let the words that any slide shares water that down.
    A patch is left out by closing it to the attention of all other tokens, so that every position id stays.
    K + 2 sequences, in passes of a bounded number of tokens: with K = 32 and the embedded LLM 4 to 6 s on one core for
    a short answer. Raises ValueError for an answer without a word.
    """
    if not answer.strip():
        raise ValueError("there is no answer to find evidence for. Ask the question first.")
    offered = [(letter, option.strip()) for letter, option in zip(ascii_uppercase, options or ()) if option.strip()]
    chosen = _chosen(answer, offered) if len(offered) > 1 else None
    prompt = build_prompt(model.tokenizer, messages, options)
    if chosen is None:
        rows, letters = [text_ids(model.tokenizer, answer.strip())], []
    elif model.config.option_scoring == "letter":
        rows, letters = [], [text_ids(model.tokenizer, letter)[-1] for letter, _ in offered]
    else:
        end = end_of_turn(model.tokenizer)
        rows, letters = [[*text_ids(model.tokenizer, option), end] for _, option in offered], []
    longest = max([1, *map(len, rows)])
    given = model.inputs(selection.tokens, selection.indices, selection.num_patches, prompt, longest)
    k, layout = len(selection.indices), _lay_out(model, given[0], given[1], rows)
    left_out = torch.cat([torch.zeros(1, k), torch.ones(1, k), torch.eye(k)]).bool()  # (K + 2, K)
    parts = left_out.split(max(1, TOKENS.get(model.device.type, 768) // layout.embeds.shape[1]))
    scores = []
    for done, part in enumerate(parts):
        if progress is not None:
            progress(done, len(parts))
        scores.append(_scores(model, layout, prompt.at, part, rows, letters))
    likelihoods = torch.cat(scores)  # (K + 2, 1 or number of options)
    if chosen is None:
        values = likelihoods[:, 0]
    else:
        others = [number for number in range(len(offered)) if number != chosen]
        lengths = torch.tensor([len(row) for row in rows] or [1])
        mean = likelihoods / lengths
        values = mean[:, chosen] - mean[:, others].logsumexp(1)
    rounding = 0.0 if given[0].dtype == torch.float32 or chosen is not None else NOISE * math.sqrt(longest)
    return Evidence(
        effects=values[0] - values[2:],
        without_any=float(values[0] - values[1]),
        baseline=float(values[0]),
        score_ranks=torch.from_numpy(score_ranks(selection)),
        option=chosen is not None,
        limit=max(MATTERS, rounding),
    )


def _chosen(answer: str, offered: Sequence[tuple[str, str]]) -> int | None:
    """Number of the option that the answer is: by text, by letter, or by both; None if it is in other words."""
    said = answer.strip().rstrip(".").casefold()
    texts, letters = [option for _, option in offered], [letter for letter, _ in offered]
    both = [f"{letter}. {option}" for letter, option in offered]
    for forms in (texts, both, letters):  # an option's text may be another one's letter
        for number, form in enumerate(forms):
            if said == form.rstrip(".").casefold():
                return number
    return None


@dataclass(frozen=True)
class _Layout:
    """A prompt with all answers to it in one sequence, in which no answer sees another."""

    embeds: Tensor  # (1, L, H)
    positions: Tensor  # (1, L)
    sees: Tensor  # (L, L) bool: may a token (row) attend to another
    keep: Tensor  # (A,) places whose logits predict the answers' tokens; the prompt's last one where there is no answer


def _lay_out(model: SparseWSI, embeds: Tensor, positions: Tensor, rows: Sequence[Sequence[int]]) -> _Layout:
    device, given = embeds.device, embeds.shape[1]
    lengths = [len(row) for row in rows]
    groups = torch.repeat_interleave(torch.arange(1 + len(rows)), torch.tensor([given, *lengths])).to(device)
    sees = torch.ones(len(groups), len(groups), dtype=torch.bool, device=device).tril()
    sees &= (groups == 0) | (groups == groups[:, None])
    keep, begin = [], given
    for length in lengths:
        keep += [given - 1, *range(begin, begin + length - 1)]
        begin += length
    text = torch.tensor([token for row in rows for token in row], dtype=torch.int64, device=device)
    after = [positions[0, -1] + 1 + torch.arange(length, device=device) for length in lengths]
    embedding: Any = model.llm.get_input_embeddings()
    return _Layout(
        torch.cat([embeds, embedding(text)[None]], 1),
        torch.cat([positions[0], *after])[None],
        sees,
        torch.tensor(keep or [given - 1], device=device),
    )


def _scores(
    model: SparseWSI,
    layout: _Layout,
    at: int,
    left_out: Tensor,
    rows: Sequence[Sequence[int]],
    letters: Sequence[int],
) -> Tensor:
    """Log-likelihoods (B, answers) of the rows, or logits (B, letters), with left_out (B, K) patches closed. CPU."""
    n, k = left_out.shape
    sees = layout.sees.expand(n, -1, -1).clone()  # (B, L, L)
    sees[:, :, at : at + k] &= ~left_out[:, None, :].to(sees.device)
    sees.diagonal(dim1=1, dim2=2).fill_(True)  # a token that nobody sees may see itself: an empty row would be NaN
    logits = _logits(
        model,
        layout.keep,
        inputs_embeds=layout.embeds.expand(n, -1, -1),
        position_ids=layout.positions.expand(n, -1),
        attention_mask=sees[:, None],
        use_cache=False,
    )  # (B, A, V)
    if letters:
        return logits[:, 0, list(letters)].cpu()
    targets = torch.tensor([token for row in rows for token in row], device=logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(n), reduction="none").view(n, -1).cpu()
    return -torch.stack([part.sum(1) for part in losses.split([len(row) for row in rows], 1)], 1)


def _logits(model: SparseWSI, keep: Tensor, **given: Any) -> Tensor:
    """The LLM's logits at the kept places, float32 (B, A, V).

    bfloat16 logits are rounded to steps of 1/16 and more, which is what one patch of many is worth; so the last layer
    is computed in float32, unless the LLM does more than a linear layer there.
    """
    llm: Any = model.llm.get_base_model() if isinstance(model.llm, PeftModel) else model.llm
    head = llm.get_output_embeddings()
    if type(head) is not nn.Linear or any(getattr(llm.config, name, None) for name in RESCALED):
        return llm(**given, logits_to_keep=keep).logits.float()
    hidden = llm.get_decoder()(**given).last_hidden_state[:, keep]  # (B, A, H)
    return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


# ---- what if: other patches


def without(selection: Selection, ranks: Sequence[int]) -> Selection:
    """The selection without the patches of these ranks by score, 1 = highest. Raises ValueError if none is left."""
    drop = torch.isin(torch.from_numpy(score_ranks(selection)), torch.tensor(list(ranks), dtype=torch.int64))
    if bool(drop.all()):
        raise ValueError("no patch would be left to answer from. Keep at least one.")
    return dataclasses.replace(selection, indices=selection.indices[~drop], tokens=selection.tokens[~drop])


def with_patches(model: SparseWSI, bag: Bag, selection: Selection, indices: Sequence[int] | Tensor) -> Selection:
    """The selection and these patches of its bag besides; indices, (M,) in 0..N-1, in any order, known ones too."""
    both = torch.cat([selection.indices, torch.as_tensor(indices, dtype=torch.int64)]).unique()  # ascending
    return dataclasses.replace(selection, indices=both, tokens=tokens_of(model, bag, both))


@torch.no_grad()
def tokens_of(model: SparseWSI, bag: Bag, indices: Tensor) -> Tensor:
    """Visual tokens (K, D_v) float32 of these patches, as model.select would give them. CPU.

    Raises ValueError for a bag of another encoder and for an index that the bag does not have.
    """
    check_bag(bag, model.config.encoder, model.config.feature_dim)
    n = len(bag.features)
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise ValueError(
            f"{bag.slide} has {n:,} patches, 0 to {n - 1}; got {int(indices.min())}, {int(indices.max())}."
        )
    if model.slide_encoder.pointwise:
        return model.encode(bag.features[indices]).cpu()
    return model.encode(bag.features).cpu()[indices]
