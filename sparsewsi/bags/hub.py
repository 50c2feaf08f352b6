"""Weights of patch encoders from the Hugging Face hub: fetched once, and a sentence where they cannot be had."""

import urllib.error
import urllib.request
from pathlib import Path


def fetch_file(name: str, repo: str, file: str) -> Path:
    """A file of a hub repository, from the cache or fetched. Raises ValueError, in words, when it cannot be had."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return Path(cached)
    require_hub(name, repo)
    try:
        return Path(hf_hub_download(repo, file))
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
