"""Patches per second of EfficientNet-Lite0 on a CPU, by every path there is, from uint8 pixels to features.

python -m benchmarks.encoder [--encoder efficientnet-lite0-he] [--threads 2] [--rounds 20]

The paths take turns, so that what else the machine does hits all of them alike; medians over rounds, and the ratio to
torch in the precision that the processor is fast in, which was the path before OpenVINO. Cosines are to torch in
float32, over noise, or with --tiles over real tiles. ONNX Runtime is measured where onnxruntime and onnxscript are
installed; it is not what load_encoder uses.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsewsi.bags import efficientnet
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.patch_encoder import fast_dtype

Encode = Callable[[np.ndarray], Tensor]
CPU = torch.device("cpu")


def load_path(name: str, dtype: torch.dtype, openvino: bool) -> Encode:
    """An encoder as a processor without bfloat16, or a machine without OpenVINO, would load it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(efficientnet, "fast_dtype", return_value=dtype))
        if not openvino:
            stack.enter_context(mock.patch.object(efficientnet, "compile_lite0", return_value=None))
        encoder = load_encoder(name, device="cpu")
    assert (encoder.dtype == torch.uint8) == openvino, "openvino is not installed"
    return encoder


class FromPixels(nn.Module):
    """A network with its preprocessing: uint8 (B, 224, 224, 3) -> (B, 1280)."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.extract_features((pixels.permute(0, 3, 1, 2).float() - 127) / 128).mean((2, 3))


def load_onnx_runtime(weights: dict[str, Tensor], batch: int, threads: int) -> Encode | None:
    """The same network on ONNX Runtime in float32, which has no bfloat16 on CPUs; None where it is not installed."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx needs
    except ImportError:
        return None
    network = FromPixels(efficientnet.fold_lite0(efficientnet.build_lite0(weights))).eval()
    pixels = torch.zeros(batch, 224, 224, 3, dtype=torch.uint8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "lite0.onnx")
        torch.onnx.export(network, (pixels,), file, input_names=["pixels"], dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    return lambda patches: torch.from_numpy(session.run(None, {"pixels": patches})[0])


def read_pixels(tiles: Path | None, batch: int) -> np.ndarray:
    """uint8 (batch, 224, 224, 3): noise, or the middles of images under a folder, spread over all there are."""
    if tiles is None:
        return np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    files = sorted(file for file in tiles.rglob("*") if file.suffix in (".jpeg", ".jpg", ".png", ".tif"))
    files = files[:: max(1, len(files) // batch)][:batch]
    if len(files) < batch:
        raise SystemExit(f"error: {tiles} holds {len(files)} images, {batch} are needed. Choose a smaller --batch.")
    return np.stack([np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=["efficientnet-lite0", efficientnet.HE], default="efficientnet-lite0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiles", type=Path, help="folder of images to encode instead of noise")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pixels = read_pixels(arguments.tiles, arguments.batch)
    name = arguments.encoder
    fast = fast_dtype(CPU)
    paths: dict[str, Encode] = {"torch, float32": load_path(name, torch.float32, openvino=False)}
    if fast == torch.bfloat16:
        paths["torch, bfloat16"] = load_path(name, fast, openvino=False)
    before = list(paths)[-1]
    weights = load_file(efficientnet.WEIGHTS) if name == efficientnet.HE else efficientnet.imagenet_weights()
    if (onnx := load_onnx_runtime(weights, len(pixels), arguments.threads)) is not None:
        paths["ONNX Runtime, float32"] = onnx
    paths["OpenVINO, float32"] = load_path(name, torch.float32, openvino=True)
    if fast == torch.bfloat16:
        paths["OpenVINO, bfloat16"] = load_path(name, fast, openvino=True)
    exact = paths["torch, float32"](pixels)
    cosines = {path: torch.cosine_similarity(encode(pixels), exact) for path, encode in paths.items()}
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(arguments.rounds):
        for path, encode in paths.items():
            start = time.perf_counter()
            encode(pixels)
            seconds[path].append(time.perf_counter() - start)
    print(f"{name}, {arguments.threads} threads, {len(pixels)} patches a round, {arguments.rounds} rounds")
    median = {path: float(np.median(taken)) for path, taken in seconds.items()}
    for path, taken in median.items():
        cosine = f"cosine {cosines[path].mean():.4f}, at worst {cosines[path].min():.4f}"
        print(f"{path:24s} {len(pixels) / taken:7.1f} patches/s  x{median[before] / taken:.2f}  {cosine}")


if __name__ == "__main__":
    main()
