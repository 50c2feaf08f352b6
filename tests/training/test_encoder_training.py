"""Training the H&E encoder: held-out slides stay out, a stopped run goes on as if it had not been."""

import csv
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sparsewsi.bags.efficientnet import imagenet_weights, load_efficientnet_lite0_he
from train import encoder
from train.encoder import Recipe, augment, blur, pictures, restain, run, slide_rows

RECIPE = Recipe(
    copies=2, of_a_slide=2, phantoms=1, frozen=14, steps=4, tiles_a_step=4, slides_a_step=2, patches_a_slide=2,
    phantoms_a_step=2, save_every=2,
)  # fmt: skip
COLUMNS = ("slide", "case", "role", "organ_group", "neoplasm", "malignant", "carcinoma_present")


def _picture(rng: np.random.Generator, side: int) -> Image.Image:
    small = Image.fromarray(rng.integers(60, 256, (8, 8, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders as those of the real data: tiles of two train slides and one test slide, patches of four slides."""
    rng = np.random.default_rng(0)
    tiles, slides = tmp_path_factory.mktemp("tiles"), tmp_path_factory.mktemp("slides")
    (tiles / "crc_tissue" / "TUM").mkdir(parents=True)
    _picture(rng, 150).save(tiles / "crc_tissue" / "TUM" / "kather2016__1.png")
    _picture(rng, 224).save(tiles / "crc_tissue" / "TUM" / "val7k-a__1.png")
    (tiles / "atlas").mkdir()
    with (tiles / "atlas" / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "label", "slide", "confidence"))
        for slide, kind in (("BS10-HE1", "adipose"), ("fat-necrosis", "adipose"), ("celiac-disease", "brunner_glands")):
            _picture(rng, 256).save(tiles / "atlas" / f"{slide}.jpeg")
            table.writerow((f"{slide}.jpeg", kind, slide, "high"))
    (slides / "patches").mkdir()
    with (slides / "slides.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for case, role, facts in (
            ("BS10", "train", ("colon", "yes", "no", "no")),
            ("BS16", "train", ("unclear", "yes", "yes", "unclear")),
            ("celiac-disease", "train", ("duodenum", "no", "no", "no")),  # its tiles are of the test split
            ("BS99", "test", ("liver", "yes", "yes", "yes")),
        ):
            table.writerow((f"{case}-HE", case, role, *facts))
            with zipfile.ZipFile(slides / "patches" / f"{case}-HE.zip", "w") as archive:
                for number in range(4):
                    buffer = io.BytesIO()
                    _picture(rng, 224).save(buffer, "JPEG")
                    archive.writestr(f"{number}_0.jpg", buffer.getvalue())
    return tiles, slides


@pytest.fixture(scope="module")
def whole(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an unbroken run."""
    return run(*data, RECIPE, tmp_path_factory.mktemp("whole"))


def test_held_out_slides_are_not_learned_from(data: tuple[Path, Path]):
    found = pictures(*data, most=2)
    assert {picture.source for picture in found} == {"crc-kather2016", "BS10-HE1", "fat-necrosis", "BS10", "BS16"}
    assert [row["case"] for row in slide_rows(data[1], "test")] == ["BS99"]


def test_held_out_slides_of_the_real_data_are_not_learned_from(shared_data: Path):
    tiles, slides = shared_data / "tiles", shared_data / "atlas_slides"
    if not slides.is_dir():
        pytest.skip("the slides of the atlas are not on this machine")
    learned = {picture.source for picture in pictures(tiles, slides, most=40)}
    with (slides / "slides.csv").open() as file:
        held_out = {row["case"] for row in csv.DictReader(file) if row["role"] != "train"}
    held_out |= {"breast-lobular-carcinoma", "celiac-disease", "hodgkin", "crc-nct100k", "crc-val7k-a"}
    assert len(learned) > 40
    assert not learned & held_out


def test_a_stopped_run_ends_as_an_unbroken_one(
    data: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop_at(where: int):
        written = []

        def append(path: Path, record: dict) -> None:
            written.append(record)
            if len(written) == where:
                raise KeyboardInterrupt

        return append

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "append_line", stop_at(4))  # after the state of step 2 was written
        with pytest.raises(KeyboardInterrupt):
            run(*data, RECIPE, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    unbroken, broken = load_file(whole), load_file(run(*data, RECIPE, tmp_path))
    assert unbroken.keys() == broken.keys()
    assert all(torch.equal(value, broken[name]) for name, value in unbroken.items())


def test_the_weights_are_an_encoder_that_differs_in_its_last_blocks(whole: Path):
    made = load_efficientnet_lite0_he(torch.device("cpu"), whole)
    assert torch.isfinite(made(np.zeros((1, 224, 224, 3), np.uint8))).all()
    before = {name: value.half() for name, value in imagenet_weights().items()}
    changed = {name for name, value in load_file(whole).items() if not torch.equal(value, before[name])}
    assert all(name.startswith(("_blocks.14.", "_blocks.15.", "_conv_head.", "_bn1.")) for name in changed)
    assert "_conv_head.weight" in changed


def test_a_run_of_another_recipe_is_left_alone(data: tuple[Path, Path], whole: Path):
    with pytest.raises(ValueError, match="another recipe"):
        run(*data, replace(RECIPE, rate=1e-3), whole.parent)


def test_restaining_keeps_glass_and_changes_tissue():
    x = torch.full((64, 3, 4, 4), 255.0)
    x[:, :, :2] = torch.tensor([180.0, 100.0, 170.0]).view(3, 1, 1)
    y = restain(x, torch.Generator().manual_seed(0))
    assert (y[:, :, 2:] > 180).all()
    assert y[:, :, 0, 0].std(0).min() > 15


def test_augmented_copies_differ_and_are_reproducible():
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(np.stack([np.asarray(_picture(rng, 256))] * 4))
    one, again = (augment(pixels, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.shape == (4, 224, 224, 3)
    assert one.dtype == torch.uint8
    assert torch.equal(one, again)
    assert not torch.equal(one[0], one[1])


def test_blurring_takes_contrast_and_keeps_the_mean():
    x = 255 * (torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    y = blur(x.clone(), torch.Generator().manual_seed(0))
    changed = (x != y).flatten(1).any(1)
    assert 4 < changed.sum() < 25
    assert (y[changed].std((2, 3)) < x[changed].std((2, 3))).all()
    assert (y.mean((2, 3)) - x.mean((2, 3))).abs().max() < 8
