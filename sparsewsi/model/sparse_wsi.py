"""SparseWSI: select the patches that matter, answer from them.

N patches, K kept, D feature dim, D_v width of a visual token, T text tokens, L = K + T, H the LLM's width, V
vocabulary.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsewsi.bags.bag import Bag, check_bag
from sparsewsi.model import artefact, evidence, limits, novelty
from sparsewsi.model.config import SparseWSIConfig, name_model
from sparsewsi.model.evidence import Evidence
from sparsewsi.model.limits import Limits
from sparsewsi.model.llm import load_llm
from sparsewsi.model.prompt import Prompt, build_prompt, end_of_turn, text_ids, visual_positions
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import (
    LEARNED,
    QUESTION,
    ROWS,
    SELECTORS,
    Scorer,
    check_selector,
    describe_slide,
    evenly,
    hard_topk,
    select_learned,
    weigh_by_question,
)
from sparsewsi.model.slide_encoder import SlideEncoder, build_projector
from sparsewsi.model.stream import stream_text
from sparsewsi.model.words import Words, find_nearest, pick_words, place_words

PARTS = ("slide_encoder", "scorer", "projector")  # what model.safetensors holds
MAX_NEW_TOKENS = 128


class SparseWSI(nn.Module):
    """Slide encoder, scorer and projector (float32) in front of a causal LLM (in its own dtype)."""

    llm: PreTrainedModel | PeftModel
    limits: Limits = Limits()  # what it was validated on
    trained_on: novelty.Summary | None = None  # what its training features looked like, if the artefact says so
    merged: bool = False  # whether the adapter's weights were added to the LLM's, which then is not to be trained
    name: str = "unsaved model"  # what people are told: the last part of its folder's path, or its repository
    weights_sha256: str | None = None  # of the files it was loaded from, see artefact.weights_digest

    def __init__(self, config: SparseWSIConfig, llm: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.llm, self.tokenizer = config, llm, tokenizer
        embeddings = _embedding(llm).weight.detach()  # (V, H)
        width = embeddings.shape[1]
        self.slide_encoder = SlideEncoder(
            config.feature_dim, config.dim, config.slide_encoder_layers, config.slide_encoder, config.heads
        )
        self.scorer = Scorer(
            config.dim,
            config.scorer_layers,
            config.scorer_dim,
            config.heads,
            config.scorer_attention,
            config.scorer_relative,
        )
        self.projector = build_projector(config.projector, config.dim, width)
        for part in (self.slide_encoder, self.scorer, self.projector):
            part.to(device=embeddings.device, dtype=torch.float32)

    @property
    def device(self) -> torch.device:
        return _embedding(self.llm).weight.device

    @cached_property
    def text_std(self) -> float:
        """Standard deviation of the LLM's text embeddings."""
        embeddings = _embedding(self.llm).weight.detach()  # (V, H)
        # Some 4,096 rows are enough for it, and save a float32 copy of a 150,000-word vocabulary.
        return float(embeddings[:: max(1, len(embeddings) // 4096)].float().std())

    @property
    def max_position(self) -> int | None:
        """Budget for all position ids."""
        return self.config.max_position or getattr(self.llm.config, "max_position_embeddings", None)

    # ---- selection

    def encode(self, features: Tensor) -> Tensor:
        """(N, D) of any float type -> (N, D_v) float32 on the model's device; in parts where no patch sees another."""
        parts = features.split(ROWS) if self.slide_encoder.pointwise and len(features) else (features,)
        return torch.cat([self.slide_encoder(part.to(self.device, torch.float32)) for part in parts])

    def score(self, x: Tensor) -> Tensor:
        """(N, D_v) of a whole slide -> (N,) float32; in parts where no patch sees another."""
        parts = x.split(ROWS) if self.scorer.attention == "local" and len(x) else (x,)
        slide = describe_slide(parts) if self.scorer.relative else None
        return torch.cat([self.scorer(part, slide) for part in parts])

    @torch.no_grad()
    def select(
        self,
        bag: Bag,
        k: int | None = None,
        selector: str = "learned",
        seed: int = 0,
        question: str = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> Selection:
        """The k patches (default: config.num_tokens) that the model's own selection, or another one, keeps.

        selector: "learned" the model's own: the highest scores or, if it has a diversity, "mmr"; "topk" the highest
        scores (the paper's); "mmr" high scores but no two alike; or a key of SELECTORS, where the seed matters to those
        that draw. "question" (ours): high scores of patches that are near to words of the question, see
        weigh_by_question; the scores of the selection stay the model's. progress: called with (parts scored, parts in
        all) of a large bag; what it raises ends the work.
        Raises ValueError for a bag without patches, of another encoder or dimension, and for an unknown selector.
        """
        check_bag(bag, self.config.encoder, self.config.feature_dim)
        n = len(bag.features)
        if n == 0:
            raise ValueError(f"{bag.slide} has no patch to select from (no tissue was found). Choose another slide.")
        if selector != QUESTION:
            check_selector(selector)
        selector = self.config.own_selector if selector == "learned" else selector
        k = self.config.num_tokens if k is None else k
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        x = None
        if self.slide_encoder.pointwise and self.scorer.attention == "local":  # memory must not grow with N
            parts = bag.features.split(ROWS)
            count = len(parts) * (2 if self.scorer.relative else 1)
            told = _tell_each(parts, count, progress)
            slide = describe_slide(map(self.encode, told)) if self.scorer.relative else None
            told = _tell_each(parts, count, progress, count - len(parts))
            scores = torch.cat([self.scorer(self.encode(part), slide).cpu() for part in told])
        else:
            x = self.encode(bag.features)
            scores = self.score(x).cpu()
        if selector in LEARNED:
            indices = select_learned(selector, scores, bag.features, k, self.config.diversity)
        elif selector == QUESTION:
            indices = hard_topk(weigh_by_question(scores, self.relate(bag, question)), k)
        elif selector == "evenly":
            indices = evenly(n, k)
        else:
            indices = SELECTORS[selector](bag.features, bag.coords, k, seed)
        tokens = self.encode(bag.features[indices]) if x is None else x[indices.to(x.device)]
        return Selection(indices, scores, tokens.cpu(), n)

    @torch.no_grad()
    def tokens_of(self, bag: Bag, indices: Tensor) -> Tensor:
        """Visual tokens (K, D_v) float32 of these patches, as select would give them. CPU.

        Raises ValueError for a bag of another encoder and for an index that the bag does not have.
        """
        check_bag(bag, self.config.encoder, self.config.feature_dim)
        n = len(bag.features)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n:
            raise ValueError(
                f"{bag.slide} has {n:,} patches, 0 to {n - 1}; got {int(indices.min())}, {int(indices.max())}."
            )
        if self.slide_encoder.pointwise:
            return self.encode(bag.features[indices]).cpu()
        return self.encode(bag.features).cpu()[indices]

    @torch.no_grad()
    def words(self, bag: Bag, progress: Callable[[int, int], None] | None = None) -> Words:
        """The nearest word of each of all N patches, of limits.vocabulary; costs no pass of the LLM (ours).

        progress: as select calls it
        Raises ValueError for a model without a vocabulary and for a bag of another encoder or dimension.
        """
        check_bag(bag, self.config.encoder, self.config.feature_dim)
        if not self.limits.vocabulary:
            raise ValueError(f"{self.name} has no words for patches: its limits.json names no vocabulary.")
        if not self.slide_encoder.pointwise:
            raise ValueError(f"{self.name} encodes no patch alone, so that none has a word of its own.")
        table = self.place_words(self.limits.vocabulary)
        parts = bag.features.split(ROWS)
        found = [
            find_nearest(self.projector(self.encode(part)), table, self.limits.alike)
            for part in _tell_each(parts, len(parts), progress)
        ]
        nearest, cosine = (
            (torch.cat(parts).cpu() for parts in zip(*found)) if found else (torch.empty(0).long(), torch.empty(0))
        )
        return Words(self.limits.vocabulary, nearest, cosine)

    @torch.no_grad()
    def relate(self, bag: Bag, question: str) -> Tensor:
        """Largest cosine (N,) float32 of each patch, as the LLM is given it, to a word of the question. CPU.

        Raises ValueError for a question without a word that names something.
        """
        words = pick_words(question)
        if not words:
            raise ValueError("the selector question needs a question with words that name something.")
        table = self.place_words(words)
        parts = bag.features.split(ROWS) if self.slide_encoder.pointwise else (bag.features,)
        return torch.cat([find_nearest(self.projector(self.encode(part)), table, 0.0)[1] for part in parts]).cpu()

    def place_words(self, words: Sequence[str]) -> Tensor:
        """Directions (C, H) of words among the LLM's input embeddings."""
        return place_words(_embedding(self.llm).weight.detach(), lambda text: text_ids(self.tokenizer, text), words)

    # ---- what the LLM sees

    def project(self, tokens: Tensor) -> Tensor:
        """(..., K, D_v) -> (..., K, H) float32, unless it is plain with the spread of the LLM's text embeddings."""
        projected = self.projector(tokens.to(self.device, torch.float32))
        return projected * self.text_std if self.config.projector == "scaled" else projected

    def inputs(
        self, tokens: Tensor, indices: Tensor, num_patches: int, prompt: Prompt, reserve: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the LLM is given: embeddings (1, L, H), position ids (1, L) and an attention mask of ones (1, L).

        tokens: (K, D_v) with their ascending places (K,) among num_patches. reserve: positions that tokens still to be
        generated will take. The mask is explicit because without one, jumping position ids are read as several
        sequences packed into one, which then do not see each other.
        """
        after = len(prompt.ids) - prompt.at
        visual, start = visual_positions(
            indices.cpu(), num_patches, prompt.at, after + reserve, self.config.position, self.max_position
        )
        positions = torch.cat([torch.arange(prompt.at), visual, start + torch.arange(after)]).to(self.device)
        text = _embedding(self.llm)(prompt.ids.to(self.device))  # (T, H)
        embeds = torch.cat([text[: prompt.at], self.project(tokens).to(text.dtype), text[prompt.at :]])
        return embeds[None], positions[None], torch.ones_like(positions)[None]

    # ---- answers

    def answer(
        self,
        selection: Selection,
        messages: Sequence[Mapping[str, str]],
        options: Sequence[str] | None = None,
        **generate_kwargs: Any,
    ) -> Iterator[str]:
        """The assistant's next turn, piece by piece; greedy and at most 128 tokens unless told otherwise.

        messages: the whole chat so far, the user's question last; its options, if any, are listed under it. With two
        options or more the answer is the likeliest of them, as option_probs finds it, and never other words. Each call
        costs K visual tokens + the text. generate_kwargs go to transformers' generate: cache_implementation="static"
        gives the same text and lets a GPU compile the steps, which pays for many answers.
        Closing the iterator stops the generation within about one token. Bad messages raise ValueError here, an error
        while generating is raised by the iterator.
        """
        prompt = build_prompt(self.tokenizer, messages, options)
        if options and sum(bool(option.strip()) for option in options) > 1:
            return self._choose(selection, prompt, options)
        settings = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, **generate_kwargs}
        with torch.no_grad():
            embeds, positions, mask = self.inputs(
                selection.tokens, selection.indices, selection.num_patches, prompt, settings["max_new_tokens"]
            )
        settings |= {
            "inputs_embeds": embeds,
            "position_ids": positions,
            "attention_mask": mask,
            "use_cache": True,  # generate drops a mask of ones, which is only harmless with a cache (see inputs)
            "eos_token_id": self._stop_tokens(),
        }
        return stream_text(self.llm, self.tokenizer, settings)

    def _stop_tokens(self) -> list[int]:
        given = self.llm.generation_config.eos_token_id  # type: ignore[union-attr]
        given = [given] if isinstance(given, int) else list(given or [])
        return sorted({end_of_turn(self.tokenizer), *given})

    @torch.no_grad()
    def option_probs(
        self,
        selection: Selection,
        question: str | Sequence[Mapping[str, str]],
        options: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Probability of each option as the answer, (n_options,) float32 on the CPU, sums to 1; an empty option gets 0.

        question: in words, or the whole chat with it as the last turn, as `answer` was given it
        config.option_scoring: "text": softmax over the mean log-likelihood per token of the option's text, with the end
        of the turn, as the assistant's answer; "letter": softmax over the logits of the options' letters.
        progress: called with (0, 1) between the passes that long options take; what it raises ends the work.
        """
        if not any(option.strip() for option in options):
            raise ValueError(f"option_probs needs at least one option that is not empty, got {list(options)!r}.")
        chat = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return self._option_probs(selection, build_prompt(self.tokenizer, chat, options), options, progress)

    def _choose(self, selection: Selection, prompt: Prompt, options: Sequence[str]) -> Iterator[str]:
        with torch.no_grad():
            yield options[int(self._option_probs(selection, prompt, options).argmax())].strip()

    def _option_probs(
        self,
        selection: Selection,
        prompt: Prompt,
        options: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        real = [number for number, option in enumerate(options) if option.strip()]
        look = None if progress is None else partial(progress, 0, 1)
        if self.config.option_scoring == "letter":
            scores = self._letter_logits(selection, prompt, real, look)
        else:
            scores = self.mean_log_likelihoods(selection, prompt, [options[number] for number in real], look)
        probabilities = torch.zeros(len(options))
        probabilities[real] = scores.softmax(0).cpu()
        return probabilities

    def _letter_logits(
        self, selection: Selection, prompt: Prompt, letters: list[int], look: Callable[[], object] | None
    ) -> Tensor:
        """Logits (n,) float32 of the letters (0 = A) as the next token. CPU."""
        first = [text_ids(self.tokenizer, ascii_uppercase[number])[-1] for number in letters]
        embeds, positions, _ = self.inputs(selection.tokens, selection.indices, selection.num_patches, prompt, 1)
        layout = evidence.lay_out(_embedding(self.llm), embeds, positions, [])
        all_in_sight = torch.zeros(1, len(selection.indices)).bool()
        return evidence.score_answers(_base(self.llm), layout, prompt.at, all_in_sight, [], first, look)[0]

    def mean_log_likelihoods(
        self, selection: Selection, prompt: Prompt, answers: list[str], look: Callable[[], object] | None = None
    ) -> Tensor:
        """Mean log-likelihood per token (n,) float32 of each answer after the prompt; all in one sequence. CPU."""
        end = end_of_turn(self.tokenizer)
        rows = [[*text_ids(self.tokenizer, answer), end] for answer in answers]
        lengths = torch.tensor([len(row) for row in rows])
        embeds, positions, _ = self.inputs(
            selection.tokens, selection.indices, selection.num_patches, prompt, int(lengths.max())
        )
        layout = evidence.lay_out(_embedding(self.llm), embeds, positions, rows)
        all_in_sight = torch.zeros(1, len(selection.indices)).bool()
        return evidence.score_answers(_base(self.llm), layout, prompt.at, all_in_sight, rows, [], look)[0] / lengths

    # ---- evidence

    @torch.no_grad()
    def leave_one_out(
        self,
        selection: Selection,
        messages: Sequence[Mapping[str, str]],
        answer: str,
        options: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        groups: Sequence[Sequence[int]] = (),
    ) -> Evidence:
        """How much less likely `answer` gets when one of the K patches is left out, for each of them, and for all K.

        messages, options: as they were given to `answer`. progress: called with (passes done, passes in all).
        groups: places in selection.indices that are left out together, too, such as model/foci.py finds.
        Where the answer is one of the options (its text, its letter, or both), its log-odds among the options are
        compared, scored as option_probs does. Otherwise it is the answer's total log-likelihood: the total says how
        many times less likely the whole answer gets; the mean per token would let the words that any slide shares
        water that down. A patch is left out by closing it to the attention of all other tokens, so that every position
        id stays. K + 2 sequences and one a group, in passes of a bounded number of tokens: with K = 32 and the embedded
        LLM 4 to 6 s on one core for a short answer. Raises ValueError for an answer without a word.
        """
        if not answer.strip():
            raise ValueError("there is no answer to find evidence for. Ask the question first.")
        offered = [(letter, option.strip()) for letter, option in zip(ascii_uppercase, options or ()) if option.strip()]
        chosen = evidence.find_option(answer, offered) if len(offered) > 1 else None
        prompt = build_prompt(self.tokenizer, messages, options)
        if chosen is None:
            rows, letters = [text_ids(self.tokenizer, answer.strip())], []
        elif self.config.option_scoring == "letter":
            rows, letters = [], [text_ids(self.tokenizer, letter)[-1] for letter, _ in offered]
        else:
            end = end_of_turn(self.tokenizer)
            rows, letters = [[*text_ids(self.tokenizer, option), end] for _, option in offered], []
        longest = max([1, *map(len, rows)])
        embeds, positions, _ = self.inputs(selection.tokens, selection.indices, selection.num_patches, prompt, longest)
        layout = evidence.lay_out(_embedding(self.llm), embeds, positions, rows)
        k = len(selection.indices)
        together = torch.zeros(len(groups), k)
        for row, places in zip(together, groups):
            row[list(places)] = 1
        left_out = torch.cat([torch.ones(1, k), torch.eye(k), together]).bool()  # (1 + K + G, K)
        likelihoods = evidence.score_without_each(
            _base(self.llm), layout, prompt.at, left_out, rows, letters, progress
        )  # (K + 2 + G, 1 or number of options)
        if chosen is None:
            values = likelihoods[:, 0]
        else:
            others = [number for number in range(len(offered)) if number != chosen]
            mean = likelihoods / torch.tensor([len(row) for row in rows] or [1])
            values = mean[:, chosen] - mean[:, others].logsumexp(1)
        rounding = 0.0 if embeds.dtype == torch.float32 or chosen is not None else evidence.NOISE * math.sqrt(longest)
        return Evidence(
            effects=values[0] - values[2 : k + 2],
            group_effects=values[0] - values[k + 2 :],
            without_any=float(values[0] - values[1]),
            baseline=float(values[0]),
            score_ranks=selection.ranks,
            option=chosen is not None,
            limit=max(evidence.MATTERS, rounding),
        )

    # ---- files

    def merge(self) -> "SparseWSI":
        """Add the adapter to the LLM's weights, for inference alone; returns the model, which saves as it did.

        Saves the adapter's products at every token. Sums are rounded to the LLM's dtype: in float32 the logits are the
        same, in bfloat16 an option's probability may differ in the second digit. Does nothing without an adapter.
        """
        if isinstance(self.llm, PeftModel) and not self.merged:
            self.llm.merge_adapter()
            self.merged = True
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """The weights of slide_encoder, scorer and projector by name: what model.safetensors holds, without the LLM."""
        return {name: value for name, value in self.state_dict().items() if name.split(".")[0] in PARTS}

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype = torch.float32, card: str | None = None
    ) -> None:
        """Write all of artefact.FILES that the model has, then rename the folder into place.

        dtype: of the stored weights, adapter included. card: text of README.md; None keeps the one that is there, or
        writes a minimal one. Raises ValueError if the folder holds anything that is not a model's, so that nothing else
        is ever replaced.
        """
        artefact.save(folder, self.config, self.trained_state(), self.llm, self.trained_on, self.limits, dtype, card)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        llm: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
        merge: bool | None = None,
        **llm_kwargs: Any,
    ) -> "SparseWSI":
        """Load what save_pretrained wrote, from a folder or from the Hugging Face Hub, for inference.

        llm: a base LLM that is loaded already, with its tokenizer; an adapter is put into it, so that no other model
        can share it. merge: add the adapter to the LLM's weights (see `merge`); None: on a GPU and in float32, unless
        the LLM was passed or is in 4 bits. llm_kwargs (dtype, load_in_4bit) go to load_llm. Raises ValueError that
        names every missing or unexpected weight.
        """
        folder = artefact.find(folder_or_repo, revision)
        config = artefact.load_config(folder)
        if llm is not None and artefact.has_adapter(llm[0]):
            raise ValueError("the LLM that was passed already holds another model's adapter. Load it anew.")
        base, tokenizer = llm or load_llm(config.llm, config.llm_revision, device, **llm_kwargs)
        model = cls(config, base, tokenizer)
        state = artefact.load_weights(folder, model.trained_state())
        model.load_state_dict(state, strict=False)  # the LLM's weights are the only ones missing: checked above
        model.llm = artefact.load_adapter(folder, base, config.llm)
        model.trained_on, model.limits = novelty.load(folder), limits.load(folder)
        model.name, model.weights_sha256 = name_model(folder_or_repo), artefact.weights_digest(folder)
        whole = llm is None and not getattr(base, "is_quantized", False)
        fitting = model.device.type == "cuda" or base.dtype == torch.float32  # not yet run on a GPU
        if (whole and fitting) if merge is None else merge:
            model.merge()
        return model.eval()

    def push_to_hub(
        self, repo_id: str, *, card: str | None = None, private: bool = True, token: str | None = None
    ) -> str:
        """Upload to the Hugging Face Hub as fp16; returns the commit's address. A new repository is private.

        card: text of README.md; None keeps the one that is there, or writes a minimal one.
        """
        if Path(self.config.llm).is_dir():
            raise ValueError(
                "the model's LLM is a folder of this machine, which nobody else has. Upload the LLM, then name it in "
                "config.llm as owner/name."
            )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, dtype=torch.float16, card=card)
            return artefact.upload(folder, repo_id, private, token, keep_card=card is None)


def _tell_each(
    parts: Sequence[Tensor], total: int, progress: Callable[[int, int], None] | None, done: int = 0
) -> Iterator[Tensor]:
    """The parts; progress(done, total) is called between them."""
    for number, part in enumerate(parts, done):
        if progress is not None and number:
            progress(number, total)
        yield part


def _base(llm: PreTrainedModel | PeftModel) -> nn.Module:
    """The LLM itself, with LoRA in its layers where it has an adapter."""
    return llm.get_base_model() if isinstance(llm, PeftModel) else llm


def _embedding(llm: PreTrainedModel | PeftModel) -> nn.Embedding:
    found = llm.get_input_embeddings()
    assert isinstance(found, nn.Embedding)
    return found
