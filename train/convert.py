"""Models of others from the files they were published as: artefacts of ours, or what --reader hf: takes.

    python -m train.convert slidechat FOLDER --llm Qwen/Qwen2.5-7B-Instruct --out slidechat
    python -m train.convert llava FOLDER --out llava-med

FOLDER holds the published weights, as .safetensors or as a checkpoint of torch; of the latter only tensors are read.
--llm is the LLM that they were made from, for its configuration and tokenizer. The folder --out gets `llm`, the LLM
with the published weights, and `model`, the artefact, which names that folder. Every published weight is used, or has
no effect and is named; a missing, unknown or misshapen one ends the import with a sentence.

SlideChat (2410.11761): features of CONCH as they are; LongNet with sub-LN, as released each patch alone; a projector of
two linear layers; Qwen2.5-7B, fully fine-tuned. Its own way keeps all patches up to --patches, evenly spaced. Its
release has no scorer: the artefact's gives every patch the same score until it is trained, so that of the selectors
"topk" means nothing, and "mmr" keeps patches that are unlike each other.

LLaVA 1.5 (LLaVA-Med v1.5, Quilt-LLaVA): FOLDER is the whole repository, with config.json and tokenizer; --out gets the
same weights in transformers' layout, for `--reader hf:llava-med`. --vision is the vision tower, for its configuration
and image transform, and for its weights where the repository has none.

LoC-Path (2512.05391) is not imported. Its latents enter the LLM's layers by cross-attention, while an artefact of ours
puts visual tokens before the text; the command lists the weights that a folder holds.
"""

import argparse
import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sparsewsi.files import read_json, replacing_folder
from sparsewsi.model import artefact
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.limits import Limits
from sparsewsi.model.selector import Scorer
from sparsewsi.model.slide_encoder import SlideEncoder, build_projector
from train.flags import make_parser, run_command

SLIDECHAT_PATCHES = 20_480  # of a larger slide; what its evaluation shows, and Qwen2.5 has positions for
ENDINGS = (".safetensors", ".bin", ".pth", ".pt")

# SlideChat's name of a part, after LongNet_encoder., and ours, after slide_encoder.
_LONGNET = {
    r"layers\.(\d+)\.self_attn_layer_norm\.": r"blocks.\1.norm1.",
    r"layers\.(\d+)\.self_attn\.v_proj\.": r"blocks.\1.value.",
    r"layers\.(\d+)\.self_attn\.inner_attn_ln\.": r"blocks.\1.inner_norm.",
    r"layers\.(\d+)\.self_attn\.out_proj\.": r"blocks.\1.out.",
    r"layers\.(\d+)\.final_layer_norm\.": r"blocks.\1.norm2.",
    r"layers\.(\d+)\.ffn\.fc1\.": r"blocks.\1.up.",
    r"layers\.(\d+)\.ffn\.ffn_layernorm\.": r"blocks.\1.ffn_norm.",
    r"layers\.(\d+)\.ffn\.fc2\.": r"blocks.\1.down.",
    r"layer_norm\.": "norm.",
}
_DEAD = re.compile(r"LongNet_encoder\.layers\.\d+\.self_attn\.[qk]_proj\.(weight|bias)")  # each patch attends to itself


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files by name, read when they are used. Raises ValueError; never unpickles."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Pass the one that holds the published weights.")
    files = sorted(file for file in folder.rglob("*") if file.suffix in ENDINGS)
    safe = [file for file in files if file.suffix == ".safetensors"]
    found: dict[str, Tensor] = {}
    for file in safe or files:
        for name, value in _read_file(file).items():
            if name in found:
                raise ValueError(f"{name} stands in two files of {folder}. Pass a folder that holds one model.")
            found[name] = value
    if not found:
        raise ValueError(f"{folder} holds no weights ({', '.join(ENDINGS)}).")
    return found


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        held = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is damaged ({error}). Fetch it again.") from error
    except Exception as error:  # torch raises half a dozen types for a file that is not tensors alone
        raise ValueError(
            f"{file.name} holds more than tensors, which is not read, as it could run code. Save its state_dict alone, "
            "as safetensors."
        ) from error
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"{file.name} is no state_dict: it holds something besides named tensors.")
    return held


def check_weights(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor | tuple[int, ...]]) -> None:
    """Raise ValueError, naming one of each kind, unless names and shapes are those that are wanted."""
    shapes = {name: tuple(value if isinstance(value, tuple) else value.shape) for name, value in wanted.items()}
    missing = sorted(shapes.keys() - found.keys())
    extra = sorted(found.keys() - shapes.keys())
    other = sorted(name for name in shapes.keys() & found.keys() if tuple(found[name].shape) != shapes[name])
    said = []
    if missing:
        said.append(f"{len(missing)} weights are missing (such as {missing[0]})")
    if extra:
        said.append(f"{len(extra)} are unknown (such as {extra[0]})")
    if other:
        name = other[0]
        said.append(f"{len(other)} have another shape (such as {name}: {tuple(found[name].shape)}, not {shapes[name]})")
    if said:
        raise ValueError(f"{what} are not as published: {', '.join(said)}. Nothing was written.")


def name_ours(published: Iterable[str]) -> dict[str, str]:
    """SlideChat's names of slide encoder and projector -> ours; what has no effect and what is unknown are left out."""
    names = {}
    for name in published:
        part = name.removeprefix("LongNet_encoder.")
        for theirs, ours in _LONGNET.items():
            if part != name and re.match(theirs, part):
                names[name] = f"slide_encoder.{re.sub(f'^{theirs}', ours, part)}"
        if name.startswith("projector.model."):
            names[name] = f"projector.{name.removeprefix('projector.model.')}"
    return names


def convert_slidechat(folder: Path, llm: str, out: Path, patches: int = SLIDECHAT_PATCHES) -> str:
    """Import SlideChat; returns what was used and what has no effect. Raises ValueError."""
    weights = read_weights(folder)
    config = _load_config(llm)
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)
    width = network.get_input_embeddings().weight.shape[1]
    numbers = [re.match(r"LongNet_encoder\.layers\.(\d+)\.", name) for name in weights]
    layers = 1 + max((int(number[1]) for number in numbers if number), default=1)
    dim = len(weights.get("LongNet_encoder.layer_norm.weight", torch.empty(512)))
    ours: dict[str, nn.Module] = {
        "slide_encoder": SlideEncoder(dim, dim, layers, "slidechat"),
        "projector": build_projector("plain", dim, width),
    }
    names = name_ours(weights)
    shapes = {f"{part}.{name}": value for part, module in ours.items() for name, value in module.state_dict().items()}
    known = {theirs: weights[theirs] for theirs in weights if not theirs.startswith("llm.")}
    wanted: dict[str, Tensor | tuple[int, ...]] = {_name_theirs(name): value for name, value in shapes.items()}
    for number in range(layers):  # of no effect, but published
        for part in ("q_proj", "k_proj"):
            wanted[f"LongNet_encoder.layers.{number}.self_attn.{part}.weight"] = (dim, dim)
            wanted[f"LongNet_encoder.layers.{number}.self_attn.{part}.bias"] = (dim,)
    check_weights("The weights of SlideChat's slide encoder and projector", known, wanted)
    text = {name.removeprefix("llm."): value for name, value in weights.items() if name.startswith("llm.")}
    check_weights(f"The weights of SlideChat's LLM, built as {llm},", text, network.state_dict())

    scorer = Scorer(dim, 1)
    nn.init.zeros_(scorer.head.weight)
    nn.init.zeros_(scorer.head.bias)
    state = {ours_name: weights[theirs] for theirs, ours_name in names.items()}
    state |= {f"scorer.{name}": value for name, value in scorer.state_dict().items()}
    with replacing_folder(out) as new:
        network.load_state_dict(text, strict=True, assign=True)
        network.save_pretrained(new / "llm")
        AutoTokenizer.from_pretrained(llm).save_pretrained(new / "llm")
        with contextlib.suppress(OSError):  # an LLM without one
            GenerationConfig.from_pretrained(llm).save_pretrained(new / "llm")
        made = SparseWSIConfig(
            llm=str((out / "llm").resolve()),
            encoder="conch",
            feature_dim=dim,
            num_tokens=patches,
            slide_encoder="slidechat",
            slide_encoder_layers=layers,
            dim=dim,
            scorer_layers=1,
            projector="plain",
            selection="evenly",
            position="compact",
            option_scoring="letter",
            note="Weights of SlideChat, imported.",
        )
        artefact.save(new / "model", made, state, network, None, Limits(), torch.float32, _card(llm))
    dead = sorted(name for name in weights if _DEAD.fullmatch(name))
    return "\n".join(
        [
            f"Used: {len(names)} weights of slide encoder and projector, {len(text)} of the LLM.",
            f"Without effect, as a patch attends to itself alone: {len(dead)} ({', '.join(dead)}).",
            f"The model is {out / 'model'}, its LLM {out / 'llm'}.",
        ]
    )


def _name_theirs(name: str) -> str:
    """Our name of a weight of SlideChat's slide encoder or projector -> the published one."""
    if name.startswith("projector."):
        return f"projector.model.{name.removeprefix('projector.')}"
    part = name.removeprefix("slide_encoder.")
    for theirs, ours in _LONGNET.items():
        pattern = "^" + re.escape(ours).replace(r"\\1", r"(\d+)")
        if re.match(pattern, part):
            plain = theirs.replace(r"(\d+)", r"\1").replace(r"\.", ".")
            return f"LongNet_encoder.{re.sub(pattern, plain, part)}"
    raise AssertionError(name)


def _load_config(llm: str) -> Any:
    try:
        return AutoConfig.from_pretrained(llm)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the configuration of the LLM {llm} cannot be had ({reason}). Pass a folder with it."
        ) from error


def _card(llm: str) -> str:
    return (
        "---\nlibrary_name: sparsewsi\ntags: [pathology, whole-slide-image]\n---\n\n# SlideChat, imported\n\n"
        "Weights of SlideChat (arXiv 2410.11761; its licence holds: research only) in the layout of sparsewsi, made "
        f"with `python -m train.convert slidechat` on {llm}. Its scorer is untrained.\n\n"
        "Research use only, not for diagnosis.\n"
    )


# LLaVA 1.5's names and transformers', the first that fits; what has neither weight nor effect is named.
_LLAVA = {
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}
_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}\n"
    "{% endif %}{% endfor %}"
)
# How the models were asked in training: Mistral's way, and the first way of Vicuna.
TEMPLATES = {
    "llava_mistral": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    f" {_PARTS}{{{{ eos_token }}}}{{% else %}}[INST] {_PARTS} [/INST]{{% endif %}}{{% endfor %}}",
    "llava": f"{{{{ bos_token }}}}{_SYSTEM}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}"
    f"ASSISTANT: {_PARTS}{{{{ eos_token }}}}{{% else %}}USER: {_PARTS}{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
}


def convert_llava(folder: Path, vision: str, out: Path) -> str:
    """LLaVA 1.5 in transformers' layout; returns what was used. Raises ValueError."""
    from transformers import (
        AutoImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        MistralConfig,
    )

    stated = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = "llava_mistral" if stated.get("model_type") == "llava_mistral" else "llava"
    if stated.get("model_type") not in ("llava_mistral", "llava_llama", "llava"):
        raise ValueError(f"{folder} holds no LLaVA 1.5: its config.json states the type {stated.get('model_type')!r}.")
    weights = read_weights(folder)
    buffers = [name for name in weights if name.endswith(_BUFFERS)]
    found = {_name_llava(name): value for name, value in weights.items() if name not in buffers}
    try:
        seen: Any = CLIPVisionConfig.from_pretrained(vision)
        transform = AutoImageProcessor.from_pretrained(vision)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if not any(name.startswith("model.vision_tower.") for name in found):
            tower = CLIPVisionModel.from_pretrained(vision, use_safetensors=True).state_dict()
            found |= {f"model.vision_tower.{name}": value for name, value in tower.items()}
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the vision tower {vision} or the tokenizer in {folder} cannot be had ({reason}).") from error
    for name in ("model_type", "architectures", "auto_map", "torch_dtype"):
        stated.pop(name, None)
    text = (MistralConfig if kind == "llava_mistral" else LlamaConfig)(**stated)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        more = image + 1 - len(found.get(name, ()))
        if name in found and more > 0:  # a row for the place of a picture, which is never read and should not be said
            mean = found[name].float().mean(0).to(found[name].dtype)
            found[name] = torch.cat([found[name], mean.expand(more, -1)])
    text.vocab_size = max(text.vocab_size, image + 1)
    settings: dict[str, Any] = {
        "image_token_id": image,
        "vision_feature_layer": stated.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    config = LlavaConfig(vision_config=seen, text_config=text, **settings)
    with torch.device("meta"):
        network: Any = LlavaForConditionalGeneration(config)
    check_weights("The weights of LLaVA", found, network.state_dict())
    network.load_state_dict(found, strict=True, assign=True)
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = LlavaProcessor(
        image_processor=transform,
        tokenizer=tokenizer,
        patch_size=seen.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[kind],
    )
    with replacing_folder(out) as new:
        network.save_pretrained(new)
        processor.save_pretrained(new)
    dead = f" Without effect: {', '.join(sorted(buffers))}." if buffers else ""
    return f"Used: {len(weights) - len(buffers)} weights.{dead}\nRead it with --reader hf:{out}"


def _name_llava(name: str) -> str:
    theirs = next((prefix for prefix in _LLAVA if name.startswith(prefix)), "")
    return _LLAVA.get(theirs, "") + name.removeprefix(theirs)


def refuse_loc_path(folder: Path) -> None:
    """Say what a folder of LoC-Path holds and why it is not imported. Raises ValueError."""
    groups = Counter(re.sub(r"\.\d+(\.|$).*", ".*", name) for name in read_weights(folder))
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(groups.items()))
    raise ValueError(
        "LoC-Path is not imported: its latents enter the LLM's layers by cross-attention, and an artefact of sparsewsi "
        f"puts visual tokens before the text. {folder} holds the weights {listed}."
    )


def convert(given: argparse.Namespace) -> str:
    """The command; returns what it did."""
    if given.model == "loc-path":
        refuse_loc_path(given.folder)
    if given.out is None:
        raise ValueError("--out names the folder for the model and its LLM; it is missing.")
    if given.patches < 1:
        raise ValueError(f"--patches must be at least 1, got {given.patches}.")
    if given.out.exists():
        raise ValueError(f"{given.out} exists already. Name another --out.")
    if given.model == "llava":
        return convert_llava(given.folder, given.vision, given.out)
    return convert_slidechat(given.folder, given.llm, given.out, given.patches)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", choices=["slidechat", "llava", "loc-path"])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the published weights")
    parser.add_argument(
        "--llm", default="Qwen/Qwen2.5-7B-Instruct", help="hub id or folder of the LLM they were made from"
    )
    parser.add_argument("--vision", default="openai/clip-vit-large-patch14-336", help="llava: its vision tower")
    parser.add_argument("--patches", type=int, default=SLIDECHAT_PATCHES, help="shown of a larger slide, evenly spaced")
    parser.add_argument("--out", type=Path, help="folder that is made")
    print(convert(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)
