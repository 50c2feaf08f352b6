"""Fixtures shared by all tests: real data if they are there, tiny models, a browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides, tiles and questions that are not part of the project: `data` in the folder $SPARSEWSI_SHARED."""
    shared = os.environ.get("SPARSEWSI_SHARED")
    if not shared:
        pytest.skip("SPARSEWSI_SHARED names no folder of real slides")
    folder = Path(shared) / "data"
    assert folder.is_dir(), f"SPARSEWSI_SHARED is {shared}, which holds no folder data"
    return folder


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-features=LocalNetworkAccessChecks",  # a page of one local address in a frame of another's
]


@pytest.fixture(scope="module")  # not longer: Playwright keeps an event loop running in this thread
def browser() -> Iterator:
    """Headless Chromium under Playwright; skips where either is missing."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield opened
        opened.close()


TINY_CORPUS = [
    "Which tissue is this? It is liver, colon mucosa, fat or a lymph node.",
    "The slide shows a carcinoma with necrosis and mucin beside normal glands.",
    "A. yes\nB. no\nC. there is no tumour in this slide\nD. cannot be said",
]


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama (2 layers, hidden 64, grouped-query attention) with a small ChatML tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TINY_CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
                initializer_range=0.2,  # large, so that positions and context show in the logits
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    folder = tmp_path_factory.mktemp("tiny-llm")
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained artefact on the tiny LLM and the default patch encoder."""
    import torch

    from sparsewsi.model.config import SparseWSIConfig
    from sparsewsi.model.llm import load_llm
    from sparsewsi.model.sparse_wsi import SparseWSI

    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    llm, tokenizer = load_llm(str(tiny_llm))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SparseWSIConfig(llm=str(tiny_llm), dim=32, heads=4, num_tokens=6, demo=True, note="Untrained.")
        SparseWSI(config, llm, tokenizer).save_pretrained(folder)
    return folder
