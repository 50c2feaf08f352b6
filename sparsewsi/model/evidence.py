"""Which of the kept patches an answer rests on. Nothing here loads a model.

Evidence is measured, not told: every kept patch is left out in turn and the answer it had is scored again. What the LLM
writes about patches plays no part. SparseWSI.leave_one_out measures; here are the value that it returns and the scoring
of one prompt's answers in one pass.
K kept, L tokens of a prompt with its answers, H the LLM's width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import DynamicCache

# A patch matters if the answer is at least twice as likely with it as without it: it then holds one bit of the answer.
MATTERS = math.log(2)
STRONGLY = math.log(10)  # and from here on the answer depends on the patches strongly
WORTH = math.log(1.05)  # nats, from which an effect is worth a number
# Largest error of an effect that a bfloat16 LLM was seen to make against float32, over the root of the answer's tokens.
NOISE = 0.13
# Tokens of one pass: more saves no time, and others wait for it. The GPU's is a guess (not yet run on a GPU).
TOKENS = {"cpu": 512, "cuda": 16_384}
PART = {"cpu": 256, "cuda": 16_384}  # of a sequence that is longer than that
ROUND = 8  # tokens that a sequence, and what a pass reads of it, is a multiple of
WORDS = 8192  # of the vocabulary, whose logits are held at once
LONG = 128  # tokens whose logits of so many words take long enough for others to have a turn between
RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # settings of LLMs that change logits further


@dataclass(frozen=True, eq=False)
class Evidence:
    """How much the answer loses when patches are left out, in nats: exp(effect) is how many times less likely it gets.

    effects:     (K,) float32, one per selection.indices, for leaving out that patch alone; negative: the patch speaks
                 against the answer
    without_any: the same for leaving out all K at once
    baseline:    log-likelihood (option False) or log-odds (option True) of the answer from all K
    score_ranks: (K,) int64, Selection.ranks: the patches' numbers
    option:      the answer is one of the offered options, so likely means: against the other options
    limit:       effect from which a patch matters: MATTERS, or more where rounding alone could do as much
    group_effects: (G,) float32, for leaving out each of the groups that were asked for
    """

    effects: Tensor
    without_any: float
    baseline: float
    score_ranks: Tensor
    option: bool
    limit: float = MATTERS
    group_effects: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def order(self) -> Tensor:
        """(K,) int64: places in selection.indices, most evidence first; ties go to the better score."""
        by_score = self.score_ranks.argsort()
        return by_score[self.effects[by_score].argsort(descending=True, stable=True)]

    @property
    def sentence(self) -> str:
        """What the numbers mean, for people who do not know what a likelihood is."""
        k, best = len(self.effects), int(self.order[0])
        patch, effect = f"#{int(self.score_ranks[best])}", float(self.effects[best])
        against = " against the other options" if self.option else ""
        everything = f"Without all {k} it would be {tell_effect(self.without_any)}"
        if effect >= self.limit:
            more = int((self.effects >= self.limit).sum()) - 1
            others = f"; {more} more of the {k} patches matter, too" if more else "; no other patch matters much"
            told = f"Without patch {patch} the model would find this answer {tell_effect(effect)}{against}{others}."
            return f"{told} {everything}."
        weak = (
            f"No patch matters much: without {patch}, which weighs most, the answer is {tell_effect(effect)}{against}."
        )
        if self.without_any >= self.limit:
            return f"{weak} {everything}: they repeat each other."
        undecided = grade([effect, self.without_any, *self.group_effects.tolist()]) == "not"
        return f"{weak} {everything}{': the slide does not decide it' if undecided else ''}."


def grade(effects: Iterable[float]) -> str:
    """How far an answer depends on the patches, by the largest of all effects that were measured of it.

    So of two answers the one with the larger effect never has the lower grade.
    """
    most = max(effects)
    return "strongly" if most >= STRONGLY else "partly" if most >= MATTERS else "not"


def tell_effect(effect: float) -> str:
    """What leaving something out does to an answer, in words; effect in nats."""
    if abs(effect) < WORTH:
        return "hardly less likely"
    return f"{format_effect(abs(effect))} times {'less' if effect > 0 else 'more'} likely"


def format_effect(effect: float) -> str:
    """An effect in nats as what an answer's likelihood is divided by without the patch: "3.2" for log(3.2)."""
    value = math.exp(min(effect, 50))
    return "over 1000" if value > 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def find_option(answer: str, offered: Sequence[tuple[str, str]]) -> int | None:
    """Number of the offered (letter, option) that the answer is: by text, by both, or by letter; None for others."""
    words = answer.strip().rstrip(".").casefold()
    texts, letters = [option for _, option in offered], [letter for letter, _ in offered]
    both = [f"{letter}. {option}" for letter, option in offered]
    for forms in (texts, both, letters):  # an option's text may be another one's letter
        for number, form in enumerate(forms):
            if words == form.rstrip(".").casefold():
                return number
    return None


# ---- scoring answers with some patches out of sight


@dataclass(frozen=True)
class Layout:
    """A prompt with all answers to it in one sequence, in which no answer sees another, and what fills it up."""

    embeds: Tensor  # (1, L, H)
    positions: Tensor  # (1, L)
    sees: Tensor  # (L, L) bool: may a token (row) attend to another
    keep: Tensor  # (A,) places whose logits predict the answers' tokens; the prompt's last one where there is no answer


def lay_out(embedding: nn.Module, embeds: Tensor, positions: Tensor, rows: Sequence[Sequence[int]]) -> Layout:
    """A prompt, embeds (1, P, H) at positions (1, P), and the token ids of each answer, as one sequence.

    It is filled up to a multiple of ROUND with tokens that no other sees: for every other length kernels would be made
    anew, and kept.
    """
    device, given = embeds.device, embeds.shape[1]
    lengths = [len(row) for row in rows]
    more = -(given + sum(lengths)) % ROUND
    sizes = torch.tensor([given, *lengths, more])
    groups = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device)
    sees = torch.ones(len(groups), len(groups), dtype=torch.bool, device=device).tril()
    sees &= (groups == 0) | (groups == groups[:, None])
    keep, begin = [], given
    for length in lengths:
        keep += [given - 1, *range(begin, begin + length - 1)]
        begin += length
    text = torch.tensor([token for row in rows for token in row], dtype=torch.int64, device=device)
    after = [positions[0, -1] + 1 + torch.arange(length, device=device) for length in lengths]
    return Layout(
        torch.cat([embeds, embedding(text)[None], embeds[:, :1].expand(-1, more, -1)], 1),
        torch.cat([positions[0], *after, positions[0, :1].expand(more)])[None],
        sees,
        torch.tensor(keep or [given - 1], device=device),
    )


def score_without_each(
    llm: Any,
    layout: Layout,
    at: int,
    left_out: Tensor,
    rows: Sequence[Sequence[int]],
    letters: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What score_answers gives, with all patches in sight first, then for each row of left_out (M, K): (1 + M, ...).

    No token sees a patch that comes after it, so what is before the first patch that a row leaves out is read once.
    progress: called with (passes done, passes in all), also within a pass that takes long
    """
    from transformers import DynamicCache  # seconds, that whoever holds an Evidence does not wait for

    length, k = layout.embeds.shape[1], left_out.shape[1]
    in_sight, most = torch.zeros(1, k).bool(), TOKENS.get(layout.embeds.device.type, TOKENS["cpu"])
    if (1 + len(left_out)) * length <= most:  # one pass is enough
        look = partial(progress or (lambda *_: None), 0, 1)
        look()
        return score_answers(llm, layout, at, torch.cat([in_sight, left_out]), rows, letters, look)
    passes = plan_passes(at + left_out.int().argmax(1), length, most)
    looks = [partial(progress or (lambda *_: None), done, 1 + len(passes)) for done in range(1 + len(passes))]
    cache = DynamicCache()
    looks[0]()
    whole = score_answers(llm, layout, at, in_sight, rows, letters, looks[0], 0, cache)
    scores = torch.cat([whole, whole.new_empty(len(left_out), whole.shape[1])])
    for look, (numbers, start) in zip(looks[1:], passes):
        look()
        known = share(cache, start, len(numbers))
        scores[1 + numbers] = score_answers(llm, layout, at, left_out[numbers], rows, letters, look, start, known)
    return scores


def plan_passes(begins: Tensor, length: int, most: int) -> list[tuple[Tensor, int]]:
    """Which sequences are read together, and from which token on, given where each begins to differ: (M,).

    If there is more than one sequence in a pass, it reads `most` tokens at most, and holds twice as many.
    """
    order, passes = begins.argsort(stable=True), []
    while len(order):
        start = int(begins[order[0]]) // ROUND * ROUND
        n = max(1, min(most // (length - start), 2 * most // length))
        passes.append((order[:n], start))
        order = order[n:]
    return passes


def share(cache: Any, length: int, n: int) -> "DynamicCache":
    """The keys and values of the first tokens of one sequence (a DynamicCache), for n that begin with them."""
    shared = type(cache)()
    for number, layer in enumerate(cache.layers):
        known = (part[:, :, :length].expand(n, -1, -1, -1) for part in (layer.keys, layer.values))
        shared.update(*known, number)
    return shared


def score_answers(
    llm: Any,
    layout: Layout,
    at: int,
    left_out: Tensor,
    rows: Sequence[Sequence[int]],
    letters: Sequence[int],
    look: Callable[[], object] | None = None,
    start: int = 0,
    cache: "DynamicCache | None" = None,
) -> Tensor:
    """Log-likelihoods (B, answers) of the rows, or logits (B, letters), with left_out (B, K) patches closed. CPU.

    llm: a causal LLM of transformers, not wrapped. at: place of the first of the K visual tokens. look: called between
    the passes that a long sequence takes; what it raises ends the work. start, cache: as read_kept takes them
    """
    n, k = left_out.shape
    sees = layout.sees.expand(n, -1, -1).clone()  # (B, L, L)
    sees[:, :, at : at + k] &= ~left_out[:, None, :].to(sees.device)
    sees.diagonal(dim1=1, dim2=2).fill_(True)  # a token that nobody sees may see itself: an empty row would be NaN
    look = look or (lambda: None)
    head, targets = llm.get_output_embeddings(), _targets(rows, sees.device)
    if type(head) is not nn.Linear or any(getattr(llm.config, name, None) for name in RESCALED):
        logits = read_kept(llm, layout, sees, look, start, cache, logits=True).float()  # (B, A, V)
        if letters:
            return logits[:, 0, list(letters)].cpu()
        found = logits.log_softmax(-1).gather(-1, targets.expand(n, -1)[..., None])[..., 0]
    else:
        hidden = read_kept(llm, layout, sees, look, start, cache)  # (B, A, H)
        if letters:
            return _linear(hidden[:, 0], head, list(letters)).cpu()
        found = log_likelihoods(hidden, head, targets, look)
    return torch.stack([part.sum(1) for part in found.cpu().split([len(row) for row in rows], 1)], 1)


def read_kept(
    llm: Any,
    layout: Layout,
    sees: Tensor,
    look: Callable[[], object],
    start: int = 0,
    cache: "DynamicCache | None" = None,
    logits: bool = False,
) -> Tensor:
    """The last hidden states (B, A, H) at the places that a layout keeps, or the logits (B, A, V) there.

    sees: (B, L, L) bool. start: which token to begin with, none of those before being kept; cache: the keys and values
    of those before, to which the others' are added
    More tokens than TOKENS are read in parts, each of which sees those before by their keys and values.
    """
    from transformers import DynamicCache  # as above

    n, length = sees.shape[:2]
    device = sees.device.type
    whole = n * (length - start) <= TOKENS.get(device, TOKENS["cpu"])
    most = length if whole else max(1, PART.get(device, PART["cpu"]) // n)
    if cache is None and not whole:
        cache = DynamicCache()
    found, places = [], []
    for begin in range(start, length, most):
        part = slice(begin, min(length, begin + most))
        if begin > start:
            look()
        mine = ((layout.keep >= part.start) & (layout.keep < part.stop)).nonzero()[:, 0]
        here = layout.keep[mine] - begin
        given = {
            "inputs_embeds": layout.embeds[:, part].expand(n, -1, -1),
            "position_ids": layout.positions[:, part].expand(n, -1),
            "attention_mask": sees[:, None, part, : part.stop],
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if logits:
            found.append(llm(**given, logits_to_keep=here).logits)
        else:
            found.append(llm.get_decoder()(**given).last_hidden_state[:, here])
        places.append(mine)
    return torch.cat(found, 1)[:, torch.cat(places).argsort()]


def log_likelihoods(
    hidden: Tensor, head: nn.Linear, targets: Tensor, look: Callable[[], object] = lambda: None
) -> Tensor:
    """Log-likelihoods (B, A) of the targets (A,) from hidden (B, A, H), the last layer in float32.

    bfloat16 logits are rounded to steps of 1/16 and more, which is what one patch of many is worth. WORDS rows of the
    last layer at a time: neither a float32 copy of it nor the logits of a whole vocabulary are ever held.
    """
    total = torch.full(hidden.shape[:2], -torch.inf, device=hidden.device)
    for first in range(0, head.out_features, WORDS):
        if hidden.shape[0] * hidden.shape[1] > LONG:
            look()
        total = torch.logaddexp(total, _linear(hidden, head, slice(first, first + WORDS)).logsumexp(-1))
    own = head.weight[targets].float()  # (A, H)
    chosen = (hidden.float() * own).sum(-1)
    return chosen + (0 if head.bias is None else head.bias[targets].float()) - total


def _linear(hidden: Tensor, head: nn.Linear, words: slice | list[int]) -> Tensor:
    """Logits (..., words) float32 of these words of the vocabulary."""
    return F.linear(hidden.float(), head.weight[words].float(), None if head.bias is None else head.bias[words].float())


def _targets(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([token for row in rows for token in row], device=device)
