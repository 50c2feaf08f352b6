"""Loading a base LLM: from a folder, from the hub, and the embedded default."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def change_config(**facts: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return change


def change_weights(how: Callable[[dict], dict]) -> Callable[[Path], object]:
    path = "model.safetensors"
    return lambda folder: save_file(how(load_file(folder / path)), folder / path, metadata={"format": "pt"})


def shard(folder: Path, keep: bool = False, index: str | None = None) -> None:
    weights, places = load_file(folder / "model.safetensors"), {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {}, "weight_map": places}) if index is None else index
    (folder / "model.safetensors.index.json").write_text(text)
    if not keep:
        (folder / "model.safetensors").unlink()


def break_shard(folder: Path, content: bytes | None) -> None:
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    path.unlink() if content is None else path.write_bytes(content)


def add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    known = json.loads(path.read_text())
    known["added_tokens"].append(known["added_tokens"][0] | {"id": 5000, "content": "<more>"})
    path.write_text(json.dumps(known))


OTHER_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda folder: break_shard(folder, None), "00002-of-00002"),
    "a shard is a pointer": (lambda folder: break_shard(folder, b"version https://git-lfs.github.com/spec/v1"), "LFS"),
    "a shard is cut short": (lambda folder: break_shard(folder, bytes(60)), "cannot be read"),
    "whole and in shards": (lambda folder: shard(folder, keep=True), "may differ"),
    "an index of nothing": (lambda folder: shard(folder, index='{"metadata": {}, "weight_map": {}}'), "cannot be read"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
    "float8": (change_weights(lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}), "8 bits"),
    "int8": (change_weights(lambda w: {k: (100 * v).to(torch.int8) for k, v in w.items()}), "8 bits"),
    "NaN": (change_weights(lambda w: w | {"model.norm.weight": w["model.norm.weight"] * torch.nan}), "NaN"),
    "infinity": (change_weights(lambda w: w | {"model.norm.weight": w["model.norm.weight"] + torch.inf}), "infinity"),
    "quantised": (change_config(quantization_config={"quant_method": "gptq", "bits": 4}), "package that is not"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "cannot be read"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "a tokenizer with more tokens": (add_token, "another model"),
    "pickles alone": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickles"),
}


@pytest.mark.parametrize("change", OTHER_FOLDERS)
def test_a_folder_that_is_not_one_whole_llm_is_a_sentence(tiny_llm, tmp_path, change) -> None:
    folder = Path(shutil.copytree(tiny_llm, tmp_path / "llm"))
    how, words = OTHER_FOLDERS[change]
    how(folder)
    with pytest.raises(ValueError, match=words):
        load_llm(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_shards_and_mixed_types_give_the_same_llm(tiny_llm, tmp_path, dtype) -> None:
    folder = Path(shutil.copytree(tiny_llm, tmp_path / "llm"))
    change_weights(
        lambda w: {k: v.to(dtype or (torch.float16 if len(k) % 2 else torch.bfloat16)) for k, v in w.items()}
    )(folder)
    shard(folder)
    wanted = load_llm(str(tiny_llm), dtype=torch.float32)[0].state_dict()
    for name, value in load_llm(str(folder), dtype=torch.float32)[0].state_dict().items():
        torch.testing.assert_close(value, wanted[name], atol=1e-2, rtol=1e-2)
