"""The kept patches of a DICOM slide as DICOM annotations (Microscopy Bulk Simple Annotations), for other viewers.

Needs the package of the extra [dicom]. Positions are px of the whole matrix of the slide's finest level, from the
top-left corner of its top-left px: our level-0 px. The file points at the slide by its UIDs and names nobody: patient,
dates and accession number are empty, for an archive to fill in.
"""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsewsi.bags.bag import Bag, list_parts, number_slides, own_coords
from sparsewsi.files import write_bytes
from sparsewsi.model.selection import Selection
from sparsewsi.report.qupath import CLASS_NAME
from sparsewsi.slides.dicomweb import read_headers
from sparsewsi.slides.remote import find_address, is_remote

if TYPE_CHECKING:
    from pydicom import Dataset

# What every DICOM file states, and this one leaves empty.
EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ContainerIdentifier", "SpecimenDescriptionSequence", "ContainerTypeCodeSequence"),
    "IssuerOfTheContainerIdentifierSequence",
)
# Kinds of value that hold no words of people: UIDs, codes and numbers.
WORDLESS = {"UI", "CS", "US", "SS", "UL", "SL", "FL", "FD", "DS", "IS"}
SCHEME = "99SPARSEWSI"


def can_annotate(path: str | Path | None) -> bool:
    """Is the slide of DICOM files or on a DICOMweb server, and highdicom installed?"""
    if path is None or importlib.util.find_spec("highdicom") is None:
        return False
    if is_remote(path):
        return find_address(path, "dicomweb") is not None
    place = Path(path)
    files = [place] if place.is_file() else sorted(place.iterdir()) if place.is_dir() else []
    return any(file.is_file() and _is_dicom(file) for file in files)


def write_annotations(
    path: str | Path,
    bag: Bag,
    selection: Selection,
    slide: str | Path,
    model: str,
    weights_sha256: str | None = None,
    number: int = 0,
) -> None:
    """Write the kept patches, best first, as rectangles with their rank and score; whole or not at all.

    slide: the DICOM folder, or one file of it, or its address on a server
    model, weights_sha256: who selected them, as the algorithm and its version
    number: of the slide whose patches are written, where the bag is of several
    The same patches of the same slide keep their UIDs, so that a second import replaces the first. Raises ValueError
    where the slide's files name no finest level, or are not as DICOM wants them.
    """
    source = read_source(slide)
    try:
        _take_words(source)
        data = _encode(bag, selection, source, model, (weights_sha256 or "not known")[:16], number)
    except Exception as error:  # of many types, whose words may quote the patient
        raise ValueError("The slide's own DICOM files are not as the standard wants them.") from error
    write_bytes(path, data)


def _encode(bag: Bag, selection: Selection, source: "Dataset", model: str, version: str, number: int) -> bytes:
    """The file's bytes."""
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    numbers_of_slides, patch_size = number_slides(bag)[selection.indices], list_parts(bag)[number].patch_size
    order = [place for place in selection.best_first.tolist() if numbers_of_slides[place] == number]
    kept = selection.indices[order]
    corners = own_coords(bag)[kept].double().numpy()
    square = patch_size * np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    about = f"{source.SOPInstanceUID} {patch_size} {corners.tolist()}"
    numbers = {
        _code("RANK", "Rank by score among all patches"): selection.ranks[order],
        _code("SCORE", "Score by the model"): selection.scores[kept],
    }
    measured = [
        hd.ann.Measurements(what, values.float().numpy(), codes.UCUM.NoUnits) for what, values in numbers.items()
    ]
    group = hd.ann.AnnotationGroup(
        number=1,
        uid=generate_uid(entropy_srcs=["group", about]),
        label=CLASS_NAME,
        annotated_property_category=codes.SCT.SpatialAndRelationalConcept,
        annotated_property_type=codes.DCM.SelectedRegion,
        graphic_type=hd.ann.GraphicTypeValues.RECTANGLE,
        graphic_data=[corner + square for corner in corners],
        algorithm_type=hd.ann.AnnotationGroupGenerationTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=f"sparsewsi {model}"[:64], family=codes.DCM.ArtificialIntelligence, version=version
        ),
        measurements=measured,
        description="Patches that were shown to the model. Research use only, not for diagnosis.",
    )
    annotations = hd.ann.MicroscopyBulkSimpleAnnotations(
        source_images=[source],
        annotation_coordinate_type=hd.ann.AnnotationCoordinateTypeValues.SCOORD,
        annotation_groups=[group],
        series_instance_uid=generate_uid(entropy_srcs=["series", about]),
        series_number=1,
        sop_instance_uid=generate_uid(entropy_srcs=["instance", about]),
        instance_number=1,
        manufacturer="sparsewsi",
        manufacturer_model_name="sparsewsi",
        software_versions=version,
        device_serial_number="none",
        content_label="SPARSEWSI",
    )
    data = io.BytesIO()
    annotations.save_as(data)
    return data.getvalue()


def read_source(slide: str | Path) -> "Dataset":
    """What the file of the finest level of a DICOM slide says, without px. Raises ValueError if there is none."""
    levels = [one for one in _read_headers(slide) if "VOLUME" in one.get("ImageType", ())]
    levels = [one for one in levels if "TotalPixelMatrixColumns" in one]
    if not levels:
        raise ValueError("The DICOM files state no level of the slide, so that nothing can be annotated on it.")
    source = max(levels, key=lambda one: one.TotalPixelMatrixColumns * one.TotalPixelMatrixRows)
    return source


def _take_words(source: "Dataset") -> None:
    """Leave UIDs, codes and numbers."""
    for element in list(source):
        if element.VR not in WORDLESS:
            del source[element.tag]
    for name in EMPTY:
        setattr(source, name, [] if name.endswith("Sequence") else "")


def _read_headers(slide: str | Path) -> "Sequence[Dataset]":
    """What the files of one series say, without px."""
    if is_remote(slide):
        return read_headers(slide)
    import pydicom

    place = Path(slide)
    files = [file for file in sorted((place.parent if place.is_file() else place).iterdir()) if file.is_file()]
    told = [pydicom.dcmread(file, stop_before_pixels=True) for file in files if _is_dicom(file)]
    if place.is_file():
        series = pydicom.dcmread(place, stop_before_pixels=True).get("SeriesInstanceUID")
        told = [one for one in told if one.get("SeriesInstanceUID") == series]
    return told


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _code(value: str, meaning: str) -> Any:
    from pydicom.sr.coding import Code

    return Code(value, SCHEME, meaning)
