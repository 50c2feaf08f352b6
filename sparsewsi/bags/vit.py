"""Pathology ViTs, by name, and any other vision model of transformers: weights from the Hugging Face hub."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsewsi.bags.hub import (
    check_finite,
    check_folder,
    check_keys,
    explain_refusal,
    fetch_file,
    first_line,
    require_hub,
)
from sparsewsi.bags.patch_encoder import PatchEncoder, fast_dtype, pixels_to_input

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


@dataclass(frozen=True)
class HubViT:
    """A pathology ViT: the timm architecture that its weights fit, and its transform.

    Architectures and transforms are those of the model cards. Weights are loaded here, not by timm, so that no pickle
    is ever executed and every key is accounted for.
    gate: "yes" weights are handed out on request; "no" to everyone; "unclear" sources disagree
    parameters: of the network that is built
    statistics: mean and std per channel, of pixels scaled to [0, 1]
    pool: "token" the class token; "token+mean" it and the mean of the patch tokens (Virchow2); "attention" the
          attentional pooler of CONCH's vision tower, before the projection into its text space, not normalised;
          "plain attention" that of CONCH v1.5, without biases; "head" the class token in the space that KEEP shares
          with words, of length 1
    weights: prefixes of the file's weights, and ours for them; `others` are prefixes of towers that are not built
    """

    repo: str
    architecture: str
    arguments: dict[str, Any]
    dim: int
    licence: str
    parameters: int
    gate: str = "yes"
    size: int = 224
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = _IMAGENET
    mode: str = "bilinear"
    resize_to: int | None = None
    pool: str = "token"
    file: str = "pytorch_model.bin"
    weights: tuple[tuple[str, str], ...] = (("", "trunk."),)
    others: tuple[str, ...] = ()
    mpp: float = 0.5


# Two arguments of some of them are classes, which timm must be imported for: "SwiGLUPacked" and "SiLU" stand for them.
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_NON_COMMERCIAL = "CC BY-NC-ND 4.0: academic research only"

# The attentional pooler of CONCH's vision tower; the other one, and the projection, lead into its text space.
_CONCH_PARTS = ("trunk.", "attn_pool_contrast.", "ln_contrast.")
_CONCH_OTHERS = ("attn_pool_caption.", "ln_caption.", "proj_contrast")

HUB_VITS = {
    "conch": HubViT(
        "MahmoodLab/CONCH",
        "vit_base_patch16_224",
        {"img_size": 448},
        dim=512,
        licence=_NON_COMMERCIAL,
        size=448,
        statistics=_CLIP,
        mode="bicubic",
        pool="attention",
        weights=tuple((f"visual.{part}", part) for part in _CONCH_PARTS),
        others=("text.", "text_decoder.", "logit_scale", *(f"visual.{part}" for part in _CONCH_OTHERS)),
        parameters=87_567_104,
    ),
    "conch_v15": HubViT(
        "MahmoodLab/conchv1_5",
        "vit_large_patch16_224",
        {"img_size": 448, "init_values": 1e-6},
        dim=768,
        licence=_NON_COMMERCIAL,
        size=448,
        pool="plain attention",
        file="pytorch_model_vision.bin",
        weights=tuple((part, part) for part in _CONCH_PARTS),
        others=_CONCH_OTHERS,
        parameters=306_711_296,
    ),
    "uni": HubViT(
        "MahmoodLab/UNI",
        "vit_large_patch16_224",
        {"img_size": 224, "init_values": 1e-5},
        dim=1024,
        licence=_NON_COMMERCIAL,
        parameters=303_350_784,
    ),
    "uni2": HubViT(
        "MahmoodLab/UNI2-h",
        "vit_giant_patch14_224",
        {
            "img_size": 224,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
        }
        | _SWIGLU,
        dim=1536,
        licence=_NON_COMMERCIAL,
        parameters=681_394_176,
    ),
    "virchow2": HubViT(
        "paige-ai/Virchow2",
        "vit_huge_patch14_224",
        {"img_size": 224, "init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375} | _SWIGLU,
        dim=2560,
        licence=_NON_COMMERCIAL,
        mode="bicubic",
        pool="token+mean",
        parameters=631_239_424,
    ),
    "gigapath": HubViT(
        "prov-gigapath/prov-gigapath",
        "vit_giant_patch14_dinov2",
        {"img_size": 224, "patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 5.33334},
        dim=1536,
        licence="Apache-2.0, research use",
        mode="bicubic",
        resize_to=256,
        parameters=1_134_953_984,
    ),
    "h-optimus-0": HubViT(
        "bioptimus/H-optimus-0",
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 224, "init_values": 1e-5},
        dim=1536,
        licence="Apache-2.0",
        gate="no",
        statistics=_H_OPTIMUS,
        parameters=1_134_774_272,
    ),
    "keep": HubViT(
        "Astaxanthin/KEEP",
        "vit_large_patch16_224",
        {"img_size": 224, "init_values": 1e-5},
        dim=768,
        licence="MIT",
        gate="no",
        mode="bicubic",
        pool="head",
        weights=(("visual.", "trunk."), ("visual_head.", "head.")),
        others=("text.", "logit_scale"),
        parameters=304_728_576,
    ),
}


class AttentionPool(nn.Module):
    """One learned query attends to all tokens of a ViT. Names are those of CONCH's weights."""

    def __init__(self, dim: int, context_dim: int, heads: int = 8):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.attn = nn.MultiheadAttention(dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(context_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        context = self.ln_k(tokens)  # (b, T, context_dim)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        return self.attn(query, context, context, need_weights=False)[0][:, 0]  # (b, dim)


class PlainAttentionPool(nn.Module):
    """AttentionPool without biases. Names are those of CONCH v1.5's weights."""

    def __init__(self, dim: int, context_dim: int, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(context_dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        keys, values = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)  # (b, T, dim)
        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), -1, -1)
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, keys, values))
        seen = nn.functional.scaled_dot_product_attention(*heads)  # (b, heads, 1, dim / heads)
        return self.to_out(seen.transpose(1, 2).flatten(2))[:, 0]  # (b, dim)


class ViT(nn.Module):
    """A timm ViT (trunk) and the way its tokens become one vector."""

    def __init__(self, trunk: nn.Module, pool: str, dim: int):
        super().__init__()
        self.trunk: Any = trunk
        self.pool = pool
        if pool in ("attention", "plain attention"):
            kind = AttentionPool if pool == "attention" else PlainAttentionPool
            self.attn_pool_contrast = kind(dim, self.trunk.embed_dim)
            self.ln_contrast = nn.LayerNorm(dim)
        elif pool == "head":
            self.head = nn.Sequential(nn.Linear(self.trunk.embed_dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(x)  # (b, 1 + registers + patches, embed_dim)
        if self.pool in ("attention", "plain attention"):
            return self.ln_contrast(self.attn_pool_contrast(tokens))
        if self.pool == "head":
            return nn.functional.normalize(self.head(tokens[:, 0]), dim=-1)
        if self.pool == "token+mean":
            return torch.cat([tokens[:, 0], tokens[:, self.trunk.num_prefix_tokens :].mean(1)], dim=1)
        return tokens[:, 0]


def build_vit(name: str, spec: HubViT) -> ViT:
    """The network of a hub encoder, not yet with its weights. Raises ValueError without timm."""
    try:
        import timm
        from timm.layers.mlp import SwiGLUPacked
    except ImportError as error:
        raise ValueError(f"{name} needs timm and torchvision. Run `pip install 'sparsewsi[encoders]'`.") from error
    except RuntimeError as error:  # torchvision built against another torch
        raise ValueError(
            f"{name} needs timm, which cannot be imported: {error}. Install torch and torchvision from the same index."
        ) from error
    classes = {"SwiGLUPacked": SwiGLUPacked, "SiLU": nn.SiLU}
    arguments = {
        key: classes.get(value, value) if isinstance(value, str) else value for key, value in spec.arguments.items()
    }
    trunk = timm.create_model(spec.architecture, pretrained=False, num_classes=0, **arguments)
    return ViT(trunk, spec.pool, spec.dim)


def rename_weights(stored: Mapping[str, Tensor], spec: HubViT) -> dict[str, Tensor]:
    """A file's weights under our names; those of towers that are not built are left out, all others stay."""
    named: dict[str, Tensor] = {}
    for key, value in stored.items():
        prefix = next((pair for pair in spec.weights if key.startswith(pair[0])), None)
        if prefix is not None:
            named[prefix[1] + key.removeprefix(prefix[0])] = value
        elif not key.startswith(spec.others):
            named[key] = value  # unknown: load_state_dict will name it
    return named


def stretch_positions(stored: Tensor, wanted: int) -> Tensor:
    """Positions (1, 1 + n, D) of a class token and a square of n patches, stretched to (1, wanted, D).

    CONCH v1.5's weights hold those of 224 px; its own code stretches them for every picture of 448 px, bicubically and
    by a tenth of a patch more than it should, which is part of what was trained.
    """
    side, goal = math.isqrt(stored.shape[1] - 1), math.isqrt(wanted - 1)
    square = stored[:, 1:].float().unflatten(1, (side, side)).movedim(-1, 1)  # (1, D, side, side)
    square = nn.functional.interpolate(square, scale_factor=(goal + 0.1) / side, mode="bicubic")
    return torch.cat([stored[:, :1].float(), square.flatten(2).mT], 1)


def load_hub_vit(name: str, device: torch.device) -> PatchEncoder:
    spec = HUB_VITS[name]
    model = build_vit(name, spec)
    path = fetch_file(name, spec.repo, spec.file, "model.safetensors")
    try:
        if path.suffix == ".safetensors":
            stored: dict[str, Tensor] = load_file(path)
        else:
            stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not tensors alone
        raise ValueError(f"The weights of {name} cannot be read ({error}). Delete {path} and try again.") from error
    stored = rename_weights(stored, spec)
    positions = stored.get("trunk.pos_embed")
    if name == "conch_v15" and positions is not None and positions.shape != model.trunk.pos_embed.shape:
        stored["trunk.pos_embed"] = stretch_positions(positions, model.trunk.pos_embed.shape[1])
    try:
        model.load_state_dict(stored, strict=True)
    except RuntimeError as error:
        raise ValueError(f"The weights of {name} at {spec.repo} do not fit the network they should: {error}") from error
    check_finite(model, name)
    mean, std = (tuple(255 * value for value in values) for values in spec.statistics)
    dtype = fast_dtype(device)
    model = model.eval().to(device, dtype)
    return PatchEncoder(
        name,
        dim=spec.dim,
        patch_size=spec.size,
        mpp=spec.mpp,
        licence=spec.licence,
        preprocess=pixels_to_input(spec.size, mean, std, mode=spec.mode, resize_to=spec.resize_to),
        forward=model,
        device=device,
        dtype=dtype,
        chunk=choose_chunk(device),
    )


def choose_chunk(device: torch.device) -> int:
    """Patches per pass of a ViT: its matrices have a row per token, so a few patches fill a CPU already."""
    return 32 if device.type == "cuda" else 4


# ---- models of transformers


def stated_name(name: str) -> str:
    """The name that an encoder loaded by `name` writes into its bags: of a local folder only the last part."""
    source = Path(name.removeprefix("hf:"))
    return f"hf:{source.name}" if name.startswith("hf:") and source.is_dir() else name


def _load_vision_model(name: str, source: str, processed: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Image processor (None unless processed), model and transformers' report of what was loaded; see below."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoImageProcessor, AutoModel

    known = None if Path(source).is_dir() else try_to_load_from_cache(source, "config.json")
    folder = Path(source) if known is None else Path(known).parent if isinstance(known, str) else None
    cached = folder is not None and folder.is_dir()
    if not cached:
        require_hub(name, source)
    try:
        if folder is not None and cached:
            check_folder(folder, name)
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=cached) if processed else None
        model: Any
        model, loaded = AutoModel.from_pretrained(
            source, local_files_only=cached, use_safetensors=True, output_loading_info=True
        )
        return processor, model, loaded
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"The weights of {name} cannot be read ({first_line(error)}): they are damaged, cut short or of another "
            "model. Fetch them again."
        ) from error
    except ImportError as error:
        raise ValueError(f"{name} needs a package that is not installed: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} is not part of transformers: it needs code from its repository, which is not executed here. "
                "Export its features with its own package and load them with load_bag."
            ) from error
        raise explain_refusal(name, source, error) from error


def load_transformers_encoder(source: str, device: torch.device) -> PatchEncoder:
    """Any vision model of transformers (Phikon, DINOv2, CLIP, ...) with the image processor it is published with.

    source: hub id or a local folder
    The feature is the class token of the last layer; where a model has none its pooled output, else the tokens' mean.
    Raises ValueError when the model cannot be had, or would need code from its repository (never executed here).
    """
    name = stated_name(f"hf:{source}")
    processor, model, loaded = _load_vision_model(name, source, processed=True)
    parts = {key.split(".")[0] for key in model.state_dict()}
    model = getattr(model, "vision_model", model)  # the image tower of CLIP, SigLIP, ...
    has_class_token = any(key.endswith("cls_token") for key, _ in model.named_parameters())
    # A head for another task may be there besides, and a pooler that is not used may be lacking; more of the model's
    # own parts, such as layers that the config does not count, may not.
    needed = [key for key in loaded["missing_keys"] if not (has_class_token and ".pooler." in f".{key}")]
    foreign = [
        key
        for key in loaded["unexpected_keys"]
        if needed or key.removeprefix(f"{type(model).base_model_prefix}.").split(".")[0] in parts
    ]
    check_keys(name, {**loaded, "missing_keys": needed, "unexpected_keys": foreign})
    check_finite(model, name)
    dtype = fast_dtype(device)
    model = model.eval().to(device, dtype)

    def preprocess(pixels: Tensor) -> Tensor:
        return processor(images=list(pixels.cpu().numpy()), return_tensors="pt")["pixel_values"]

    def forward(x: Tensor) -> Tensor:
        output = model(pixel_values=x)
        tokens = output.last_hidden_state
        if has_class_token and tokens.ndim == 3:
            return tokens[:, 0]
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        return tokens.float().mean(1) if tokens.ndim == 3 else tokens.float().mean((2, 3))

    with torch.inference_mode():
        x = preprocess(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
        dim = forward(x.to(device, dtype)).shape[1]
    return PatchEncoder(
        name,
        dim=dim,
        patch_size=x.shape[-1],
        mpp=0.5,
        licence="see the model card",
        preprocess=preprocess,
        forward=forward,
        device=device,
        dtype=dtype,
        chunk=choose_chunk(device),
    )


MIDNIGHT = "kaiko-ai/midnight"


def load_midnight(device: torch.device) -> PatchEncoder:
    """Midnight-12k, a DINOv2 giant: its class token and the mean of its patch tokens, as its card has it."""
    _, model, loaded = _load_vision_model("midnight", MIDNIGHT, processed=False)
    check_keys("midnight", loaded)
    check_finite(model, "midnight")
    dtype = fast_dtype(device)
    model = model.eval().to(device, dtype)

    def forward(x: Tensor) -> Tensor:
        tokens = model(pixel_values=x).last_hidden_state  # (b, 1 + patches, dim)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)

    return PatchEncoder(
        "midnight",
        dim=2 * model.config.hidden_size,
        patch_size=224,
        mpp=0.5,
        licence="MIT",
        preprocess=pixels_to_input(224, (127.5,) * 3, (127.5,) * 3, mode="bilinear"),
        forward=forward,
        device=device,
        dtype=dtype,
        chunk=choose_chunk(device),
    )
