"""Extraction: the same features whatever the batch, every patch at its place, damaged parts left out."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from sparsewsi.bags.bag import save_bag
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.extract import READERS, extract_bag, read_ahead
from sparsewsi.bags.foreign import load_bag, write_trident_h5
from sparsewsi.bags.patch_encoder import PatchEncoder


def mean_colour_encoder(fail_after: int | None = None) -> PatchEncoder:
    """A real, tiny encoder: mean colour and its square of four quadrants, D = 24."""
    seen = 0

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if fail_after is not None and seen > fail_after:
            raise RuntimeError("the device is gone")
        quadrants = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return torch.cat([quadrants, quadrants**2], dim=1)

    return PatchEncoder(
        "mean-colour",
        dim=24,
        patch_size=64,
        mpp=0.5,
        licence="none",
        preprocess=lambda pixels: pixels.permute(0, 3, 1, 2).float() / 255,
        forward=forward,
        device=torch.device("cpu"),
        chunk=4,
    )


@pytest.fixture(scope="module")
def tiff(tmp_path_factory) -> Path:
    """A tiled TIFF at 0.5 um/px with a disc of purple, textured tissue on white, 1024 x 768."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:768, :1024]
    tissue = (x - 500) ** 2 + (y - 380) ** 2 < 300**2
    pixels = np.full((768, 1024, 3), 244, np.uint8)
    texture = rng.integers(-40, 40, (96, 128, 1)).repeat(8, axis=0).repeat(8, axis=1)
    pixels[tissue] = np.clip(np.array([170, 90, 160]) + texture, 0, 255).astype(np.uint8)[tissue]
    path = tmp_path_factory.mktemp("slide") / "TCGA-XX-0001.tiff"
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    return path


def test_extraction_is_deterministic_and_independent_of_batch_size(tiff: Path, assert_same):
    encoder = mean_colour_encoder()
    first = extract_bag(tiff, encoder, patch_size=64)
    assert len(first.features) > 50
    for batch_size in (32, 1, 5, 1000):
        assert_same(first, extract_bag(tiff, encoder, patch_size=64, batch_size=batch_size))


def test_a_bag_knows_its_slide(tiff: Path):
    bag = extract_bag(tiff, mean_colour_encoder(), mpp=1.0, patch_size=64)
    assert (bag.patch_size, bag.mpp, bag.slide_mpp, bag.slide_size) == (128, 1.0, 0.5, (1024, 768))
    assert bag.encoder == "mean-colour"
    assert "TCGA" not in bag.slide
    order = np.lexsort((bag.coords[:, 0].numpy(), bag.coords[:, 1].numpy()))
    assert order.tolist() == list(range(len(bag.coords)))  # raster order
    assert (bag.coords % 128 == 0).all()  # one grid from the slide's origin
    stated = extract_bag(tiff, mean_colour_encoder(), mpp=1.0, patch_size=64, slide_mpp=0.25)
    assert (stated.patch_size, stated.slide_mpp, stated.mpp_source) == (256, 0.25, "argument")


def test_each_feature_is_that_of_the_pixels_at_its_coordinates(tiff: Path):
    bag = extract_bag(tiff, mean_colour_encoder(), patch_size=64, batch_size=7)
    pixels = tifffile.imread(tiff)
    x, y = bag.coords[len(bag.coords) // 2].tolist()
    expected = mean_colour_encoder()(pixels[None, y : y + 64, x : x + 64])
    assert torch.allclose(bag.features[len(bag.coords) // 2].float(), expected[0], atol=2e-3)


def test_progress_and_max_patches(tiff: Path):
    calls: list[tuple[int, int]] = []
    everything = extract_bag(tiff, mean_colour_encoder(), patch_size=64)
    few = extract_bag(
        tiff,
        mean_colour_encoder(),
        patch_size=64,
        batch_size=4,
        max_patches=10,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(0, 10), (4, 10), (8, 10), (10, 10)]
    rows = np.linspace(0, len(everything.coords) - 1, 10, dtype=int)
    assert torch.equal(few.coords, everything.coords[rows])
    assert torch.equal(few.features, everything.features[rows])


def test_a_blank_slide_gives_an_empty_bag_with_a_reason(tmp_path: Path, assert_same):
    path = tmp_path / "blank.tiff"
    tifffile.imwrite(
        path,
        np.full((512, 512, 3), 245, np.uint8),
        tile=(256, 256),
        photometric="rgb",
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    bag = extract_bag(path, mean_colour_encoder(), patch_size=64)
    assert bag.features.shape == (0, 24)
    assert bag.note
    save_bag(bag, tmp_path / "blank.safetensors", made_from={"bytes": 1})
    assert_same(bag, load_bag(tmp_path / "blank.safetensors"))
    write_trident_h5(bag, tmp_path / "blank.h5")
    assert_same(bag, load_bag(tmp_path / "blank.h5"))


def test_patches_in_damaged_parts_are_left_out_and_told(tmp_path: Path):
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal((180, 110, 165), 15, (512, 768, 3)), 0, 255).astype(np.uint8)
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None)
    intact = extract_bag(path, mean_colour_encoder(), patch_size=64, slide_mpp=0.5)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offset, length = page.dataoffsets[4], page.databytecounts[4]  # x 256 to 512, y 256 to 512
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(length))
    bag = extract_bag(path, mean_colour_encoder(), patch_size=64, slide_mpp=0.5, batch_size=3)
    left = ~((intact.coords >= 256) & (intact.coords < 512)).all(1)
    assert "16 of 96 patches lie in damaged parts" in bag.note
    assert torch.equal(bag.coords, intact.coords[left])
    assert torch.equal(bag.features, intact.features[left])


def test_a_failing_encoder_ends_the_extraction_and_its_thread(tiff: Path):
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="the device is gone"):
        extract_bag(tiff, mean_colour_encoder(fail_after=2), patch_size=64, batch_size=4)
    assert threading.active_count() == before


def test_a_failing_reader_is_heard():
    def read(part: np.ndarray) -> np.ndarray:
        if part[0] == 3:
            raise OSError("damaged strip")
        return part

    parts = read_ahead(read, (np.array([i]) for i in range(6)), most=2)
    assert [int(next(parts)[0]) for _ in range(3)] == [0, 1, 2]  # what comes before the damage comes first
    with pytest.raises(OSError, match="damaged strip"):
        next(parts)


def test_a_bounded_number_of_batches_is_read_ahead():
    """Memory: however many batches there are, one is being worked on and READERS are read."""
    started: list[int] = []

    def read(part: np.ndarray) -> np.ndarray:
        started.append(int(part[0]))
        return part

    for index, pixels in enumerate(read_ahead(read, [np.array([i]) for i in range(20)])):
        assert pixels[0] == index
        ahead = min(20, index + 1 + READERS)
        deadline = time.monotonic() + 5
        while len(started) < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(started) == ahead  # the next ones are read while this one is encoded, and no further ones
    assert sorted(started) == list(range(20))
    assert list(read_ahead(read, [])) == []


def test_bad_arguments(tiff: Path):
    with pytest.raises(ValueError, match="batch_size"):
        extract_bag(tiff, mean_colour_encoder(), batch_size=0)
    with pytest.raises(ValueError, match="max_patches"):
        extract_bag(tiff, mean_colour_encoder(), max_patches=0)


def test_a_real_slide_twice_and_with_two_batch_sizes(shared_data: Path):
    """Must show: the same features within float16 rounding. They are the same bits on this path."""
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    encoder = load_encoder("efficientnet-lite0", device="cpu")
    first, second, third = (extract_bag(path, encoder, batch_size=size, max_patches=24) for size in (32, 32, 7))
    assert first.features.shape == (24, 1280)
    assert torch.equal(first.coords, third.coords)
    rounding = 2.0**-10 * first.features.float().abs() + 1e-6
    for other in (second, third):
        assert ((first.features.float() - other.features.float()).abs() <= rounding).all()


def test_slides_that_state_no_resolution_are_refused(shared_data: Path):
    path = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(ValueError, match="slide_mpp="):
        extract_bag(path, "efficientnet-lite0")
