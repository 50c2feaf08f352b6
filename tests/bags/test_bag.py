"""Bags: extraction from a slide, files of our own and of other tools, refusals in words."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch

from sparsewsi.bags.bag import READERS, Bag, check_bag, extract_bag, load_bag, read_ahead, save_bag, write_trident_h5
from sparsewsi.bags.encoders import PatchEncoder, load_encoder


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


@pytest.fixture
def bag() -> Bag:
    """5 patches of 443 level-0 px (0.2528 um/px), read at 0.5."""
    torch.manual_seed(0)
    coords = torch.tensor([[0, 0], [443, 0], [0, 443], [886, 443], [443, 1329]], dtype=torch.int32)
    return Bag(
        torch.randn(5, 8).half(),
        coords,
        443,
        0.5,
        "conch",
        "slide 0a1b2c3d",
        slide_mpp=0.2528,
        mpp_source="openslide",
        slide_size=(2000, 3000),
        note="",
    )


def assert_same(a: Bag, b: Bag) -> None:
    for field in fields(Bag):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


# ---- extraction


def test_extraction_is_deterministic_and_independent_of_batch_size(tiff: Path):
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


def test_a_blank_slide_gives_an_empty_bag_with_a_reason(tmp_path: Path):
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


# ---- the value


def test_a_bag_is_a_value(bag: Bag):
    assert_same(bag, copy.deepcopy(bag))
    assert_same(bag, pickle.loads(pickle.dumps(bag)))
    rounded = replace(bag, features=bag.features.double(), coords=bag.coords.long())
    assert_same(bag, rounded)


def test_a_bag_refuses_what_does_not_fit(bag: Bag):
    with pytest.raises(ValueError, match=r"coords must be \(N, 2\)"):
        replace(bag, coords=bag.coords[:4])
    with pytest.raises(ValueError, match="floating-point"):
        replace(bag, features=bag.features.int())
    with pytest.raises(ValueError, match="patch_size"):
        replace(bag, patch_size=0)
    for value in (float("nan"), float("inf"), 1e6):  # 1e6 is beyond float16
        features = bag.features.float().clone()
        features[3, 2] = value
        with pytest.raises(ValueError, match=r"1 of 5 patches .* row 3"):
            replace(bag, features=features)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"coords": torch.tensor([[2**31 + 5, 0]])}, "within 32 bits"),
        ({"coords": torch.tensor([[0.5, 0.0]])}, "fractions"),
        ({"coords": torch.tensor([[float("nan"), 0.0]])}, "NaN"),
        ({"coords": torch.tensor([[True, False]])}, "whole numbers"),
        ({"patch_size": 224.5}, "patch_size"),
        ({"patch_size": float("nan")}, "patch_size"),
        ({"patch_size": float("inf")}, "patch_size"),
        ({"mpp": -1.0}, "mpp"),
        ({"slide_mpp": float("nan")}, "slide_mpp"),
    ],
)
def test_a_bag_refuses_what_nothing_can_have(changes: dict, match: str):
    facts = {"features": torch.zeros(1, 4), "coords": torch.zeros(1, 2, dtype=torch.int32), "patch_size": 224}
    with pytest.raises(ValueError, match=match):
        Bag(**facts | {"mpp": 0.5, "encoder": "e", "slide": "s"} | changes)


def test_what_a_file_of_ours_does_not_state_can_be_given(bag: Bag, tmp_path: Path):
    unknown = replace(bag, encoder="unknown", slide_mpp=None, mpp_source="unknown")
    save_bag(unknown, tmp_path / "bag.safetensors")
    write_trident_h5(unknown, tmp_path / "bag.h5")
    for name in ("bag.safetensors", "bag.h5"):
        read = load_bag(tmp_path / name, encoder="conch_v1", slide_mpp=0.25)
        assert (read.encoder, read.slide_mpp, read.mpp_source) == ("conch", 0.25, "argument")
    save_bag(bag, tmp_path / "stated.safetensors")
    assert load_bag(tmp_path / "stated.safetensors", encoder="conch", slide_mpp=9.0).encoder == bag.encoder


def test_warnings_do_not_name_the_file(tmp_path: Path):
    np.save(tmp_path / "DOE_JANE.npy", np.zeros((4, 8), np.float32))
    with pytest.warns(UserWarning, match="no coordinates") as caught:
        load_bag(tmp_path / "DOE_JANE.npy")
    assert "JANE" not in str(caught[0].message)


def test_tensors_that_need_care(tmp_path: Path):
    torch.save(torch.zeros(3, 8, requires_grad=True), tmp_path / "grad.pt")
    torch.save({"features": torch.zeros(3, 8), "coords": torch.zeros(3, 2).bfloat16()}, tmp_path / "dict.pt")
    torch.save(torch.zeros(3, 8).to_sparse(), tmp_path / "sparse.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("grad.pt", "dict.pt"):
            assert load_bag(tmp_path / name).features.shape == (3, 8)
    with pytest.raises(ValueError, match="sparse"):
        load_bag(tmp_path / "sparse.pt")


def test_check_bag_compares_encoder_and_dimension(bag: Bag):
    check_bag(bag, "conch", 8)
    check_bag(replace(bag, encoder="unknown"), "conch", 8)
    with pytest.raises(ValueError, match="encoded with conch, but the model was trained on uni"):
        check_bag(bag, "uni", 8)
    with pytest.raises(ValueError, match=r"dimension 8 .* takes 512"):
        check_bag(replace(bag, encoder="unknown"), "conch", 512)


# ---- our own file


def test_round_trip(bag: Bag, tmp_path: Path):
    for suffix in (".safetensors", ".bag"):  # the content decides, not the name
        path = tmp_path / f"new folder/ä{suffix}"
        save_bag(bag, path)
        assert_same(bag, load_bag(path))
        assert [entry.name for entry in path.parent.iterdir() if "partial" in entry.name] == []


def test_a_bag_of_another_version_is_refused(bag: Bag, tmp_path: Path):
    from safetensors.torch import save_file

    tensors = {"features": bag.features, "coords": bag.coords}
    save_file(tensors, tmp_path / "a", metadata={"sparsewsi_bag": json.dumps({"slide_size": None, "colour": 1})})
    with pytest.raises(ValueError, match="cannot read"):
        load_bag(tmp_path / "a")
    save_file(tensors, tmp_path / "b")
    with pytest.raises(ValueError, match="no bag"):
        load_bag(tmp_path / "b")


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_writer_leaves_no_partial_file(bag: Bag, tmp_path: Path):
    """Killed when everything is written but nothing is renamed: no new file, and the old one untouched."""
    old = tmp_path / "old.safetensors"
    save_bag(bag, old)
    program = f"""
        import threading, time, torch
        import sparsewsi.bags.bag as module
        from pathlib import Path
        reached = threading.Semaphore(0)
        def stuck(path):
            reached.release()
            time.sleep(600)
        module._fsync = stuck
        folder = Path({str(tmp_path)!r})
        bag = module.Bag(torch.ones(1000, 64), torch.zeros(1000, 2), 224, 0.5, "conch", "slide")
        for write, name in ((module.save_bag, "old.safetensors"), (module.save_bag, "new.safetensors"),
                            (module.write_trident_h5, "new.h5")):
            threading.Thread(target=write, args=(bag, folder / name)).start()
        for _ in range(3):
            reached.acquire()
        print("written", flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "written"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))) >= 3  # it did write
    assert not (tmp_path / "new.safetensors").exists()
    assert not (tmp_path / "new.h5").exists()
    assert_same(bag, load_bag(old))


def test_a_failed_write_cleans_up(bag: Bag, tmp_path: Path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("sparsewsi.bags.bag._fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_bag(bag, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- other tools' files


def test_trident_round_trip(bag: Bag, tmp_path: Path):
    write_trident_h5(bag, tmp_path / "a.h5")
    assert_same(bag, load_bag(tmp_path / "a.h5"))
    with h5py.File(tmp_path / "a.h5") as file:
        features: Any = file["features"]
        coords: Any = file["coords"]
        assert features.chunks is None  # contiguous: one read, not one per row
        assert coords.chunks is None
        assert features.dtype == np.float32  # CLAM's model takes them as they are
        assert np.array_equal(features[:], bag.features.float().numpy())
        facts: dict[str, Any] = dict(coords.attrs)
        # What TRIDENT asks of coords, and the arithmetic it does with it.
        assert {
            "patch_size",
            "patch_size_level0",
            "level0_magnification",
            "target_magnification",
            "overlap",
            "name",
        } <= set(facts)
        assert facts["patch_size"] == 224
        assert round(facts["patch_size"] * facts["level0_magnification"] / facts["target_magnification"]) == 443
        assert (facts["level0_width"], facts["level0_height"]) == (2000, 3000)
        assert "patch_level" not in facts  # CLAM would read 224 px of level 0


def test_trident_file_without_resolution_is_clams(bag: Bag, tmp_path: Path):
    unknown = replace(bag, mpp=None, slide_mpp=None, mpp_source="unknown", slide_size=None, note="ä")
    write_trident_h5(unknown, tmp_path / "a.h5")
    assert_same(unknown, load_bag(tmp_path / "a.h5"))
    with h5py.File(tmp_path / "a.h5") as file:
        facts = dict(file["coords"].attrs)
    assert (facts["patch_level"], facts["patch_size"]) == (0, 443)  # TRIDENT falls back to these two as well
    assert "target_magnification" not in facts


def _foreign(n: int = 12, dim: int = 6, step: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Features and coordinates of a 4 x 3 grid, column after column as several tools write them."""
    rng = np.random.default_rng(0)
    columns, rows = np.meshgrid(np.arange(4), np.arange(3), indexing="ij")
    coords = np.stack([columns.ravel(), rows.ravel()], axis=1)[:n] * step
    return rng.standard_normal((n, dim)).astype(np.float32), coords


def _assert_rows(bag: Bag, features: np.ndarray, coords: np.ndarray) -> None:
    """The bag holds these rows, in raster order."""
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    assert np.array_equal(bag.coords.numpy(), coords[order])
    assert np.array_equal(bag.features.numpy(), features[order].astype(np.float16))


def test_tridents_own_file(tmp_path: Path):
    features, coords = _foreign()
    path = tmp_path / "20x_256px_0px_overlap" / "features_conch_v1" / "TCGA-AA-0001.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, chunks=(1, 6), maxshape=(None, 6))
        dataset = file.create_dataset("coords", data=coords.astype(np.int64), chunks=(1, 2), maxshape=(None, 2))
        dataset.attrs.update(
            {
                "patch_size": 256,
                "patch_size_level0": 512,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 0,
                "name": "TCGA-AA-0001",
                "savetodir": "/data",
                "level0_width": 9000,
                "level0_height": 8000,
            }
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bag = load_bag(path)
    _assert_rows(bag, features, coords)
    assert (bag.patch_size, bag.mpp, bag.slide_mpp, bag.encoder) == (512, 0.5, 0.25, "conch")
    assert bag.slide_size == (9000, 8000)
    assert "TCGA" not in bag.slide
    check_bag(bag, "conch", 6)


def test_clams_files(tmp_path: Path):
    features, coords = _foreign()
    (tmp_path / "h5_files").mkdir()
    (tmp_path / "pt_files").mkdir()
    with h5py.File(tmp_path / "h5_files" / "a.h5", "w") as file:
        file["features"] = features
        file["coords"] = coords.astype(np.int32)
    torch.save(torch.from_numpy(features), tmp_path / "pt_files" / "a.pt")
    for path in (tmp_path / "h5_files" / "a.h5", tmp_path / "pt_files" / "a.pt"):
        with pytest.warns(UserWarning, match="512 level-0 px is the step"):
            bag = load_bag(path, encoder="uni")
        _assert_rows(bag, features, coords)
        assert (bag.patch_size, bag.mpp, bag.encoder) == (512, None, "uni")
    torch.save(torch.from_numpy(features), tmp_path / "alone.pt")
    with pytest.warns(UserWarning, match="holds no coordinates"):
        alone = load_bag(tmp_path / "alone.pt")
    assert alone.encoder == "unknown"
    assert np.array_equal(alone.features.numpy(), features.astype(np.float16))  # file order
    assert len(alone.coords.unique(dim=0)) == 12


def test_clams_patch_level(tmp_path: Path):
    features, coords = _foreign(step=1024)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = features
        file["coords"] = coords
        file["coords"].attrs.update({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)})
    assert load_bag(tmp_path / "a.h5").patch_size == 1024


def test_atlaspatch_file(tmp_path: Path):
    features, coords = _foreign()
    wide = np.concatenate([coords, np.full((12, 2), 512), np.zeros((12, 1))], axis=1).astype(np.int32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = wide
        file["passports"] = np.array([b"x"] * 12)
        file["features/uni_v2"] = features
        file.attrs.update(
            {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}
        )
    bag = load_bag(tmp_path / "a.h5")
    _assert_rows(bag, features, coords)
    assert (bag.patch_size, bag.mpp, bag.encoder) == (512, 0.5, "uni2")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["features/conch_v1"] = features[:, :3]
    with pytest.raises(ValueError, match="conch_v1, uni_v2; pass encoder="):
        load_bag(tmp_path / "a.h5")
    assert load_bag(tmp_path / "a.h5", encoder="conch").features.shape == (12, 3)
    assert load_bag(tmp_path / "a.h5", encoder="uni_v2").encoder == "uni2"
    with pytest.raises(ValueError, match="none is gigapath"):
        load_bag(tmp_path / "a.h5", encoder="gigapath")


def test_stamp_file(tmp_path: Path):
    features, coords = _foreign(step=1)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"] = features.astype(np.float16)
        file["coords"] = coords * 256.0  # um
        file.attrs.update(
            {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "mahmood-uni2", "feat_type": "tile"}
        )
    bag = load_bag(tmp_path / "a.h5", slide_mpp=0.25)
    _assert_rows(bag, features.astype(np.float16), coords * 1024)
    assert (bag.patch_size, bag.slide_mpp, bag.encoder) == (1024, 0.25, "uni2")
    assert bag.mpp == pytest.approx(256 / 224)
    with pytest.warns(UserWarning, match="Pass slide_mpp="):
        unknown = load_bag(tmp_path / "a.h5")
    _assert_rows(unknown, features.astype(np.float16), coords * 224)
    assert unknown.patch_size == 224
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["feat_type"] = "slide"
    with pytest.raises(ValueError, match="not those of patches"):
        load_bag(tmp_path / "a.h5")


def test_stamp_file_of_version_1(tmp_path: Path):
    features, coords = _foreign(step=224)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"] = features
        file["coords"] = coords
        file.attrs["extractor"] = "ctranspath"
    bag = load_bag(tmp_path / "a.h5", slide_mpp=0.5)
    _assert_rows(bag, features, coords // 224 * 512)
    assert (bag.patch_size, bag.encoder) == (512, "ctranspath")


def test_the_shared_feature_file(shared_data: Path):
    """Foreign layout `feats`, no attributes: the step of the coordinates (512 level-0 px) is the patch size."""
    with pytest.warns(UserWarning, match="512 level-0 px"):
        bag = load_bag(shared_data / "features" / "TCGA-AD-6964-01Z-00-DX1.h5")
    assert bag.features.shape == (777, 512)
    assert (bag.patch_size, bag.mpp, bag.encoder) == (512, None, "unknown")
    assert (bag.coords % 512 == 0).all()
    assert "TCGA" not in bag.slide
    check_bag(bag, "conch", 512)
    with pytest.raises(ValueError, match="dimension 512"):
        check_bag(bag, "efficientnet-lite0", 1280)


def _write_csv(path: Path, features: np.ndarray, header: list[str] | None, before=(), after=()) -> None:
    lines = [",".join(header)] if header else []
    for index, row in enumerate(features):
        cells = [str(column[index]) for column in before] + [repr(float(value)) for value in row]
        lines.append(",".join(cells + [str(column[index]) for column in after]))
    path.write_text("\n".join(lines) + "\n")


def test_slidechat_csv(tmp_path: Path):
    features, coords = _foreign(dim=512)
    names = [f"{x}_{y}.png" for x, y in coords]
    path = tmp_path / "a.csv"
    numbers = [str(i) for i in range(512)]
    for header, after in (
        (None, ()),
        (numbers, ()),
        ([f"feature_{i}" for i in range(512)], ()),
        (None, (names,)),
        ([*numbers, "patch"], (names,)),
        (None, ([f"TCGA-AA_x{x}_y{y}" for x, y in coords],)),
    ):
        _write_csv(path, features, header, after=after)
        with pytest.warns(UserWarning, match=r"512 level-0 px|no coordinates"):
            bag = load_bag(path, encoder="conch")
        if after:
            _assert_rows(bag, features, coords)
            assert bag.patch_size == 512
        else:
            assert np.array_equal(bag.features.numpy(), features.astype(np.float16))
            assert "no coordinates" in bag.note
        assert bag.encoder == "conch"


def test_slidechat_csv_with_more_columns(tmp_path: Path):
    """More than 513 columns: two lead, then 512 of feature (columns 2 up to 514)."""
    features, coords = _foreign(dim=512)
    names = [f"{x}_{y}.png" for x, y in coords]
    _write_csv(tmp_path / "a.csv", features, None, before=(range(12), names))
    with pytest.warns(UserWarning, match="512 level-0 px"):
        _assert_rows(load_bag(tmp_path / "a.csv"), features, coords)
    _write_csv(tmp_path / "a.csv", features, None, before=(range(12), [7] * 12))
    with pytest.warns(UserWarning, match="no coordinates"):
        bag = load_bag(tmp_path / "a.csv")
    assert np.array_equal(bag.features.numpy(), features.astype(np.float16))


@pytest.mark.parametrize(
    "names",
    [
        ["patch"] * 12,  # no numbers
        ["1_1.png"] * 12,  # one place for all
        [f"{i}_{i}_{i}.png" for i in range(12)],  # which two?
        [f"{i}_0.png" for i in range(11)] + ["last.png"],  # not every one
    ],
)
def test_ambiguous_patch_names_are_no_coordinates(tmp_path: Path, names: list[str]):
    features, _ = _foreign(dim=512)
    _write_csv(tmp_path / "a.csv", features, None, after=(names,))
    with pytest.warns(UserWarning, match="no coordinates"):
        load_bag(tmp_path / "a.csv")


def test_bad_csv(tmp_path: Path):
    features, _ = _foreign(dim=512)
    path = tmp_path / "a.csv"
    _write_csv(path, features[:, :300], None)
    with pytest.raises(ValueError, match="has 300 columns"):
        load_bag(path)
    _write_csv(path, features, None)
    path.write_text(path.read_text()[:-3000])  # the last row broke off
    with pytest.raises(ValueError, match="does not hold 512 numbers"):
        load_bag(path)
    _write_csv(path, features[:0], [str(i) for i in range(512)])
    with pytest.raises(ValueError, match="no rows"):
        load_bag(path)
    features[4, 5] = np.nan
    _write_csv(path, features, None)
    with pytest.raises(ValueError, match=r"1 of 12 patches .* NaN"):
        load_bag(path)


def test_npy(tmp_path: Path):
    features, _ = _foreign()
    np.save(tmp_path / "a.npy", features)
    with pytest.warns(UserWarning, match="no coordinates"):
        assert np.array_equal(load_bag(tmp_path / "a.npy").features.numpy(), features.astype(np.float16))
    # Pickles written here on purpose: that they are refused unless vouched for is what is tested.
    np.save(tmp_path / "b.npy", {"feature": features}, allow_pickle=True)  # type: ignore[arg-type]  # SlideChat's form
    with pytest.raises(ValueError, match=r"can run code.*allow_pickle=True"):  # refused unless the caller asks for it
        load_bag(tmp_path / "b.npy")
    with pytest.warns(UserWarning, match="no coordinates"):
        vouched = load_bag(tmp_path / "b.npy", allow_pickle=True)  # written three lines above, so it may be loaded
    assert vouched.features.shape == features.shape


# ---- refusals


class Bomb:
    """Opens a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_never_run(tmp_path: Path):
    torch.save({"features": Bomb(tmp_path / "exploded")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
    # Pickled on purpose: if load_bag unpickled it, the bomb would leave its mark.
    bomb = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    np.save(tmp_path / "c.npy", bomb, allow_pickle=True)  # numpy writes objects in no other way
    for name in ("a.pt", "b.pt", "c.npy"):
        with pytest.raises(ValueError, match=r"never loaded|can run code"):
            load_bag(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_no_bags(bag: Bag, tmp_path: Path):
    save_bag(bag, tmp_path / "a.safetensors")
    write_trident_h5(bag, tmp_path / "a.h5")
    torch.save(bag.features, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", bag.features.numpy())
    for name in ("a.safetensors", "a.h5", "a.pt", "a.npy"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) - 40])
        with pytest.raises(ValueError, match=rf"{name}.*(broken|truncated|cannot be read)"):
            load_bag(tmp_path / name)
    (tmp_path / "empty.h5").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_bag(tmp_path / "empty.h5")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(ValueError, match="no feature file known here"):
        load_bag(tmp_path / "picture.png")
    for missing in (tmp_path / "nowhere.h5", tmp_path):
        with pytest.raises(ValueError, match="is not a file"):
            load_bag(missing)


def test_h5_files_whose_data_lie_elsewhere_are_refused(tmp_path: Path):
    with h5py.File(tmp_path / "private.h5", "w") as file:
        file["features"], file["coords"] = np.ones((4, 8), np.float32), np.zeros((4, 2), np.int32)
    np.ones((4, 8), np.float32).tofile(tmp_path / "private.bin")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(tmp_path / "private.h5"), "/features")
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file["all"] = h5py.ExternalLink(str(tmp_path / "private.h5"), "/")
        file["features"] = h5py.SoftLink("/all/features")
    with h5py.File(tmp_path / "coords.h5", "w") as file:
        file["features"] = np.ones((4, 8), np.float32)
        file["coords"] = h5py.ExternalLink(str(tmp_path / "private.h5"), "/coords")
    with h5py.File(tmp_path / "storage.h5", "w") as file:
        file.create_dataset("features", (4, 8), np.float32, external=[(str(tmp_path / "private.bin"), 0, 128)])
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((4, 8), np.float32)
        layout[:] = h5py.VirtualSource(str(tmp_path / "private.h5"), "features", (4, 8))
        file.create_virtual_dataset("features", layout)
    for name in ("link", "links", "coords", "storage", "virtual"):
        with pytest.raises(ValueError, match=f"{name}.h5 refers to another file"):
            load_bag(tmp_path / f"{name}.h5", encoder="conch", slide_mpp=0.5)


def test_h5_files_that_do_not_fit(tmp_path: Path):
    features, coords = _foreign()
    path = tmp_path / "a.h5"

    def write(**data) -> None:
        with h5py.File(path, "w") as file:
            for key, value in data.items():
                file[key] = value

    write(features=features, coords=coords[:7])
    with pytest.raises(ValueError, match="12 features but coords of shape"):
        load_bag(path)
    write(coords=coords)
    with pytest.raises(ValueError, match="no data set `features` or `feats`, only: coords"):
        load_bag(path)
    write(features=features[0], coords=coords)
    with pytest.raises(ValueError, match="one vector of 6 numbers"):
        load_bag(path)
    write(features=features.astype(np.int32), coords=coords)
    with pytest.raises(ValueError, match="floating-point"):
        load_bag(path)
    write(features=features, coords=coords * np.nan)
    with pytest.raises(ValueError, match="no pixel positions"):
        load_bag(path)
    write(features=features[None], coords=coords[None])  # a batch of one slide
    with pytest.warns(UserWarning, match="512"):
        _assert_rows(load_bag(path), features, coords)
    features[2] = np.inf
    write(features=features, coords=coords)
    with pytest.raises(ValueError, match=r"a\.h5: 1 of 12 patches"):
        load_bag(path)
