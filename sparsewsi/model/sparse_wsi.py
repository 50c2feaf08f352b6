"""SparseWSI: select the patches that matter, answer from them.

N patches, K kept, D feature dim, D_v width of a visual token, T text tokens, L = K + T, H the LLM's width, V
vocabulary.
"""

import dataclasses
import json
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from sparsewsi.bags.bag import Bag, check_bag, replacing
from sparsewsi.model import novelty
from sparsewsi.model.config import SparseWSIConfig, Unavailable
from sparsewsi.model.llm import load_llm
from sparsewsi.model.prompt import Prompt, build_prompt, end_of_turn, text_ids, visual_positions
from sparsewsi.model.selector import ROWS, SELECTORS, Scorer, hard_topk
from sparsewsi.model.slide_encoder import SlideEncoder

PARTS = ("slide_encoder", "scorer", "projector")  # what model.safetensors holds
FILES = ("config.json", "model.safetensors", "adapter", "novelty.safetensors", "README.md", ".gitattributes")
MAX_NEW_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Selection:
    """The patches kept of one slide. CPU tensors."""

    indices: Tensor  # (K,) int64, ascending = raster order
    scores: Tensor  # (N,) float32, the learned scores whatever the selector
    tokens: Tensor  # (K, D_v) float32
    num_patches: int  # N


class SparseWSI(nn.Module):
    """Slide encoder, scorer and projector (float32) in front of a causal LLM (in its own dtype)."""

    llm: PreTrainedModel | PeftModel
    trained_on: novelty.Summary | None = None  # what its training features looked like, if the artefact says so

    def __init__(self, config: SparseWSIConfig, llm: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.llm, self.tokenizer = config, llm, tokenizer
        embeddings = _embedding(llm).weight.detach()  # (V, H)
        width = embeddings.shape[1]
        self.slide_encoder = SlideEncoder(
            config.feature_dim, config.dim, config.slide_encoder_layers, config.slide_encoder, config.heads
        )
        self.scorer = Scorer(config.dim, config.scorer_layers, config.scorer_dim, config.heads, config.scorer_attention)
        self.projector = nn.Sequential(
            nn.Linear(config.dim, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        # Some 4,096 rows are enough for a standard deviation, and save a float32 copy of a 150,000-word vocabulary.
        self.text_std = float(embeddings[:: max(1, len(embeddings) // 4096)].float().std())
        for part in (self.slide_encoder, self.scorer, self.projector):
            part.to(device=embeddings.device, dtype=torch.float32)

    @property
    def device(self) -> torch.device:
        return _embedding(self.llm).weight.device

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
        """(N, D_v) -> (N,) float32; in parts where no patch sees another."""
        parts = x.split(ROWS) if self.scorer.attention == "local" and len(x) else (x,)
        return torch.cat([self.scorer(part) for part in parts])

    @torch.no_grad()
    def select(self, bag: Bag, k: int | None = None, selector: str = "learned", seed: int = 0) -> Selection:
        """The k patches (default: config.num_tokens) that the learned scorer, or another selector, keeps.

        selector: "learned" or a key of SELECTORS; the seed matters to those that draw.
        Raises ValueError for a bag without patches, of another encoder or dimension, and for an unknown selector.
        """
        check_bag(bag, self.config.encoder, self.config.feature_dim)
        n = len(bag.features)
        if n == 0:
            raise ValueError(f"{bag.slide} has no patch to select from (no tissue was found). Choose another slide.")
        if selector != "learned" and selector not in SELECTORS:
            raise ValueError(f"the selector is {selector!r}; choose one of learned, {', '.join(SELECTORS)}.")
        k = self.config.num_tokens if k is None else k
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        x = None
        if self.slide_encoder.pointwise and self.scorer.attention == "local":  # memory must not grow with N
            scores = torch.cat([self.score(self.encode(part)).cpu() for part in bag.features.split(ROWS)])
        else:
            x = self.encode(bag.features)
            scores = self.score(x).cpu()
        if selector == "learned":
            indices = hard_topk(scores, k)
        else:
            indices = SELECTORS[selector](bag.features, bag.coords, k, seed)
        tokens = self.encode(bag.features[indices]) if x is None else x[indices.to(x.device)]
        return Selection(indices, scores, tokens.cpu(), n)

    # ---- what the LLM sees

    def project(self, tokens: Tensor) -> Tensor:
        """(..., K, D_v) -> (..., K, H) float32 with the spread of the LLM's text embeddings."""
        return self.projector(tokens.to(self.device, torch.float32)) * self.text_std

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
            indices, num_patches, prompt.at, after + reserve, self.config.position, self.max_position
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

        messages: the whole chat so far, the user's question last; its options, if any, are listed under it. Each call
        costs K visual tokens + the text. generate_kwargs go to transformers' generate.
        Closing the iterator stops the generation within about one token. Bad messages raise ValueError here, an error
        while generating is raised by the iterator.
        """
        prompt = build_prompt(self.tokenizer, messages, options)
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
        return self._stream(settings)

    def _stop_tokens(self) -> list[int]:
        given = self.llm.generation_config.eos_token_id  # type: ignore[union-attr]
        given = [given] if isinstance(given, int) else list(given or [])
        return sorted({end_of_turn(self.tokenizer), *given})

    def _stream(self, settings: dict[str, Any]) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        criteria = StoppingCriteriaList([*settings.pop("stopping_criteria", []), _StopEvent(stop)])
        errors: list[BaseException] = []

        def generate() -> None:
            try:
                self.llm.generate(**settings, streamer=streamer, stopping_criteria=criteria)  # type: ignore[operator]
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

    @torch.no_grad()
    def option_probs(self, selection: Selection, question: str, options: Sequence[str]) -> Tensor:
        """Probability of each option as the answer, (n_options,) float32 on the CPU, sums to 1; an empty option gets 0.

        config.option_scoring: "text": softmax over the mean log-likelihood per token of the option's text, with the end
        of the turn, as the assistant's answer; "letter": softmax over the logits of the options' letters.
        """
        real = [number for number, option in enumerate(options) if option.strip()]
        if not real:
            raise ValueError(f"option_probs needs at least one option that is not empty, got {list(options)!r}.")
        prompt = build_prompt(self.tokenizer, [{"role": "user", "content": question}], options)
        if self.config.option_scoring == "letter":
            scores = self._letter_logits(selection, prompt, real)
        else:
            scores = self._mean_log_likelihoods(selection, prompt, [options[number] for number in real])
        probabilities = torch.zeros(len(options))
        probabilities[real] = scores.softmax(0).cpu()
        return probabilities

    def _letter_logits(self, selection: Selection, prompt: Prompt, letters: list[int]) -> Tensor:
        """Logits (n,) float32 of the letters (0 = A) as the next token."""
        embeds, positions, mask = self.inputs(selection.tokens, selection.indices, selection.num_patches, prompt, 1)
        output = self.llm(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False, logits_to_keep=1
        )
        first = [text_ids(self.tokenizer, ascii_uppercase[number])[-1] for number in letters]
        return output.logits[0, -1, first].float()

    def _mean_log_likelihoods(self, selection: Selection, prompt: Prompt, answers: list[str]) -> Tensor:
        """Mean log-likelihood per token (n,) float32 of each answer after the prompt; one right-padded batch."""
        end = end_of_turn(self.tokenizer)
        rows = [[*text_ids(self.tokenizer, answer), end] for answer in answers]
        longest = max(map(len, rows))
        targets = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=self.device)  # (n, A)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        real = torch.arange(longest, device=self.device) < lengths[:, None]  # (n, A)
        embeds, positions, mask = self.inputs(
            selection.tokens, selection.indices, selection.num_patches, prompt, longest
        )
        n, given = len(rows), embeds.shape[1]
        text = _embedding(self.llm)(targets)  # (n, A, H)
        going_on = positions[:, -1:] + 1 + torch.arange(longest, device=self.device)  # (1, A)
        logits = self.llm(
            inputs_embeds=torch.cat([embeds.expand(n, -1, -1), text], dim=1),
            position_ids=torch.cat([positions, going_on], dim=1).expand(n, -1),
            attention_mask=torch.cat([mask.expand(n, -1), real.long()], dim=1),
            use_cache=False,
            logits_to_keep=torch.arange(given - 1, given + longest - 1, device=self.device),
        ).logits.float()  # (n, A, V)
        likelihoods = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return (likelihoods * real).sum(-1) / lengths

    # ---- files

    def trained_state(self) -> dict[str, Tensor]:
        """The weights of slide_encoder, scorer and projector by name: what model.safetensors holds, without the LLM."""
        return {name: value for name, value in self.state_dict().items() if name.split(".")[0] in PARTS}

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype = torch.float32, card: str | None = None
    ) -> None:
        """Write all of FILES that the model has, then rename the folder into place.

        dtype: of the stored weights, adapter included. card: text of README.md; None keeps the one that is there, or
        writes a minimal one. Raises ValueError if the folder holds anything that is not a model's, so that nothing else
        is ever replaced.
        """
        folder = Path(folder)
        foreign = sorted({entry.name for entry in folder.iterdir()} - set(FILES)) if folder.is_dir() else []
        if foreign or folder.is_file():
            raise ValueError(
                f"{folder} is not a model's folder (it holds {', '.join(foreign) or 'a file'}). Name another."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        tag = uuid.uuid4().hex[:8]
        new, old = (folder.with_name(f".{folder.name}.{tag}.{end}") for end in ("part", "old"))
        try:
            dataclasses.replace(self.config, adapter=isinstance(self.llm, PeftModel)).save(new)
            state = {name: value.to("cpu", dtype).contiguous() for name, value in self.trained_state().items()}
            _save_tensors(state, new / "model.safetensors")
            if self.trained_on is not None:
                novelty.save(self.trained_on, new)
            if isinstance(self.llm, PeftModel):
                _save_adapter(self.llm, new / "adapter", self.config.llm, dtype)
            for name in ("README.md", ".gitattributes"):
                if (folder / name).is_file():
                    shutil.copy2(folder / name, new / name)
            if card is not None or not (new / "README.md").is_file():
                (new / "README.md").write_text(card or _minimal_card(self.config), encoding="utf-8")
            if folder.is_dir():
                folder.rename(old)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if old.is_dir() and not folder.exists():  # the second rename failed
                old.rename(folder)
            shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        llm: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
        **llm_kwargs: Any,
    ) -> "SparseWSI":
        """Load what save_pretrained wrote, from a folder or from the Hugging Face Hub, for inference.

        llm: a base LLM that is loaded already, with its tokenizer; an adapter is put into it, so that no other model
        can share it. llm_kwargs (dtype, load_in_4bit) go to load_llm. Raises ValueError that names every missing or
        unexpected weight.
        """
        folder = _local_folder(folder_or_repo, revision)
        config = SparseWSIConfig.load(folder)
        state = _read_weights(folder / "model.safetensors")
        if config.adapter is not None and config.adapter != (folder / "adapter").is_dir():
            raise ValueError(
                f"{folder} was saved {'with' if config.adapter else 'without'} an adapter of the LLM, but now it holds "
                f"{'none' if config.adapter else 'one'}. Copy or download the whole folder again."
            )
        if llm is not None and any("lora_" in name for name, _ in llm[0].named_parameters()):
            raise ValueError("the LLM that was passed already holds another model's adapter. Load it anew.")
        base, tokenizer = llm or load_llm(config.llm, config.llm_revision, device, **llm_kwargs)
        model = cls(config, base, tokenizer)
        _check_keys(set(state), set(model.trained_state()), folder / "model.safetensors")
        for name, value in model.trained_state().items():
            if not state[name].isfinite().all():
                raise ValueError(f"{name} in {folder / 'model.safetensors'} holds NaN or infinity. Train it again.")
            if state[name].shape != value.shape:
                raise ValueError(
                    f"{name} is {tuple(state[name].shape)} in {folder / 'model.safetensors'}, but config.json asks for "
                    f"{tuple(value.shape)}. The two files do not belong together."
                )
        model.load_state_dict(state, strict=False)  # the LLM's weights are the only ones missing: checked above
        if (folder / "adapter").is_dir():
            model.llm = _load_adapter(base, folder / "adapter")
        model.trained_on = novelty.load(folder)
        return model.eval()

    def push_to_hub(
        self, repo_id: str, *, card: str | None = None, private: bool = True, token: str | None = None
    ) -> str:
        """Upload to the Hugging Face Hub as fp16; returns the commit's address. A new repository is private.

        card: text of README.md; None keeps the one that is there, or writes a minimal one.
        """
        import tempfile

        from huggingface_hub import HfApi

        if Path(self.config.llm).is_dir():
            raise ValueError(
                "the model's LLM is a folder of this machine, which nobody else has. Upload the LLM, then name it in "
                "config.llm as owner/name."
            )
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, dtype=torch.float16, card=card)
            if card is None and api.file_exists(repo_id, "README.md"):
                (folder / "README.md").unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Upload a SparseWSI model",
                delete_patterns="adapter/*",  # of a model before this one that had an adapter
            )
        return commit.commit_url


def _embedding(llm: PreTrainedModel | PeftModel) -> nn.Embedding:
    found = llm.get_input_embeddings()
    assert isinstance(found, nn.Embedding)
    return found


class _StopEvent(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def _local_folder(folder_or_repo: str | Path, revision: str | None) -> Path:
    folder = Path(folder_or_repo).expanduser()
    if folder.is_dir():
        return folder
    name = str(folder_or_repo)
    if isinstance(folder_or_repo, Path) or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ValueError(f"the model folder {name} does not exist. Pass a folder or a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model.safetensors", "adapter/*", "novelty.safetensors", "README.md"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"the model {name} is neither a folder nor could it be downloaded ({str(error).strip().splitlines()[0]}). "
            "Check the name and the network, or pass a folder."
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing. Pass the folder that save_pretrained wrote.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or download it again.") from error


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as partial:  # readable by whoever may read the rest, which safetensors' own files are not
        save_file(state, partial, metadata={"format": "pt"})


def _check_keys(found: set[str], wanted: set[str], source: Path) -> None:
    problems = [
        f"{word}: {', '.join(sorted(names))}"
        for word, names in (("missing", wanted - found), ("unexpected", found - wanted))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit its config.json; {'; '.join(problems)}.")


def _save_adapter(llm: PeftModel, folder: Path, base: str, dtype: torch.dtype) -> None:
    folder.mkdir()
    state = get_peft_model_state_dict(llm, save_embedding_layers=False)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    _save_tensors(state, folder / "adapter_model.safetensors")
    llm.active_peft_config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": base, "inference_mode": True}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _load_adapter(llm: PreTrainedModel, folder: Path) -> PeftModel:
    """The LLM with its adapter, strictly: PEFT itself only warns about weights that are missing."""
    wanted_config = PeftConfig.from_pretrained(str(folder))
    model = get_peft_model(llm, wanted_config)
    assert isinstance(model, PeftModel)
    state = _read_weights(folder / "adapter_model.safetensors")
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    _check_keys(set(state), wanted, folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, state)
    return model


def _minimal_card(config: SparseWSIConfig) -> str:
    demo = "This is a demonstration model. " if config.demo else ""
    return (
        "---\nlibrary_name: sparsewsi\ntags: [pathology, whole-slide-image]\n---\n\n# A SparseWSI model\n\n"
        f"{demo}{config.note}\n\nAnswers questions about a whole-slide image from {config.num_tokens} of its patches. "
        f"Patch encoder: {config.encoder} ({config.patch_size} px at {config.mpp} um/px). LLM: {config.llm}.\n\n"
        "Training data, licences and measured accuracy: not stated here yet; treat the model as untested.\n\n"
        "Research use only, not for diagnosis.\n"
    )
