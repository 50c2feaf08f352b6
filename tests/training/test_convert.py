"""Imported weights answer as the published model does, by a forward pass written here from the papers."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config

from sparsewsi.bags.bag import Bag
from sparsewsi.model.prompt import build_prompt
from sparsewsi.model.sparse_wsi import SparseWSI
from train.convert import main
from train.flags import run_command

DIM, HEADS, LAYERS = 512, 8, 2  # as published
WIDTH, FFN, QUERIES, KEYS, BLOCKS = 64, 96, 4, 2, 2  # of a small Qwen2.5
THETA, EPS = 1e6, 1e-6


def longnet_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of SlideChat's slide encoder (LongNet_2_layers_512_dim of its repository) and projector."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (f"LongNet_encoder.layers.{number}." for number in range(LAYERS)):
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{part}.weight": (DIM, DIM), f"{layer}self_attn.{part}.bias": (DIM,)}
        for part, width in (("self_attn.inner_attn_ln", DIM), ("self_attn_layer_norm", DIM), ("final_layer_norm", DIM)):
            shapes |= {f"{layer}{part}.weight": (width,), f"{layer}{part}.bias": (width,)}
        shapes |= {f"{layer}ffn.fc1.weight": (2 * DIM, DIM), f"{layer}ffn.fc1.bias": (2 * DIM,)}
        shapes |= {f"{layer}ffn.fc2.weight": (DIM, 2 * DIM), f"{layer}ffn.fc2.bias": (DIM,)}
        shapes |= {f"{layer}ffn.ffn_layernorm.{name}": (2 * DIM,) for name in ("weight", "bias")}
    shapes |= {f"LongNet_encoder.layer_norm.{name}": (DIM,) for name in ("weight", "bias")}
    shapes |= {"projector.model.0.weight": (WIDTH, DIM), "projector.model.0.bias": (WIDTH,)}
    return shapes | {"projector.model.2.weight": (WIDTH, WIDTH), "projector.model.2.bias": (WIDTH,)}


def qwen_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Qwen2.5 under SlideChat's prefix."""
    head = WIDTH // QUERIES
    shapes: dict[str, tuple[int, ...]] = {
        "llm.model.embed_tokens.weight": (vocabulary, WIDTH),
        "llm.model.norm.weight": (WIDTH,),
        "llm.lm_head.weight": (vocabulary, WIDTH),
    }
    for layer in (f"llm.model.layers.{number}." for number in range(BLOCKS)):
        for part, width in (("q_proj", QUERIES * head), ("k_proj", KEYS * head), ("v_proj", KEYS * head)):
            shapes |= {f"{layer}self_attn.{part}.weight": (width, WIDTH), f"{layer}self_attn.{part}.bias": (width,)}
        shapes[f"{layer}self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        shapes |= {f"{layer}mlp.{part}.weight": (FFN, WIDTH) for part in ("gate_proj", "up_proj")}
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, FFN)
        shapes |= {f"{layer}{part}.weight": (WIDTH,) for part in ("input_layernorm", "post_attention_layernorm")}
    return shapes


@pytest.fixture(scope="module")
def published(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """SlideChat's layout with random weights, the folder of the LLM that it was made from, and the weights."""
    folder = tmp_path_factory.mktemp("slidechat")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in (longnet_shapes() | qwen_shapes(len(tokenizer))).items():
        value = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = 1 + 0.1 * value if is_norm else value / math.sqrt(shape[-1])
    (folder / "weights").mkdir()
    save_file(weights, folder / "weights" / "model.safetensors")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=BLOCKS,
        num_attention_heads=QUERIES, num_key_value_heads=KEYS, max_position_embeddings=4096, rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder / "qwen")
    tokenizer.save_pretrained(folder / "qwen")
    return folder / "weights", folder / "qwen", weights


# ---- the published model, from its papers


def slide_tokens(w: dict[str, Tensor], features: Tensor) -> Tensor:
    """SlideChat's slide encoder and projector (N, 512) -> (N, WIDTH): N sequences of one patch, batch first."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = features[:, None]  # (N, 1, 512)
    for layer in (f"LongNet_encoder.layers.{number}." for number in range(LAYERS)):
        inside = norm(f"{layer}self_attn_layer_norm", x)
        query, key, value = (
            linear(f"{layer}self_attn.{part}_proj", inside).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in "qkv"
        )  # (N, heads, 1, 64)
        attention = (query @ key.transpose(-1, -2) / math.sqrt(DIM // HEADS)).softmax(-1) @ value
        attention = norm(f"{layer}self_attn.inner_attn_ln", attention.transpose(1, 2).flatten(-2))
        x = x + linear(f"{layer}self_attn.out_proj", attention)
        inside = F.gelu(linear(f"{layer}ffn.fc1", norm(f"{layer}final_layer_norm", x)))
        x = x + linear(f"{layer}ffn.fc2", norm(f"{layer}ffn.ffn_layernorm", inside))
    x = norm("LongNet_encoder.layer_norm", x)[:, 0]
    return linear("projector.model.2", F.gelu(linear("projector.model.0", x)))


def qwen_logits(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Qwen2.5 (2412.15115): embeddings (L, WIDTH) at positions 0, 1, ... -> logits (L, V)."""
    length, head = len(x), WIDTH // QUERIES
    angles = torch.arange(length)[:, None] * THETA ** (-torch.arange(0, head, 2) / head)  # (L, head / 2)
    cos, sin = (torch.cat([wave, wave], -1)[:, None] for wave in (angles.cos(), angles.sin()))

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w[name]

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., head // 2 :], x[..., : head // 2]], -1) * sin

    for layer in (f"llm.model.layers.{number}." for number in range(BLOCKS)):
        inside = norm(f"{layer}input_layernorm.weight", x)
        query, key, value = (
            (inside @ w[f"{layer}self_attn.{p}_proj.weight"].T + w[f"{layer}self_attn.{p}_proj.bias"]).unflatten(
                -1, (-1, head)
            )
            for p in "qkv"
        )
        query, key = turn(query), turn(key).repeat_interleave(QUERIES // KEYS, 1)
        value = value.repeat_interleave(QUERIES // KEYS, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(head)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", scores, value).flatten(1) @ w[f"{layer}self_attn.o_proj.weight"].T
        inside = norm(f"{layer}post_attention_layernorm.weight", x)
        gate, up = (inside @ w[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{layer}mlp.down_proj.weight"].T
    return norm("llm.model.norm.weight", x) @ w["llm.lm_head.weight"].T


# ---- what is tested


def command(patch: pytest.MonkeyPatch, *given: object) -> None:
    patch.setattr(sys, "argv", ["convert", *map(str, given)])
    run_command(main)


def test_slidechat_answers_as_published(published, tmp_path, monkeypatch, capsys):
    folder, qwen, weights = published
    command(monkeypatch, "slidechat", folder, "--llm", qwen, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert all(name in said for name in weights if ".q_proj." in name and name.startswith("LongNet"))
    model = SparseWSI.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    features = torch.randn(11, DIM, generator=torch.Generator().manual_seed(1)).half()
    bag = Bag(features, torch.arange(22).view(11, 2).int() * 224, 224, 0.5, "conch", "a slide")
    selection = model.select(bag)
    assert selection.indices.tolist() == list(range(11)), "all patches, as there are fewer than the cap"
    prompt = build_prompt(model.tokenizer, [{"role": "user", "content": "Which tissue is this?"}], ["fat", "liver"])
    with torch.no_grad():
        embeds, positions, mask = model.inputs(selection.tokens, selection.indices, 11, prompt)
        ours = model.llm(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).logits[0]
    words = weights["llm.model.embed_tokens.weight"][prompt.ids]
    visual = slide_tokens(weights, features.float())
    theirs = qwen_logits(weights, torch.cat([words[: prompt.at], visual, words[prompt.at :]]))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert ours.std() > 0.1
    text = model.tokenizer.decode(prompt.ids)
    assert text == "<|im_start|>user\n\nWhich tissue is this?\nA. fat\nB. liver<|im_end|>\n<|im_start|>assistant\n"
    assert len(model.select(bag, 4).indices) == len(model.select(bag, 4, "mmr").indices) == 4
    assert model.select(bag, 4).indices.tolist() == [0, 3, 6, 10]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("LongNet_encoder.layers.1.ffn.fc2.bias"), r"1 weights are missing \(such as .*1.ffn.fc2.bias"),
        (lambda w: w.pop("LongNet_encoder.layers.0.self_attn.q_proj.bias"), r"missing .*q_proj.bias"),
        (lambda w: w.update({"visual_encoder.x": torch.zeros(1)}), r"1 are unknown \(such as visual_encoder.x\)"),
        (lambda w: w.update({"projector.model.2.bias": torch.zeros(3)}), r"shape \(such as .*: \(3,\), not \(64,\)"),
        (
            lambda w: w.pop("llm.model.norm.weight"),
            r"SlideChat's LLM, .*, are not .*missing \(such as model.norm",
        ),
    ],
)
def test_weights_that_are_not_the_published_ones_are_a_sentence(
    change, match, published, tmp_path, monkeypatch, capsys
):
    _, qwen, weights = published
    changed = dict(weights)
    change(changed)
    (tmp_path / "weights").mkdir()
    torch.save({"state_dict": changed}, tmp_path / "weights" / "iter_1.pth")
    with pytest.raises(SystemExit):
        command(monkeypatch, "slidechat", tmp_path / "weights", "--llm", qwen, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert re.search(match, said), said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_holds_code_is_not_opened(tmp_path, monkeypatch, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "weights").mkdir()
    torch.save({"x": Bomb()}, tmp_path / "weights" / "iter_1.pth")
    with pytest.raises(SystemExit):
        command(monkeypatch, "slidechat", tmp_path / "weights", "--out", tmp_path / "out")
    assert "could run code" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


def test_loc_path_says_why_it_is_not_imported(tmp_path, monkeypatch, capsys):
    save_file({"cara.layers.0.gate": torch.zeros(1), "cara.layers.1.gate": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(SystemExit):
        command(monkeypatch, "loc-path", tmp_path)
    said = capsys.readouterr().err
    assert "cross-attention" in said
    assert "cara.layers.* (2)" in said


# ---- LLaVA 1.5


def llava_name(name: str) -> str:
    """The name that LLaVA's own code gives a weight of transformers' LLaVA."""
    for ours, theirs in {
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.language_model.": "model.",
    }.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@pytest.mark.parametrize("has_tower", [True, False])
def test_llava_reads_as_before_in_transformers_layout(has_tower, tiny_llava, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    processor = AutoProcessor.from_pretrained(tiny_llava)
    tower: CLIPVisionModel = model.model.vision_tower
    tower.save_pretrained(tmp_path / "clip")
    processor.image_processor.save_pretrained(tmp_path / "clip")
    state = {llava_name(name): value.contiguous() for name, value in model.state_dict().items()}
    state = {name: value.clone() for name, value in state.items() if has_tower or "vision_tower" not in name}
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, folder / "model.safetensors")
    text = model.config.text_config.to_dict() | {"model_type": "llava_llama", "mm_vision_select_layer": -1}
    (folder / "config.json").write_text(json.dumps(text))
    processor.tokenizer.save_pretrained(folder)
    command(monkeypatch, "llava", folder, "--vision", tmp_path / "clip", "--out", tmp_path / "out")
    assert "Without effect: model.layers.0.self_attn.rotary_emb.inv_freq" in capsys.readouterr().out
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]}]
    words = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(chat, add_generation_prompt=True)
    assert words.endswith("USER: <image>\nWhich tissue?\nASSISTANT:")
    given = {
        "input_ids": torch.tensor([[5, *[model.config.image_token_id] * 4, 7, 9]]),
        "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        before, after = model(**given).logits, again(**given).logits
    assert torch.allclose(before, after[..., : before.shape[-1]], atol=1e-5)


def test_a_folder_of_something_else_is_no_llava(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat"}')
    with pytest.raises(SystemExit):
        command(monkeypatch, "llava", tmp_path, "--out", tmp_path / "out")
    assert "holds no LLaVA 1.5: its config.json states the type 'internvl_chat'" in capsys.readouterr().err
