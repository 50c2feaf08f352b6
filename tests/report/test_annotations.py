"""DICOM annotations of the kept patches, read back by highdicom, lie where the patches are on the slide."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag, join
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import hard_topk
from sparsewsi.phantom import write_phantom
from sparsewsi.report.annotations import can_annotate, read_source, write_annotations
from sparsewsi.slides.slide import open_slide

hd = pytest.importorskip("highdicom", reason="the extra [dicom] is not installed")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom as a folder of DICOM files."""
    wsidicomizer = pytest.importorskip("wsidicomizer", reason="wsidicomizer makes the DICOM files")
    folder = tmp_path_factory.mktemp("dicom")
    write_phantom(folder / "phantom.tiff", seed=5, size=1_200)
    logging.getLogger("wsidicomizer").setLevel(logging.ERROR)
    wsidicomizer.WsiDicomizer.convert(folder / "phantom.tiff", folder / "slide", tile_size=256, workers=1)
    return folder / "slide"


@pytest.fixture
def bag_of_slide() -> Bag:
    coords = torch.tensor([[0, 0], [224, 0], [448, 224], [672, 448], [896, 896]])
    return Bag(torch.zeros(5, 8), coords, 224, 0.5, "efficientnet-lite0", "slide 0a1b2c3d")


def test_rectangles_lie_on_the_px_of_the_slides_finest_level(tmp_path, slide, bag_of_slide):
    scores = torch.tensor([0.1, 2.0, -1.0, 3.0, 0.5])
    kept = Selection(hard_topk(scores, 3), scores, torch.zeros(3, 4), 5)
    write_annotations(tmp_path / "annotations.dcm", bag_of_slide, kept, slide, "demo")
    read = hd.ann.annread(tmp_path / "annotations.dcm")
    assert read.AnnotationCoordinateType == "2D"
    assert read.PixelOriginInterpretation == "VOLUME"
    group = read.get_annotation_group(number=1)
    rectangles = group.get_graphic_data("2D")
    assert [rectangle[0].tolist() for rectangle in rectangles] == [[672, 448], [224, 0], [896, 896]], "best first"
    assert all(np.ptp(rectangle, axis=0).tolist() == [224, 224] for rectangle in rectangles)
    names, values, _ = group.get_measurements()
    assert [name.value for name in names] == ["RANK", "SCORE"]
    assert values[:, 0].tolist() == [1, 2, 3]
    assert values[:, 1].tolist() == [3.0, 2.0, 0.5]

    # The frame: the px of the file that is referred to, read by another reader, are those of the patch.
    (referred,) = read.ReferencedImageSequence
    source = read_source(slide)
    assert referred.ReferencedSOPInstanceUID == source.SOPInstanceUID
    (file,) = [file for file in slide.iterdir() if _instance_of(file) == source.SOPInstanceUID]
    matrix = hd.imread(file).get_total_pixel_matrix()
    with open_slide(slide) as opened:
        assert (source.TotalPixelMatrixColumns, source.TotalPixelMatrixRows) == opened.size
        for rectangle in rectangles:
            (x, y), (right, bottom) = rectangle.min(0).astype(int), rectangle.max(0).astype(int)
            theirs = matrix[y:bottom, x:right].astype(int)
            ours = opened.read_level(0, (x, y), (224, 224))
            assert np.abs(ours[: len(theirs), : theirs.shape[1]] - theirs).mean() < 3, "JPEG decoders differ a little"


def test_of_several_slides_each_has_its_own_patches_where_they_are_on_it(tmp_path, slide, bag_of_slide):
    other = replace(bag_of_slide, slide="slide 5e6f7a8b", coords=bag_of_slide.coords + 50, patch_size=448)
    scores = torch.arange(10.0)
    kept = Selection(torch.tensor([1, 4, 7, 9]), scores, torch.zeros(4, 4), 10)
    for number, wanted in enumerate([[[896, 896], [224, 0]], [[946, 946], [498, 274]]]):
        path = tmp_path / f"annotations-{number + 1}.dcm"
        write_annotations(path, join([bag_of_slide, other]), kept, slide, "demo", number=number)
        group = hd.ann.annread(path).get_annotation_group(number=1)
        rectangles = group.get_graphic_data("2D")
        assert [rectangle[0].tolist() for rectangle in rectangles] == wanted
        assert np.ptp(rectangles[0], axis=0).tolist() == [224 * (number + 1)] * 2
        assert group.get_measurements()[1][:, 0].tolist() == [[6, 9], [1, 3]][number], "ranks go through the case"


def _instance_of(file: Path) -> str:
    import pydicom

    return pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID


def test_the_same_patches_keep_their_uids(tmp_path, slide, bag_of_slide):
    scores = torch.arange(5.0)
    found = []
    for place, name in ((slide, "a"), (next(slide.iterdir()), "b")):
        kept = Selection(hard_topk(scores, 2), scores, torch.zeros(2, 4), 5)
        write_annotations(tmp_path / name, bag_of_slide, kept, place, "demo")
        found.append(hd.ann.annread(tmp_path / name))
    assert found[0].SOPInstanceUID == found[1].SOPInstanceUID
    assert found[0].StudyInstanceUID == read_source(slide).StudyInstanceUID


def test_the_file_names_nobody(tmp_path, slide, bag_of_slide):
    import pydicom

    planted = {"PatientName": "PLANTED^NAME", "PatientID": "PLANTED-1", "AccessionNumber": "PLANTED-2"}
    planted |= {"StudyDate": "19010203", "ReferringPhysicianName": "PLANTED^DR", "StudyDescription": "PLANTED-3"}
    planted |= {"PatientSex": "O", "ContainerIdentifier": "PLANTED-4", "InstitutionName": "PLANTED-5"}
    folder = tmp_path / "slide"
    folder.mkdir()
    for file in slide.iterdir():
        told = pydicom.dcmread(file)
        for name, value in planted.items():
            setattr(told, name, value)
        told.save_as(folder / file.name)
    scores = torch.arange(5.0)
    kept = Selection(hard_topk(scores, 2), scores, torch.zeros(2, 4), 5)
    write_annotations(tmp_path / "annotations.dcm", bag_of_slide, kept, folder, "demo")
    assert b"PLANTED" not in (tmp_path / "annotations.dcm").read_bytes()
    read = hd.ann.annread(tmp_path / "annotations.dcm")
    assert not read.PatientSex
    assert not read.StudyDate
    assert read.StudyInstanceUID == read_source(slide).StudyInstanceUID


def test_only_dicom_slides_are_annotated(tmp_path, slide):
    (tmp_path / "slide.svs").write_bytes(b"x" * 200)
    assert can_annotate(slide)
    assert can_annotate(next(slide.iterdir()))
    assert not can_annotate(tmp_path)
    assert not can_annotate(tmp_path / "slide.svs")
    assert not can_annotate(None)
    assert not can_annotate("https://host/HE.dzi")
    assert can_annotate("dicomweb:https://host/base?study=1.2&series=1.3")


def test_slides_of_other_makers_are_annotated(tmp_path, shared_data, bag_of_slide):
    scores = torch.arange(5.0)
    kept = Selection(hard_topk(scores, 2), scores, torch.zeros(2, 4), 5)
    folders = sorted((shared_data / "slides").glob("dicom_*"))
    assert folders
    for number, folder in enumerate(folders):
        if "camelyon" in folder.name:  # its UIDs are longer than DICOM allows
            with pytest.raises(ValueError, match=r"^The slide's own DICOM files are not"):
                write_annotations(tmp_path / str(number), bag_of_slide, kept, folder, "demo")
            continue
        write_annotations(tmp_path / str(number), bag_of_slide, kept, folder, "demo")
        assert len(hd.ann.annread(tmp_path / str(number)).get_annotation_group(number=1).get_graphic_data("2D")) == 2


def test_a_folder_without_levels_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no level of the slide"):
        read_source(tmp_path)
