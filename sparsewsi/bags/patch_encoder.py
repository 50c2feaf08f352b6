"""What a patch encoder is: pixels of a patch in, one feature vector out.

B patches, D feature dim. Pixels are uint8 RGB, any side: every encoder resizes to its own input side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PatchEncoder:
    """A loaded encoder; call it with patches.

    name:       key of ENCODERS, or "hf:<id>"; written into every Bag it makes
    dim:        D
    patch_size: side of the network's input in px; patches of another side are resized to it
    mpp:        um/px the weights were trained at (or are commonly used at), to compare with a Bag's mpp
    licence:    what the weights may be used for, in a few words
    preprocess: uint8 (b, H, W, 3) on `device` -> (b, 3, patch_size, patch_size)
    forward:    the output of preprocess on `device` in `dtype`, channels last in memory -> (b, D)
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
                # A byte a value goes to the GPU, and what makes floats of it runs there (not yet run on a GPU).
                x = self.preprocess(part.to(self.device))  # (b, 3, patch_size, patch_size)
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
        return (x - shift.to(x.device)) / scale.to(x.device)

    return preprocess


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32.

    A capability is asked, not a stopwatch: a busy machine must not change the features. How much it is worth:
    benchmarks/encoder.py.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell: float32
        return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32
    return torch.float32
