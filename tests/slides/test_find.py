"""One rule what a slide is, by content: nothing that can be opened is missed, no companion is taken for a slide."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from benchmarks.inputs import make_mrxs, make_vms
from sparsewsi.slides.find import find_slides_in, is_slide, slide_stem, sort_files
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import open_slide

PX = np.full((64, 64, 3), 200, np.uint8)


def tiff(path: Path, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, PX, photometric="rgb", tile=(64, 64), metadata=None, **how)
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PX).save(path, format="PNG" if path.suffix == ".png" else "JPEG")
    return path


def dicom(path: Path, series: str = "1.2.3") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    uid = series.encode() + b"\0" * (len(series) % 2)
    path.write_bytes(bytes(128) + b"DICM" + b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little") + uid + bytes(99))
    return path


def found(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_slides_in(folder).slides]


def left_out(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path, _ in find_slides_in(folder).left_out)


@pytest.mark.parametrize("name", ["a.tif", "b.TIFF", "c.btf", "d.qptiff", "e", "f.dat", "g.0001", "h.img"])
def test_what_can_be_opened_is_found_whatever_it_is_called(tmp_path, name):
    path = tiff(tmp_path / name, bigtiff="btf" in name)
    open_slide(path).close()
    assert is_slide(path)
    assert found(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.isyntax", "b.i2syntax", "c.VSI", "d.kfb", "e.sdpc", "f.mds"])
def test_slides_of_scanners_that_are_not_read_are_refused_and_not_missed(tmp_path, name):
    tiff(tmp_path / name) if name == "c.VSI" else (tmp_path / name).write_text("<DataObject ObjectType='DPUfsImport'>")
    assert found(tmp_path) == [name]
    with pytest.raises(SlideError, match=r"does not read|label and an overview"):
        open_slide(tmp_path / name)


FOLDERS = ["thumbnails", "masks", "Labels", "job/contours", "results/stitches", "x/20x_256px/visualization", "macro/y"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_pictures_in_folders_of_companions_are_left_out_and_slides_are_not(tmp_path, folder):
    picture(tmp_path / folder / "case1.jpg"), tiff(tmp_path / folder / "case1.tif"), tiff(tmp_path / "case1.svs")
    tiff(tmp_path / folder / "case2.svs")
    assert sorted(found(tmp_path)) == sorted(["case1.svs", f"{folder}/case2.svs"])
    assert left_out(tmp_path) == sorted([f"{folder}/case1.jpg", f"{folder}/case1.tif"])
    assert found(tmp_path / folder.split("/")[0])  # whoever names the folder means it


def test_pictures_of_our_own_reports_are_no_slides(tmp_path):
    picture(tmp_path / "out" / "slide-1" / "overlay.png")
    (tmp_path / "out" / "slide-1" / "selection.json").write_text("{}")
    assert found(tmp_path) == []
    assert left_out(tmp_path) == ["out/slide-1/overlay.png"]


@pytest.mark.parametrize("name", ["a.svs.part", "a.svs.crdownload", "a.svs~", "~$a.svs", "a.svs.BAK", "a.tif.tmp"])
def test_unfinished_downloads_and_copies_kept_aside_are_left_out(tmp_path, name):
    tiff(tmp_path / name), tiff(tmp_path / "a.tif")
    assert (found(tmp_path), left_out(tmp_path)) == (["a.tif"], [name])


@pytest.mark.parametrize("name", ["empty.svs", "text.ndpi", "pointer.tiff", "half.mrxs", "x.scn"])
def test_what_is_meant_as_a_slide_is_found_to_be_refused_in_words(tmp_path, name):
    (tmp_path / name).write_bytes(b"" if "empty" in name else b"version https://git-lfs.github.com/spec/v1\n")
    assert found(tmp_path) == [name]
    with pytest.raises(SlideError):
        open_slide(tmp_path / name)


@pytest.mark.parametrize("name", ["a.h5", "b.safetensors", "c.csv", "d.json", "e.xml", "f.txt", "g.zip", "h.npy"])
def test_what_is_no_slide_is_not_found(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n" if name == "a.h5" else b"[1, 2]\n" * 40)
    assert not is_slide(tmp_path / name)
    assert found(tmp_path) == left_out(tmp_path) == []


@pytest.mark.parametrize("names", [["a.dcm"], ["1.2.840.1", "1.2.840.2"], ["IM1", "IM2"], ["x.DCM", "DICOMDIR"]])
def test_a_dicom_slide_is_its_folder_whatever_its_files_are_called(tmp_path, names):
    for name in names:
        dicom(tmp_path / "PA1" / "SE1" / name, "" if name == "DICOMDIR" else "1.2.3")
    assert found(tmp_path) == ["PA1/SE1"]
    assert is_slide(tmp_path / "PA1/SE1")


def test_several_dicom_slides_of_one_folder_are_found_each(tmp_path):
    for i in range(6):
        dicom(tmp_path / f"1.2.840.{i}", f"1.2.{i % 3}")
    dicom(tmp_path / "DICOMDIR", "")
    assert found(tmp_path) == ["1.2.840.0", "1.2.840.1", "1.2.840.2"]
    assert len({slide_stem(name) for name in found(tmp_path)}) == 3


@pytest.mark.parametrize(
    "companion",
    [
        "case1.png",
        "case1_macro.jpg",
        "case1 label.png",
        "case1.svs.jpg",
        "case1-thumbnail.jpeg",
        "case1_1.png",
        "case1_mask.tif",
        "case1_label.tiff",
        "case1.thumb.tif",
        "label.jpg",
        "slide_overview.png",
    ],
)
def test_a_companion_of_a_slide_is_left_out_and_told(tmp_path, companion):
    tiff(tmp_path / "case1.svs")
    tiff(tmp_path / companion) if "tif" in companion else picture(tmp_path / companion)
    assert found(tmp_path) == ["case1.svs"]
    assert left_out(tmp_path) == [companion]


@pytest.mark.parametrize("companion", ["macro.tif", "label.TIFF", "case9_macro.tif", "S-12 label.tif", "x.mask.tiff"])
def test_a_tiff_called_a_macro_label_or_mask_is_left_out_wherever_its_slide_is(tmp_path, companion):
    tiff(tmp_path / companion)
    tiff(tmp_path / "case1.svs")
    assert found(tmp_path) == ["case1.svs"]
    assert left_out(tmp_path) == [companion]


@pytest.mark.parametrize("other", ["case10.svs", "case1b.tif", "case1_2.svs", "case2.png", "mapping.tif"])
def test_another_slide_of_a_like_name_is_found(tmp_path, other):
    tiff(tmp_path / "case1.svs")
    picture(tmp_path / other) if "png" in other else tiff(tmp_path / other)
    assert found(tmp_path) == sorted(["case1.svs", other])


@pytest.mark.parametrize("folder", ["@eaDir/case1.svs", ".@__thumb", "#recycle", "$RECYCLE.BIN/S-1", ".hidden"])
def test_what_a_file_server_keeps_is_no_slide(tmp_path, folder):
    tiff(tmp_path / "case1.svs")
    picture(tmp_path / folder / "SYNOPHOTO_THUMB_XL.jpg")
    tiff(tmp_path / folder / "case1.svs")
    (tmp_path / "._case1.svs").write_bytes(b"\0\x05\x16\x07")
    assert found(tmp_path) == ["case1.svs"]


def test_the_parts_of_a_vms_slide_are_left_out_by_what_it_lists(tmp_path):
    parts = ["image-0.jpg", "map2.jpg", "odd name.jpg", "macro.jpg", "o.opt"]
    text = "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
    text += "".join(f"Key{i}={name}\n" for i, name in enumerate(parts))
    (tmp_path / "x.vms").write_text(text)
    for name in parts:
        picture(tmp_path / name)
    assert found(tmp_path) == ["x.vms"]
    assert left_out(tmp_path) == sorted(set(parts))


def test_the_data_folder_of_an_mrxs_slide_is_no_slide(tmp_path):
    picture(tmp_path / "a.jpg").rename(tmp_path / "a.mrxs")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "Slidedat.ini").write_text("[GENERAL]")
        picture(tmp_path / folder / "Data0000.jpg")
    assert found(tmp_path) == ["a.mrxs"]
    assert left_out(tmp_path) == ["b"]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(("files", "name"), [(make_mrxs(), "a.mrxs"), (make_vms(), "a.vms")])
def test_of_a_slide_of_several_files_that_which_opens_it_is_found(tmp_path, files, name):
    write(tmp_path / "case", files)
    assert found(tmp_path) == [f"case/{name}"]
    with open_slide(tmp_path / "case" / name) as slide:
        assert slide.size == (512, 512)
    listed = sort_files(path for path in (tmp_path / "case").rglob("*") if path.is_file())
    assert [path.name for path in listed.slides] == [name]
    assert len(listed.left_out) == len(files) - 1


@pytest.mark.parametrize("beside", [[], ["a.jpg"], ["a.svs"]])
def test_a_deep_zoom_image_is_its_dzi_and_its_tiles_are_none(tmp_path, beside):
    text = '<Image TileSize="254" Overlap="1" Format="jpeg"><Size Width="64" Height="64"/></Image>'
    (tmp_path / "b.dzi").write_text(text)
    for level in range(3):
        picture(tmp_path / "b_files" / str(level) / "0_0.jpeg")
        picture(tmp_path / "lost_files" / str(level) / "0_0.jpeg")
    for name in beside:
        tiff(tmp_path / name) if "svs" in name else picture(tmp_path / name)
    assert found(tmp_path) == sorted([*beside, "b.dzi"])
    assert left_out(tmp_path) == ["lost_files"]


def test_formats_that_begin_as_other_files_do_are_told_apart_by_what_they_hold(tmp_path):
    vms, sakura = b"[Virtual Microscope Specimen]\nNoLayers=1\n", b"SQLite format 3\0" + bytes(90)
    (tmp_path / "1").write_bytes(vms)
    (tmp_path / "2").write_bytes(sakura + b"CREATE TABLE SVSlideDataXPO (OID)")
    (tmp_path / "3").write_bytes(b"ZISRAWFILE" + bytes(99))
    (tmp_path / "4").write_bytes(sakura + b"CREATE TABLE notes (text)")
    (tmp_path / "5.json").write_text("[1, 2]")
    assert found(tmp_path) == ["1", "2", "3"]


def test_of_files_that_a_pattern_names_companions_and_others_are_left_out(tmp_path):
    tiff(tmp_path / "case1.svs")
    tiff(tmp_path / "case2.tif")
    picture(tmp_path / "case1_macro.jpg")
    (tmp_path / "notes.txt").write_text("x")
    for i in range(3):
        dicom(tmp_path / "case3" / f"{i}.dcm")
    named = [path for path in tmp_path.rglob("*") if path.is_file()]
    listed = sort_files(named)
    assert [path.name for path in listed.slides] == ["case1.svs", "case2.tif", "case3"]
    assert sorted(path.name for path, _ in listed.left_out) == ["case1_macro.jpg", "notes.txt"]


def test_pictures_alone_are_slides(tmp_path):
    for name in ("1.png", "2.jpg", "x/3.jpeg", "thumbnail.png"):
        picture(tmp_path / name)
    assert found(tmp_path) == ["1.png", "2.jpg", "x/3.jpeg"]
    assert left_out(tmp_path) == ["thumbnail.png"]


def test_a_slide_that_cannot_be_read_is_found_by_its_name(tmp_path, monkeypatch):
    tiff(tmp_path / "a.svs")
    tiff(tmp_path / "b.tif")

    def deny(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", deny)
    assert found(tmp_path) == ["a.svs", "b.tif"]


def test_links_that_lead_in_a_circle_end(tmp_path):
    tiff(tmp_path / "x" / "a.svs")
    (tmp_path / "x" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert found(tmp_path) == ["x/a.svs"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [("x/a.svs", "a"), ("a.ome.tif", "a.ome"), ("1.2.840.1", "1.2.840.1"), ("s4", "s4")],
)
def test_the_stem_keeps_what_is_no_ending_of_a_slide(name, stem):
    assert slide_stem(name) == stem
