"""ViTs: pooled as published, weights loaded strictly and never unpickled."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsewsi.bags import vit
from sparsewsi.bags.encoders import load_encoder


def test_attention_pool_is_softmax_attention():
    torch.manual_seed(0)
    pool = vit.AttentionPool(16, 24, heads=4).eval()
    torch.nn.init.normal_(pool.query)
    tokens = torch.randn(3, 7, 24)
    attention = pool.attn
    bias_q, bias_k, bias_v = attention.in_proj_bias.chunk(3)
    q = (pool.ln_q(pool.query) @ attention.q_proj_weight.T + bias_q).view(4, 4)  # heads, width
    context = pool.ln_k(tokens)
    k = (context @ attention.k_proj_weight.T + bias_k).view(3, 7, 4, 4)
    v = (context @ attention.v_proj_weight.T + bias_v).view(3, 7, 4, 4)
    weights = (torch.einsum("hd,bthd->bht", q, k) / 2).softmax(-1)  # 2 = sqrt(width)
    expected = attention.out_proj(torch.einsum("bht,bthd->bhd", weights, v).reshape(3, 16))
    assert torch.allclose(pool(tokens), expected, atol=1e-5)


def _save_tiny_model(kind: str, folder):
    import transformers

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(intermediate_size=64, **common))
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **common))
    else:
        model = transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1])
        )
    model.eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.mark.parametrize("kind", ["vit", "dinov2", "convnext"])
def test_a_transformers_model_gives_its_class_token_or_pooled_output(kind, tmp_path, patches, monkeypatch):
    monkeypatch.setattr(vit, "fast_dtype", lambda device: torch.float32)
    folder = tmp_path / kind
    model = _save_tiny_model(kind, folder)
    encoder = load_encoder(f"hf:{folder}", device="cpu")
    assert (encoder.name, encoder.dim, encoder.patch_size) == (f"hf:{kind}", 32, 32)
    small = patches[:, :32, :32]
    x = (torch.from_numpy(small).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.5
    with torch.inference_mode():
        output = model(pixel_values=x)
    expected = output.pooler_output if kind == "convnext" else output.last_hidden_state[:, 0]
    assert torch.allclose(encoder(small), expected.view(20, 32), atol=1e-5)
    assert torch.allclose(encoder(small[3:4]), encoder(small)[3:4], atol=1e-6)


def test_midnight_is_its_class_token_and_the_mean_of_its_patches(tmp_path, patches, monkeypatch):
    monkeypatch.setattr(vit, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(vit, "MIDNIGHT", str(tmp_path / "midnight"))
    model = _save_tiny_model("dinov2", tmp_path / "midnight")
    encoder = load_encoder("midnight", device="cpu")
    x = torch.from_numpy(patches[:2]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        tokens = model(pixel_values=x).last_hidden_state
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    assert (encoder.name, encoder.dim) == ("midnight", 64)
    assert torch.allclose(encoder(patches[:2]), expected, atol=1e-5)


def test_weights_of_other_towers_are_left_out_and_unknown_ones_are_not():
    spec = vit.HUB_VITS["keep"]
    stored = {name: torch.zeros(1) for name in ("visual.cls_token", "visual_head.0.bias", "text.x", "logit_scale", "?")}
    assert list(vit.rename_weights(stored, spec)) == ["trunk.cls_token", "head.0.bias", "?"]


def keep(part: str) -> Callable[[dict], dict]:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def prefix(text: str) -> Callable[[dict], dict]:
    return lambda weights: {text + key: value for key, value in weights.items()}


def add(key: str) -> Callable[[dict], dict]:
    return lambda weights: {**weights, key: torch.zeros(3)}


CHANGED = {
    "a layer is missing": (keep("layer.1."), "are missing"),
    "the class token is missing": (keep("cls_token"), "are missing"),
    "the patch embedding is missing": (keep("patch_embeddings"), "are missing"),
    "PEFT's prefix": (prefix("base_model.model."), "prefix"),
    "DataParallel's prefix": (prefix("module."), "prefix"),
    "torch.compile's prefix": (prefix("_orig_mod."), "prefix"),
    "a layer more than the config counts": (add("encoder.layer.7.output.dense.bias"), "not this model's"),
    "the same of a model for a task": (add("dinov2.encoder.layer.7.norm1.bias"), "not this model's"),
    "another embedding": (add("embeddings.register_tokens"), "not this model's"),
    "another width": (lambda weights: {**weights, "layernorm.weight": torch.zeros(33)}, "cannot be read|shape"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_weights_of_an_encoder_that_do_not_fit_are_refused_and_never_replaced_by_chance(change, tmp_path):
    _save_tiny_model("dinov2", tmp_path)
    how, words = CHANGED[change]
    weights = load_file(tmp_path / "model.safetensors")
    save_file(how(weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        load_encoder(f"hf:{tmp_path}", device="cpu")


@pytest.mark.parametrize("head", ["classifier.weight", "lm_head.bias", "decoder.mask_token"])
def test_a_head_for_another_task_may_be_there_besides(head, tmp_path):
    _save_tiny_model("dinov2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(add(head)(weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_encoder(f"hf:{tmp_path}", device="cpu").dim == 32


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", None])
def test_a_file_of_an_encoder_that_is_a_pointer_empty_or_cut_is_named(file, content, tmp_path):
    _save_tiny_model("vit", tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[:-40] if content is None else content)
    with pytest.raises(ValueError, match=rf"^(The|the weights|{file})"):
        load_encoder(f"hf:{tmp_path}", device="cpu")


def test_hub_weights_load_strictly(tmp_path, monkeypatch):
    """A small ViT in CONCH's layout, with its text tower beside it; one key less is refused."""
    pytest.importorskip("timm")
    spec = replace(
        vit.HUB_VITS["conch"],
        arguments={"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2},
        dim=16,
        size=32,
    )
    monkeypatch.setitem(vit.HUB_VITS, "conch", spec)
    stored = {f"visual.{key}": value for key, value in vit.build_vit("conch", spec).state_dict().items()}
    stored["text.token_embedding"] = torch.zeros(3)
    torch.save(stored, tmp_path / "weights.bin")
    monkeypatch.setattr(vit, "fetch_file", lambda *args: tmp_path / "weights.bin")
    encoder = load_encoder("conch", device="cpu")
    assert encoder(np.zeros((2, 40, 40, 3), np.uint8)).shape == (2, 16)
    del stored["visual.ln_contrast.weight"]
    torch.save(stored, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="do not fit"):
        load_encoder("conch", device="cpu")


def test_hub_weights_are_never_unpickled(tmp_path, monkeypatch):
    pytest.importorskip("timm")

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "weights.bin")
    monkeypatch.setattr(vit, "fetch_file", lambda *args: tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        load_encoder("uni", device="cpu")
    assert not (tmp_path / "exploded").exists()


def test_conch_v15s_pooler_is_attention_without_biases_under_its_own_names():
    """The published names; the forward pass is written out, head by head."""
    torch.manual_seed(0)
    pool = vit.PlainAttentionPool(16, 24, heads=4)
    torch.nn.init.normal_(pool.query)
    shapes = {name: tuple(value.shape) for name, value in pool.state_dict().items()}
    assert shapes == {
        "query": (1, 16), "ln_q.weight": (16,), "ln_q.bias": (16,), "ln_k.weight": (24,), "ln_k.bias": (24,),
        "to_q.weight": (16, 16), "to_kv.weight": (32, 24), "to_out.weight": (16, 16),
    }  # fmt: skip
    tokens = torch.randn(3, 7, 24)
    context = torch.nn.functional.layer_norm(tokens, (24,))
    query = pool.to_q.weight @ torch.nn.functional.layer_norm(pool.query[0], (16,))
    keys, values = context @ pool.to_kv.weight[:16].T, context @ pool.to_kv.weight[16:].T
    heads = []
    for start in range(0, 16, 4):
        part = slice(start, start + 4)
        weight = (keys[..., part] @ query[part] / 2).softmax(-1)  # sqrt(4)
        heads.append((weight[..., None] * values[..., part]).sum(1))
    torch.testing.assert_close(pool(tokens), torch.cat(heads, -1) @ pool.to_out.weight.T, rtol=1e-5, atol=1e-5)


def test_positions_of_a_small_picture_are_stretched_over_a_larger_one():
    x = torch.arange(14.0)
    square = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1).view(1, -1, 2)
    stored = torch.cat([torch.full((1, 1, 2), 9.0), square], 1)
    found = vit.stretch_positions(stored, 28 * 28 + 1)
    assert found.shape == (1, 785, 2)
    assert found[0, 0].tolist() == [9.0, 9.0]
    rows = found[0, 1:].view(28, 28, 2)
    torch.testing.assert_close(rows[..., 0], rows[..., 1].T)  # rows stay rows
    inner = rows[4:24, 0, 0]
    torch.testing.assert_close(inner, (torch.arange(4.0, 24.0) + 0.5) * 14 / 28.1 - 0.5, rtol=0, atol=0.1)
