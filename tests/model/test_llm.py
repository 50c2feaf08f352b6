"""Loading a base LLM: from a folder, from the hub, and the embedded default."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsewsi.model.embedded import EMBEDDED, embedded_folder
from sparsewsi.model.llm import default_dtype, load_llm


def test_a_folder_gives_a_frozen_llm_that_decodes_greedily(tiny_llm: Path) -> None:
    llm, tokenizer = load_llm(str(tiny_llm), device="cpu")
    assert llm.dtype == default_dtype(torch.device("cpu"))
    assert not llm.training
    assert not any(parameter.requires_grad for parameter in llm.parameters())
    assert llm.generation_config.do_sample in (None, False)
    assert llm.generation_config.repetition_penalty in (None, 1.0)
    assert tokenizer.convert_ids_to_tokens(llm.generation_config.eos_token_id) == "<|im_end|>"
    assert load_llm(str(tiny_llm), device="cpu", dtype=torch.float32)[0].dtype == torch.float32


def test_sampling_defaults_of_a_vendor_are_dropped_and_its_stop_tokens_kept(tiny_llm: Path, tmp_path: Path) -> None:
    llm, tokenizer = load_llm(str(tiny_llm), device="cpu")
    llm.generation_config.update(do_sample=True, repetition_penalty=1.1, temperature=0.7, eos_token_id=[2, 0])
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = load_llm(str(tmp_path), device="cpu")[0].generation_config
    assert given.eos_token_id == [2, 0]
    assert given.do_sample in (None, False)
    assert given.repetition_penalty in (None, 1.0)
    assert given.temperature in (None, 1.0)


def test_a_folder_that_is_not_there_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist\. Pass a folder"):
        load_llm(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="does not exist"):
        load_llm("./nowhere")


def test_a_folder_without_an_llm_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no LLM \(config\.json is missing\)"):
        load_llm(str(tmp_path))


def test_offline_a_hub_model_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"the LLM sparsewsi/no-such-llm is neither on this machine .* hf download"):
        load_llm("sparsewsi/no-such-llm")


def test_an_llm_without_weights_has_its_buffers(tiny_llm: Path) -> None:
    shape, _ = load_llm(str(tiny_llm), weights=False)
    whole, _ = load_llm(str(tiny_llm))
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert [*dict(shape.named_parameters())] == [*dict(whole.named_parameters())]
    buffers = dict(whole.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in shape.named_buffers())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_four_bit_loading_says_what_it_needs(tiny_llm: Path) -> None:
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and the package bitsandbytes"):
        load_llm(str(tiny_llm), load_in_4bit=True)


def test_the_embedded_llm_loads_and_answers() -> None:
    try:
        embedded_folder()
    except RuntimeError as error:
        pytest.skip(str(error))
    llm, tokenizer = load_llm(EMBEDDED, device="cpu")
    assert llm.config.name_or_path == EMBEDDED
    assert llm.config.max_position_embeddings == 8192
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt")
    out = llm.generate(**ids, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


# ---- weights that are not this model's


def keep(names: str) -> Callable[[dict], dict]:
    return lambda weights: {key: value for key, value in weights.items() if names not in key}


def prefix(text: str) -> Callable[[dict], dict]:
    return lambda weights: {text + key: value for key, value in weights.items()}


CHANGED = {
    "an MLP is missing": (keep("layers.1.mlp"), "are missing"),
    "the embedding is missing": (keep("embed_tokens"), "are missing"),
    "a layer is missing": (keep("layers.0."), "are missing"),
    "PEFT's prefix": (prefix("base_model.model."), "prefix"),
    "DataParallel's prefix": (prefix("module."), "prefix"),
    "torch.compile's prefix": (prefix("_orig_mod."), "prefix"),
    "one weight more": (lambda weights: {**weights, "model.layers.7.x": torch.zeros(3)}, "not this model's"),
    "another width": (lambda weights: {**weights, "model.norm.weight": torch.zeros(65)}, "cannot be read|shape"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_weights_that_do_not_fit_are_refused_and_never_replaced_by_chance(tiny_llm, tmp_path, change) -> None:
    folder = Path(shutil.copytree(tiny_llm, tmp_path / "llm"))
    weights = load_file(folder / "model.safetensors")
    how, words = CHANGED[change]
    save_file(how(weights), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        load_llm(str(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", None])
def test_a_file_that_is_a_pointer_empty_or_cut_is_named(tiny_llm, tmp_path, file, content) -> None:
    folder = Path(shutil.copytree(tiny_llm, tmp_path / "llm"))
    path = folder / file
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(ValueError, match="LLM"):
        load_llm(str(folder))
