"""Loading a base LLM: a hub id, a folder, or the embedded default."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsewsi.bags.hub import check_finite, check_folder, check_keys
from sparsewsi.model.config import Unavailable
from sparsewsi.model.embedded import EMBEDDED, embedded_folder, hide_progress_bars


def load_llm(
    name: str,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    load_in_4bit: bool = False,
    weights: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen causal LLM in evaluation mode and its tokenizer.

    name:     "smollm2-135m" (fetched once, checked, cached), a folder, or a hub id
    device:   default CUDA if there is one, else the CPU
    dtype:    default bfloat16 where the hardware computes in it, else float32 (float16 on older GPUs)
    load_in_4bit: weights in NF4, a quarter of the memory, by bitsandbytes (pip install "sparsewsi[4bit]")
    weights:  False for an LLM whose parameters are on the meta device: another process has them
    Raises ValueError for a folder that is not there, for weights that are not all of this model's and no others, and
    for 4-bit loading without CUDA or bitsandbytes; Unavailable with what to do for an LLM that is neither cached nor
    downloadable.
    """
    device = default_device() if device is None else torch.device(device)
    dtype = default_dtype(device) if dtype is None else dtype
    options: dict = {"dtype": dtype}
    if load_in_4bit:
        options |= _quantise(device, dtype)
    source = str(embedded_folder()) if name == EMBEDDED else _check_name(name)
    try:
        with hide_progress_bars():
            tokenizer = _load_tokenizer(source, revision, name)
            if weights:
                pair: Any = AutoModelForCausalLM.from_pretrained(
                    source, revision=revision, use_safetensors=True, output_loading_info=True, **options
                )
            else:
                pair = _shape(source, revision, dtype), {}
            llm, loaded = pair
    except _TokenizerError as error:
        raise ValueError(str(error)) from error.__cause__
    except ImportError as error:
        raise ValueError(f"the LLM {name} needs a package that is not installed: {_first_line(error)}.") from error
    except (SafetensorError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the weights of the LLM {name} cannot be read ({_first_line(error)}): they are damaged, cut short or of "
            "another model. Fetch them again."
        ) from error
    except OSError as error:
        if source != name or Path(source).is_dir():
            raise ValueError(f"the LLM folder {name} cannot be read ({_first_line(error)}).") from error
        raise Unavailable(
            f"the LLM {name} is neither on this machine nor could it be downloaded ({_first_line(error)}). With "
            f"a network, run: hf download {name} (a gated model needs hf auth login first). Or pass a folder with it."
        ) from error
    if weights:
        check_keys(f"the LLM {name}", loaded, quantised=load_in_4bit)
        check_finite(llm, f"the LLM {name}")
    rows = llm.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise ValueError(
            f"the tokenizer of the LLM {name} knows more tokens than its {rows:,} embeddings: it is of another model."
        )
    if weights and not load_in_4bit:
        llm.to(device)  # type: ignore[arg-type]
    # Greedy decoding is to mean the arg max: the vendor's sampling defaults and penalties go, its stop tokens stay.
    given = llm.generation_config
    llm.generation_config = GenerationConfig(
        bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if given.pad_token_id is None else given.pad_token_id,
    )
    llm.name_or_path = llm.config.name_or_path = name  # what an adapter records as its base; never a cache's path
    return llm.requires_grad_(False).eval(), tokenizer


class _TokenizerError(Exception):
    """A tokenizer that cannot be read, in words."""


def _load_tokenizer(source: str, revision: str | None, name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        raise _TokenizerError(
            f"the tokenizer of the LLM {name} cannot be read ({_first_line(error)}). Fetch it again."
        ) from error


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes in it; emulation on other CPUs is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    has_bf16 = device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # public names came after torch 2.6
    )
    return torch.bfloat16 if has_bf16 else torch.float32


def _check_name(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the folder {name} holds no LLM (config.json is missing). Pass one that does.")
        check_folder(folder, f"the LLM folder {name}")
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"the LLM folder {name} does not exist. Pass a folder, a hub id, or {EMBEDDED}.")
    return name


def _shape(source: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """An LLM without weights; its buffers (rotary frequencies) are computed."""
    from accelerate import init_empty_weights

    config = AutoConfig.from_pretrained(source, revision=revision)
    with init_empty_weights(include_buffers=False):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    llm.tie_weights()  # of the two names of one parameter each got a parameter of its own
    return llm


def _quantise(device: torch.device, dtype: torch.dtype) -> dict:
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"4-bit loading needs an NVIDIA GPU and the package bitsandbytes (here: device {device}, bitsandbytes "
            f"{'found' if importlib.util.find_spec('bitsandbytes') else 'missing'}). On a machine with such a GPU run "
            'pip install "sparsewsi[4bit]"; elsewhere load without it.'
        )
    from transformers import BitsAndBytesConfig

    # Not yet run on a GPU.
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
