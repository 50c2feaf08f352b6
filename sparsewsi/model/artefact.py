"""The files of a model: what save_pretrained writes, from_pretrained reads and push_to_hub uploads.

my-model/config.json  model.safetensors  adapter/  novelty.safetensors  limits.json  README.md
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparsewsi.files import replacing, replacing_folder
from sparsewsi.model import novelty
from sparsewsi.model.config import SparseWSIConfig, Unavailable
from sparsewsi.model.limits import Limits

FILES = (
    "config.json",
    "model.safetensors",
    "adapter",
    "novelty.safetensors",
    "limits.json",
    "README.md",
    ".gitattributes",
)


def save(
    folder: str | Path,
    config: SparseWSIConfig,
    state: Mapping[str, Tensor],
    llm: PreTrainedModel | PeftModel,
    trained_on: novelty.Summary | None,
    limits: Limits,
    dtype: torch.dtype,
    card: str | None,
) -> None:
    """SparseWSI.save_pretrained: write all of FILES that there are, then put the folder in place of the old one."""
    folder = Path(folder)
    foreign = sorted({entry.name for entry in folder.iterdir()} - set(FILES)) if folder.is_dir() else []
    if foreign or folder.is_file():
        raise ValueError(f"{folder} is not a model's folder (it holds {', '.join(foreign) or 'a file'}). Name another.")
    with replacing_folder(folder) as new:
        dataclasses.replace(config, adapter=isinstance(llm, PeftModel)).save(new)
        _save_tensors(state, new / "model.safetensors", dtype)
        if trained_on is not None:
            novelty.save(trained_on, new)
        if limits != Limits():
            limits.save(new)
        if isinstance(llm, PeftModel):
            _save_adapter(llm, new / "adapter", config.llm, dtype)
        for name in ("README.md", ".gitattributes"):
            if (folder / name).is_file():
                shutil.copy2(folder / name, new / name)
        if card is not None or not (new / "README.md").is_file():
            (new / "README.md").write_text(card or _minimal_card(config), encoding="utf-8")


def find(folder_or_repo: str | Path, revision: str | None) -> Path:
    """The folder itself, or that of a repository's snapshot, downloaded where it is not cached.

    Raises ValueError for a folder that is not there, Unavailable for a repository that cannot be had.
    """
    folder = Path(folder_or_repo).expanduser()
    if folder.is_dir():
        return folder
    name = str(folder_or_repo)
    if isinstance(folder_or_repo, Path) or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ValueError(f"the model folder {name} does not exist. Pass a folder or a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model.safetensors", "adapter/*", "novelty.safetensors", "limits.json", "README.md"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"the model {name} is neither a folder nor could it be downloaded ({str(error).strip().splitlines()[0]}). "
            "Check the name and the network, or pass a folder."
        ) from error


def load_config(folder: Path) -> SparseWSIConfig:
    """The model's configuration. Raises ValueError where the folder has lost its adapter, or has one too many."""
    config, has_adapter = SparseWSIConfig.load(folder), (folder / "adapter").is_dir()
    if config.adapter is not None and config.adapter != has_adapter:
        raise ValueError(
            f"{folder} was saved {'with' if config.adapter else 'without'} an adapter of the LLM, but now it holds "
            f"{'none' if config.adapter else 'one'}. Copy or download the whole folder again."
        )
    return config


def load_weights(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of model.safetensors. Raises ValueError unless they have the names and shapes of `wanted`."""
    path = folder / "model.safetensors"
    state = _read_tensors(path)
    _check_keys(set(state), set(wanted), path)
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)} in {path}, but config.json asks for {tuple(value.shape)}. "
                "The two files do not belong together."
            )
    return state


def load_adapter(folder: Path, llm: PreTrainedModel, base: str) -> PreTrainedModel | PeftModel:
    """The LLM, called `base`, with the folder's adapter, if there is one.

    Strict: PEFT itself only warns about missing weights, and takes an adapter that was trained on another base.
    """
    folder = folder / "adapter"
    if not folder.is_dir():
        return llm
    settings = PeftConfig.from_pretrained(str(folder))
    trained_on = settings.base_model_name_or_path
    if trained_on and Path(trained_on).name.lower() != Path(base).name.lower():
        raise ValueError(
            f"{folder} was trained on the LLM {trained_on}, but config.json names {base}. If they are one LLM, name it "
            "alike in both; else copy the whole folder again."
        )
    model = get_peft_model(llm, settings)
    assert isinstance(model, PeftModel)
    state = _read_tensors(folder / "adapter_model.safetensors")
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    _check_keys(set(state), wanted, folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, state)
    return model


def has_adapter(llm: PreTrainedModel | PeftModel) -> bool:
    """Whether LoRA weights are already in the LLM, loaded by PEFT or put in by hand."""
    return any("lora_" in name for name, _ in llm.named_parameters())


def upload(folder: Path, repo_id: str, private: bool, token: str | None, keep_card: bool) -> str:
    """Upload a model's folder to the Hugging Face Hub, into a repository that is made if it is missing.

    keep_card: do not replace a README.md that is there. Returns the commit's address.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Upload a SparseWSI model",
        ignore_patterns=["README.md"] if keep_card and api.file_exists(repo_id, "README.md") else None,
        delete_patterns="adapter/*",  # of a model before this one that had an adapter
    )
    return commit.commit_url


def weights_digest(folder: str | Path) -> str | None:
    """sha256 over the weight files of a model's folder (names and contents); None where there are none."""
    files = sorted(Path(folder).glob("**/*.safetensors")) if Path(folder).is_dir() else []
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest() if files else None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing. Pass the folder that save_pretrained wrote.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or download it again.") from error
    for name, value in state.items():
        if not value.is_floating_point() or value.element_size() < 2:
            raise ValueError(f"{name} in {path} is {value.dtype}, no weight of 16 bits or more. Save it again.")
        if not value.isfinite().all():
            raise ValueError(f"{name} in {path} holds NaN or infinity. Train it again.")
    return state


def _save_tensors(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    stored = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    with replacing(path) as partial:  # readable by whoever may read the rest, which safetensors' own files are not
        save_file(stored, partial, metadata={"format": "pt"})


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
    _save_tensors(state, folder / "adapter_model.safetensors", dtype)
    llm.active_peft_config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": base, "inference_mode": True}
    if isinstance(settings.get("target_modules"), list):  # a set's order is another one in each process
        settings["target_modules"].sort()
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _minimal_card(config: SparseWSIConfig) -> str:
    demo = "This is a demonstration model. " if config.demo else ""
    return (
        "---\nlibrary_name: sparsewsi\ntags: [pathology, whole-slide-image]\n---\n\n# A SparseWSI model\n\n"
        f"{demo}{config.note}\n\nAnswers questions about a whole-slide image from {config.num_tokens} of its patches. "
        f"Patch encoder: {config.encoder} ({config.patch_size} px at {config.mpp} um/px). LLM: {config.llm}.\n\n"
        "Training data, licences and measured accuracy: not stated here yet; treat the model as untested.\n\n"
        "Research use only, not for diagnosis.\n"
    )
