"""Patches per second of EfficientNet-Lite0 in the variants that load_efficientnet_lite0 chose from, as ratios.

python -m benchmarks.encoder [--threads 2] [--batch 16] [--seconds 5]
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from sparsewsi.bags.encoders import load_encoder


def patches_per_second(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, seconds: float) -> float:
    with torch.inference_mode():
        network(x)  # kernels are chosen and packed on the first call
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            network(x)
            count += len(x)
        return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    from efficientnet_lite_pytorch import EfficientNet

    published: Any = EfficientNet.from_name("efficientnet-lite0").eval()  # speed does not depend on the weights
    last = copy.deepcopy(published).to(memory_format=torch.channels_last)
    half = copy.deepcopy(last).bfloat16()
    x = torch.randn(arguments.batch, 3, 224, 224)
    x_last = x.to(memory_format=torch.channels_last)
    variants = {
        "published, float32": (published.extract_features, x),
        "published, float32, channels last": (last.extract_features, x_last),
        "published, bfloat16, channels last": (half.extract_features, x_last.bfloat16()),
    }
    base = 0.0
    print(f"{arguments.threads} threads, batch {arguments.batch}, torch {torch.__version__}")
    for name, (network, batch) in variants.items():
        speed = patches_per_second(network, batch, arguments.seconds)
        base = base or speed
        print(f"{name:45s} {speed:7.1f} patches/s  x{speed / base:.2f}")
    encoder = load_encoder("efficientnet-lite0", device="cpu")
    pixels = torch.randint(0, 256, (arguments.batch, 224, 224, 3), dtype=torch.uint8)
    speed = patches_per_second(encoder, pixels, arguments.seconds)
    print(f"{f'load_encoder: folded, {encoder.dtype}, from pixels':45s} {speed:7.1f} patches/s  x{speed / base:.2f}")


if __name__ == "__main__":
    main()
