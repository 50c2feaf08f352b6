"""Pixels are resized as an image library does."""

import numpy as np
import torch
from PIL import Image

from sparsewsi.bags.patch_encoder import pixels_to_input


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
