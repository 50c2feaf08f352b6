"""Weights from the Hugging Face hub or a folder: a sentence where they cannot be had, or are not the model's own."""

import json
import struct
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def fetch_file(name: str, repo: str, *files: str) -> Path:
    """The first of these files that a hub repository has, from the cache or fetched.

    Raises ValueError, in words, when none can be had.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        cached = try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached)
    require_hub(name, repo)
    *others, last = files
    try:
        for file in others:
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(repo, file))
        return Path(hf_hub_download(repo, last))
    except Exception as error:
        raise explain_refusal(name, repo, error) from error


def require_hub(name: str, repo: str) -> None:
    """Raise ValueError when the hub cannot be reached; the hub's own client would retry for a minute first."""
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10):
                return
        except urllib.error.HTTPError:
            return  # it answered
        except OSError as error:
            reason = str(getattr(error, "reason", error))
    raise ValueError(
        f"The weights of {name} ({repo}) are not in the local cache and the Hugging Face hub cannot be reached "
        f"({reason}). Connect to the network once, or copy the Hugging Face cache from a machine that has them."
    )


def explain_refusal(name: str, repo: str, error: Exception) -> ValueError:
    """The sentence for a failed download."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = _causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ValueError(
            f"{name} is gated: accept its terms at https://huggingface.co/{repo} with your account, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return ValueError(
            f"There is no repository {repo} at the Hugging Face hub, or it is private: check the name, and run "
            "`hf auth login` if it is private."
        )
    return ValueError(f"The weights of {name} ({repo}) could not be fetched: {first_line(error)}")


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- what was loaded


def check_keys(what: str, loaded: dict[str, Any], quantised: bool = False) -> None:
    """Raise ValueError unless a model was loaded with exactly its own weights.

    loaded: transformers' report; what it does not find it fills with random numbers
    quantised: the file may hold constants of the quantisation besides
    """
    missing, extra = sorted(loaded["missing_keys"]), [] if quantised else sorted(loaded["unexpected_keys"])
    other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loaded.get("mismatched_keys", ()))
    if not (missing or extra or other):
        return
    parts = [(missing, "are missing"), (extra, "are not this model's"), (other, "have another shape")]
    said = ", ".join(f"{len(keys)} {words} (such as {keys[0]})" for keys, words in parts if keys)
    hint = ""
    if missing and any(key.endswith(tuple(missing)) for key in extra):
        hint = " They stand under a prefix that a wrapper left, such as base_model.: save the inner model instead."
    raise ValueError(f"the weights of {what} do not fit it: {said}.{hint} It is not used with random numbers instead.")


def check_folder(folder: Path, what: str) -> None:
    """Raise ValueError if a model's folder does not hold one model as it is: an adapter beside or in place of its
    weights, two sets of weights, 8-bit weights without what says how to read them, pointers of Git LFS, empty files.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{what} holds an adapter (LoRA): merge it into its base (PEFT's merge_and_unload) and save the whole."
        )
    if (folder / "model.safetensors").is_file() and (folder / "model.safetensors.index.json").is_file():
        raise ValueError(
            f"{what} holds model.safetensors and an index of shards, which may differ: remove what is not meant."
        )
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise ValueError(
            f"{what} holds its weights as pickles (.bin), which are never loaded: save it as safetensors "
            "(save_pretrained does)."
        )
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".bin", ".json", ".model"):
            with file.open("rb") as stream:
                head = stream.read(40)
            if not head or head.startswith(b"version https://git-lfs"):
                found = (
                    "a Git LFS pointer, not the file itself: run git lfs pull there" if head else "empty: copy it again"
                )
                raise ValueError(f"{file.name} of {what} is {found}.")
    with suppress(OSError, ValueError):
        if "quantization_config" in json.loads((folder / "config.json").read_bytes()):
            return
    for file in sorted(folder.glob("*.safetensors")):
        narrow = sorted(name for name, kind in _stored_types(file).items() if kind in ("I8", "U8") or kind[:2] == "F8")
        if narrow:
            raise ValueError(
                f"{what} holds weights of 8 bits ({narrow[0]}) and no quantization_config that says what they mean: "
                "save it in 16 bits."
            )


def _stored_types(file: Path) -> dict[str, str]:
    """The types of a safetensors file's tensors, by its header; nothing of a damaged one, which loading tells."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100 << 20)))
        return {name: facts["dtype"] for name, facts in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return {}


def check_finite(model: torch.nn.Module, what: str) -> None:
    """Raise ValueError for a weight that is NaN or infinite: what is computed with it means nothing."""
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.is_meta or not weight.numel():
            continue
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight.detach())):
            raise ValueError(f"{name} of {what} holds NaN or infinity. Fetch or convert it again.")
