"""Feature files of other tools are read as they are; what is no bag is refused in words."""

import pickle
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag, check_bag, save_bag
from sparsewsi.bags.foreign import load_bag, write_trident_h5


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


def test_trident_round_trip(bag: Bag, tmp_path: Path, assert_same):
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


def test_trident_file_without_resolution_is_clams(bag: Bag, tmp_path: Path, assert_same):
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


@pytest.mark.parametrize("row", [0, 3, 7, 9])
@pytest.mark.parametrize("where", ["before the name", "before the numbers", "in the name"])
def test_a_quotation_mark_that_is_not_closed_costs_no_patch_in_silence(tmp_path: Path, row: int, where: str):
    rng = np.random.default_rng(0)
    lines = [",".join(f"{v:.3f}" for v in rng.normal(size=512)) + f",{224 * i}_0.png" for i in range(10)]
    name = f",{224 * row}_0.png"
    broken = {
        "before the name": lines[row].replace(name, f',"{name[1:]}'),
        "before the numbers": f'"{lines[row]}',
        "in the name": lines[row].replace(name, f',"{name[1:4]}"{name[4:]}'),
    }
    lines[row] = broken[where]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"a\.csv"):
        load_bag(tmp_path / "a.csv")


@pytest.mark.parametrize("far", [2**31 - 1, 2**31 - 200, -(2**31), 2**33])
@pytest.mark.parametrize("kind", ["h5", "npz", "csv"])
def test_coords_at_the_end_of_32_bits_are_refused_when_they_are_read(tmp_path: Path, far: int, kind: str):
    features, coords = np.ones((3, 512), np.float32), np.array([[0, 0], [224, 0], [far, 224]], np.int64)
    path = tmp_path / f"a.{kind}"
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = features, coords
            file["coords"].attrs["patch_size_level0"] = 224
    elif kind == "npz":
        np.savez(path, features=features, coords=coords)
    else:
        rows = [",".join(["1"] * 512) + f",x{x}_y{y}.png" for x, y in coords.tolist()]
        path.write_text("\n".join(rows) + "\n")
    if kind == "csv" and far < 0:
        return  # a name with a sign is no position
    with pytest.raises(ValueError, match="32 bits"):
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
        with pytest.raises(ValueError, match=rf"{name}.*(broken|truncated|cut short)"):
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


@pytest.mark.parametrize("name", [b"\xff\xfe", b"f\xe9atures", b"\x80"])
def test_names_of_data_sets_that_are_no_text_are_told_all_the_same(tmp_path: Path, name: bytes):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset(name, data=np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="no data set `features`"):
        load_bag(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["coords"] = np.zeros((3, 2), np.int64)
        file.create_group("features").create_dataset(name, data=np.ones((3, 4), np.float32))
    with pytest.warns(UserWarning, match="patch size"):
        assert isinstance(load_bag(tmp_path / "b.h5").encoder, str)


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


# ---- files that are good, but cannot be read as they are


def write_h5(path: Path, features: np.ndarray, **how: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, **how)
        file["coords"] = np.stack([np.arange(len(features)) * 224, np.zeros(len(features))], 1).astype("i8")
    return path


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            BlockingIOError(11, "Unable to synchronously open file (unable to lock file, errno = 11)"),
            "open for writing",
        ),
        (OSError("file is already open for SWMR write (may use <h5clear file>)"), "h5clear"),
        (OSError("required filter 'lz4' is not registered"), "filter"),
        (OSError("can't open directory (/usr/local/lib/plugin). Please verify its existence"), "filter"),
        (PermissionError(13, "Permission denied"), "permission"),
    ],
)
def test_only_a_broken_file_is_to_be_made_again(tmp_path: Path, monkeypatch, error: OSError, words: str):
    path = write_h5(tmp_path / "a.h5", np.ones((4, 8), "f4"))

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(ValueError, match=words) as caught:
        load_bag(path)
    assert "Make it again" not in str(caught.value)


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">f8", "<f4"])
@pytest.mark.parametrize("kind", ["h5", "npy", "npz"])
@pytest.mark.filterwarnings("ignore")
def test_the_byte_order_and_the_container_do_not_matter(tmp_path: Path, dtype: str, kind: str):
    features = np.arange(24, dtype=dtype).reshape(3, 8)
    path = tmp_path / f"a.{kind}"
    if kind == "h5":
        write_h5(path, features)
    elif kind == "npy":
        np.save(path, features)
    else:
        np.savez(path, features=features, coords=np.array([[0, 0], [224, 0], [448, 0]]))
    assert load_bag(path).features.tolist() == features.tolist()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        (b"BZh9" + bytes(50), "bzip2"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_packed_file_or_a_pointer_is_called_one(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_bag(tmp_path / "a.h5")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunks", [None, (1, 64), (7, 64), (40, 3)])
def test_features_are_read_in_parts_whatever_their_chunks(tmp_path: Path, chunks: tuple[int, int] | None):
    features = np.random.default_rng(0).normal(size=(40, 64)).astype("f4")
    read = load_bag(write_h5(tmp_path / "a.h5", features, chunks=chunks))
    assert torch.equal(read.features, torch.from_numpy(features).half())


def test_a_file_that_promises_more_than_it_holds_is_refused(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (1_000_000, 1024), "f4", chunks=(1, 1024))
        file["coords"] = np.zeros((3, 2), "i8")
    with pytest.raises(ValueError, match="hardly any data"):
        load_bag(tmp_path / "a.h5")


@pytest.mark.parametrize("far", [2**31 - 1, 2**31 - 100, 2**31])
def test_patches_beyond_32_bits_are_refused_before_anything_is_asked(bag: Bag, far: int):
    with pytest.raises(ValueError, match="32 bits"):
        replace(bag, coords=torch.full((len(bag.coords), 2), far, dtype=torch.int64), patch_size=224)


@pytest.mark.parametrize(
    "header", ["{'descr': ('<f4', 'fortran_order': False", "{'descr': 3, 'shape': (1, 1)}", "(", ""]
)
def test_an_npy_whose_header_is_damaged_is_a_sentence(tmp_path, header):
    text = header.encode().ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(64))
    with pytest.raises(ValueError, match="broken npy file"):
        load_bag(tmp_path / "a.npy")


# ---- what other programs leave behind


def made(path: Path, features: Any, coords: Any, **facts: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, coords
        file["coords"].attrs.update(facts)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, c: (f, np.column_stack([c[:, 0] * 0, c])), "which two are x and y"),
        (lambda f, c: (f.T, c), "(D, N)"),
        (lambda f, c: (np.float32(1), c), "single value"),
    ],
)
def test_what_is_no_place_or_no_feature_is_not_taken_for_one(tmp_path: Path, change, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_bag(made(tmp_path / "a.h5", *change(*_foreign())))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, c: (f, c // 512), "count patches"),
        (lambda f, c: (f, c / c.max()), "a px or less apart"),
        (lambda f, c: (f, c * 0 + 7), "all the same"),
        (lambda f, c: (np.where(np.arange(12)[:, None] < 3, 0, f), c), "3 of 12 patches are all zero"),
    ],
)
def test_doubtful_places_and_features_are_told(tmp_path: Path, change, words: str):
    with pytest.warns(UserWarning, match=words):
        assert words in load_bag(made(tmp_path / "a.h5", *change(*_foreign()), patch_size_level0=512)).note


@pytest.mark.parametrize("facts", [{}, {"patch_size": -256}, {"patch_size_level0": 0, "patch_level": 0}])
@pytest.mark.parametrize("offset", [(131, 59), (1, 0), (300, 511)])
def test_grids_that_do_not_fit_each_other_have_one_step(tmp_path: Path, facts, offset):
    features, coords = _foreign()
    coords[6:] += offset  # CLAM lays a grid over each contour
    with pytest.warns(UserWarning, match="512 level-0 px is the step"):
        assert load_bag(made(tmp_path / "a.h5", features, coords, **facts)).patch_size == 512


@pytest.mark.parametrize(
    ("facts", "mpp"), [({"target_magnification": "20x"}, 0.5), ({"target_magnification": 20_000}, None), ({}, None)]
)
def test_a_magnification_is_one_that_slides_have(tmp_path: Path, facts, mpp):
    bag = load_bag(made(tmp_path / "a.h5", *_foreign(), patch_size_level0=512, level0_magnification=-1, **facts))
    assert (bag.mpp, bag.slide_mpp) == (mpp, None)


def test_coordinates_under_another_name_are_told(tmp_path: Path):
    features, coords = _foreign()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["locations"] = features, coords
    with pytest.warns(UserWarning, match="`coords`; the file holds locations"):
        load_bag(tmp_path / "a.h5")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_called_one(tmp_path: Path, protocol: int):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"features": np.ones((3, 4))}, protocol=protocol))
    with pytest.raises(ValueError, match="Pickled objects are never loaded"):
        load_bag(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(3, 4, dtype=torch.int8), "floating-point"),
        (torch.ones(3, 4, dtype=torch.complex64), "floating-point"),
        (torch.ones(3, 4, device="meta"), "empty (meta)"),
        ({"features": torch.ones(3, 4), "coords": [[0, 0], [1]]}, "no tensor (N, 2)"),
    ],
)
def test_tensors_that_are_no_features_are_a_sentence(tmp_path: Path, value, words: str):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=re.escape(words)):
        load_bag(tmp_path / "a.pt")


def test_a_zip_that_is_cut_short_or_holds_something_else_is_no_pickle(tmp_path: Path):
    torch.save(torch.ones(30, 40), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        load_bag(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.h5", b"x")
    with pytest.raises(ValueError, match="Unpack it"):
        load_bag(tmp_path / "b.zip")
    np.savez(tmp_path / "c.npz", features=np.array([None], object))
    with pytest.raises(ValueError, match=r"c\.npz holds pickled"):
        load_bag(tmp_path / "c.npz")


def test_a_type_that_torch_lacks_is_read(tmp_path: Path):
    features, _ = _foreign()
    np.save(tmp_path / "a.npy", features.astype(np.longdouble))
    with pytest.warns(UserWarning, match="no coordinates"):
        assert np.array_equal(load_bag(tmp_path / "a.npy").features.numpy(), features.astype(np.float16))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((range(12),), (), "a column of numbers besides"),
        ((), ([1] * 12,), "a column of numbers besides"),
        ((), [range(1, 13)] * 512, "more columns of numbers"),
    ],
)
def test_columns_of_a_csv_are_not_taken_for_their_neighbours(tmp_path: Path, before, after, words: str):
    _write_csv(tmp_path / "a.csv", _foreign(dim=512)[0], None, before=before, after=after)
    with pytest.raises(ValueError, match=words):
        load_bag(tmp_path / "a.csv")


def test_a_csv_may_have_pandas_index_or_x_and_y(tmp_path: Path):
    features, coords = _foreign(dim=512)
    names = [f"{x}_{y}.png" for x, y in coords]
    header = ["", *map(str, range(512)), "name"]
    _write_csv(tmp_path / "a.csv", features, header, before=(range(12),), after=(names,))
    _write_csv(tmp_path / "b.csv", features, ["x", "Y", *(f"f{i}" for i in range(512))], before=tuple(coords.T))
    for name in ("a.csv", "b.csv"):
        with pytest.warns(UserWarning, match="512 level-0 px"):
            _assert_rows(load_bag(tmp_path / name), features, coords)


@pytest.mark.parametrize("kind", ["npy", "pt", "h5"])
@pytest.mark.parametrize(("rows", "columns"), [(512, 731), (1280, 77), (1536, 20_001)])
def test_features_without_coords_that_lie_on_their_side_are_refused(tmp_path: Path, kind: str, rows: int, columns: int):
    features = np.ones((rows, columns), np.float32)
    if kind == "npy":
        np.save(path := tmp_path / "a.npy", features)
    elif kind == "pt":
        torch.save(torch.from_numpy(features), path := tmp_path / "a.pt")
    else:
        with h5py.File(path := tmp_path / "a.h5", "w") as file:
            file["features"] = features
    with pytest.raises(ValueError, match=r"looks like \(D, N\)"):
        load_bag(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("rows", "columns"), [(512, 1280), (731, 512), (1000, 2048)])
def test_features_without_coords_that_lie_as_they_should_are_read(tmp_path: Path, rows: int, columns: int):
    np.save(tmp_path / "a.npy", np.ones((rows, columns), np.float32))
    assert load_bag(tmp_path / "a.npy").features.shape == (rows, columns)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, c: (f, c - 3 * 512), "lie beyond the slide"),
        (lambda f, c: (f, c * 4), "lie beyond the slide of 6000 x 3000 px"),
        (lambda f, c: (f, c[:, ::-1] + [0, 2000]), "x and y are exchanged"),
        (lambda f, c: (f, c // 2), "512 level-0 px wide, but 256 px apart"),
        (lambda f, c: (f, c * 2), "512 level-0 px wide, but 1024 px apart"),
        (lambda f, c: (f, c // 4), "512 level-0 px wide, but 128 px apart"),
        (lambda f, c: (np.concatenate([f, f]), np.concatenate([c, c])), "12 of 24 patches lie where another one does"),
        (lambda f, c: (np.concatenate([f, f[:3]]), np.concatenate([c, c[:3]])), "3 of 15 patches lie where another"),
        (lambda f, c: (np.repeat(f[:1], len(f), 0), c), "All patches have the same features"),
    ],
)
def test_places_and_features_that_one_slide_does_not_have_are_told(tmp_path: Path, change, words: str):
    facts = {"patch_size_level0": 512, "level0_width": 6000, "level0_height": 3000, "overlap": 0}
    with pytest.warns(UserWarning, match=words):
        assert words in load_bag(made(tmp_path / "a.h5", *change(*_foreign()), **facts)).note


@pytest.mark.parametrize("overlap", [64, 256, 500])
def test_patches_that_overlap_as_their_file_says_are_no_matter(tmp_path: Path, overlap: int):
    features, coords = _foreign()
    coords = coords // 512 * (512 - overlap)
    facts = {"patch_size_level0": 512, "overlap": overlap}
    assert load_bag(made(tmp_path / "a.h5", features, coords, **facts)).note == ""
