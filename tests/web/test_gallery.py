"""The gallery is data that a hosted page can offer: listed servers, licences, honest captions."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.slides.refusals import SlideError
from sparsewsi.web.desk import CaseSlide, Desk
from sparsewsi.web.gallery import GALLERY, find_sample, read_gallery


def test_there_are_a_dozen_slides_of_several_organs():
    samples = read_gallery()
    assert len(samples) >= 12
    assert len({sample.organ for sample in samples}) >= 8
    assert all(sample.licence in sample.caption and sample.diagnosis in sample.caption for sample in samples)


def test_a_caption_says_whether_the_model_was_trained_on_the_slide():
    by_seen = {sample.seen: sample.caption for sample in read_gallery()}
    assert "no test of this model" in by_seen[True]
    assert "not trained on" in by_seen[False]


def test_no_slide_that_is_kept_for_the_test_is_offered(shared_data: Path):
    import csv

    with (shared_data / "atlas_slides" / "slides.csv").open(encoding="utf-8") as file:
        rows = {f"{row['repo'].split('/')[1]}/{row['dzi']}": row for row in csv.DictReader(file)}
    for sample in read_gallery():
        row = rows[sample.address.removeprefix("https://images.patolojiatlasi.com/")]
        assert row["role"] != "test"
        assert sample.seen == (row["role"] == "train")
        assert sample.mpp == float(row["mpp_estimate"])
        assert row["organ"] == sample.organ
        assert row["diagnosis"].startswith(sample.diagnosis)


def test_a_sample_is_found_by_its_name_and_by_its_address():
    sample = read_gallery()[0]
    assert find_sample(sample.name) == find_sample(sample.address) == find_sample(Path(sample.address)) == sample
    assert find_sample("phantom") is None
    assert find_sample("/slides/a.svs") is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("https://images.patolojiatlasi.com/celiac", "https://evil.example/celiac", "may not ask"),
        (
            "https://images.patolojiatlasi.com/celiac",
            "https://images.patolojiatlasi.com@10.0.0.1/celiac",
            "may not ask",
        ),
        ('name = "celiac-disease"', 'name = "ganglioneuroma"', "twice"),
        ('name = "celiac-disease"\n', "", "has no name"),
        ("mpp = 0.5044", "mpp = 40.0", "no slide has"),
        ("mpp = 0.5044", 'mpp = "0.5"', "no float"),
        ('resolution = "published"', 'resolution = "guessed"', "guessed"),
        ('organ = "breast"', 'organ = " "', "organ"),
        ('organ = "breast"', 'organ = "breast"\nage = 50', "unknown"),
        ('organ = "breast"', 'organ = "breast', "not TOML"),
    ],
)
def test_a_gallery_that_no_page_could_offer_is_a_sentence(tmp_path: Path, old: str, new: str, said: str):
    text = GALLERY.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "gallery.toml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_gallery(tmp_path / "gallery.toml")


def test_features_of_a_gallery_slide_are_kept_in_the_cache(desk: Desk, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SPARSEWSI_CACHE", str(tmp_path))
    sample, config = read_gallery()[0], desk.config
    coords = torch.tensor([[224 * i, 0] for i in range(9)])
    bag = Bag(torch.randn(9, 1280), coords, 224, 0.5, config.encoder, "slide 0a1b2c3d")
    save_bag(bag, tmp_path / f"{sample.name}-{config.encoder}-{config.mpp:g}-{config.patch_size}.safetensors")
    with desk.jobs.run("somebody", "slide") as job:
        kept = desk._read_bag(CaseSlide("token", str(Path(sample.address)), sample.mpp), 0, job)
    assert torch.equal(kept.coords, bag.coords)


def test_a_hosted_desk_reads_from_listed_servers_alone(desk: Desk, tmp_path: Path):
    addresses = ["http://127.0.0.1:1/HE.dzi"]
    if importlib.util.find_spec("wsidicom"):  # without the extra nothing is asked of such servers
        addresses.append("dicomweb:http://127.0.0.1:1/x?study=1.2&series=1.3")
    for address in addresses:
        with pytest.raises(SlideError, match="not read from that server"):
            desk.open_slide(address, 0.5)
        with pytest.raises(SlideError, match=r"cannot be reached|extra"):
            Desk("none", tmp_path, allow_paths=True).open_slide(address, 0.5)
