"""What a slide is, by content: one rule for the page, the command line and a cohort's folder.

A slide is what open_slide reads, or what by its content or its name is meant as one: then it is named and refused with
a sentence, never passed over. What belongs to a slide (macro, label, thumbnail, map, mask, the parts of VMS and MRXS)
is none.
"""

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparsewsi.files import walk
from sparsewsi.slides.refusals import UNREAD_SUFFIXES, SlideError
from sparsewsi.slides.sources import is_image

_TIFF_SUFFIXES = (".svs", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".qptiff", ".ndpi", ".scn", ".bif")
SLIDE_SUFFIXES = frozenset(
    {*_TIFF_SUFFIXES, *UNREAD_SUFFIXES, ".mrxs", ".vms", ".vmu", ".svslide", ".czi", ".dcm", ".dzi"}
)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
# Of the companions of a slide: words that their names hold, and folders that file servers fill with thumbnails.
_COMPANION = re.compile(r"(?i)(^|[^a-z])(macro|label|thumb(nail)?s?|overview|preview|map\d*|mask|barcode)([^a-z]|$)")
_PICTURE_FOLDERS = re.compile(
    r"(?i)(macro|label|thumb(nail)?|overview|preview|map|mask|barcode|stitch(e)?|contour|overlay|visuali[sz]ation)s?"
)
_UNFINISHED = (".part", ".partial", ".crdownload", ".filepart", ".download", ".tmp", ".temp", ".bak", "~")
_SERVER_FOLDERS = ("@", "#", "$")
_MOST_TEXT = 1 << 16  # bytes of a .vms, and where the tables of an SQLite file are named
# Formats that begin as many other files do: how, and what the first bytes of a slide say besides. OpenSlide is not
# asked, as whoever sorts a stranger's files is no confined child.
_BEGINNINGS = ((b"[", b"Virtual Microscope Specimen]"), (b"ZISRAWFILE", b""), (b"SQLite format 3", b"SVSlideDataXPO"))


@dataclass(frozen=True)
class Found:
    """What a folder holds: slides (a DICOM slide as its folder where it is alone there), and what was left out and why.

    closed: folders that could not be searched
    """

    slides: tuple[Path, ...]
    left_out: tuple[tuple[Path, str], ...] = ()
    closed: tuple[OSError, ...] = ()


def is_slide(path: str | Path) -> bool:
    """Is a file a slide, or a folder one of DICOM? Read from its first bytes; companions of a slide count as well.

    Raises OSError for a file that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return any(_kind(file) == "dicom" for file in _files(path))
    return _kind(path) != ""


def find_slides_in(folder: str | Path) -> Found:
    """All slides below a folder, by content, in the order of their paths.

    A file that cannot be read counts as a slide if it is named as one, so that it is told and not missed.
    """
    slides: list[Path] = []
    left_out: dict[Path, str] = {}
    closed: list[OSError] = []
    for place, names in walk(Path(folder), closed.append):
        if any(part.startswith(_SERVER_FOLDERS) for part in place.relative_to(folder).parts):
            continue
        found = _sort(place, names)
        if any(_PICTURE_FOLDERS.fullmatch(part) for part in place.relative_to(folder).parts):
            left_out |= {path: "a picture, by the name of its folder" for path in found.slides if _is_picture(path)}
        elif (place / "selection.json").is_file():
            left_out |= {path: "a picture of a report" for path in found.slides if _is_picture(path)}
        slides += [path for path in found.slides if path not in left_out]
        left_out |= dict(found.left_out)
        data = _data_of(place)
        if data is not None and not data[1].is_file():
            left_out[data[0]] = f"the data of a slide whose {data[1].suffix} file is not beside it"
    return Found(tuple(sorted(slides)), tuple(left_out.items()), tuple(closed))


def sort_files(files: Iterable[Path]) -> Found:
    """The slides among files that were named one by one, as by a shell's pattern: find_slides_in's rule for them."""
    named, slides, left_out = list(files), set(), []
    for place in dict.fromkeys(file.parent for file in named):
        otherwise = "a part of a slide" if _data_of(place) else "no slide, by its content"
        found = _sort(place, [file.name for file in _files(place)])
        of_dicom, why = [path for path in found.slides if path == place], dict(found.left_out)
        for file in (file for file in named if file.parent == place):
            if file in found.slides:
                slides.add(file)
            elif file not in why and _kind_or_suffix(file) == "dicom":
                series = _dicom_series(file)
                slides |= set(of_dicom or [path for path in found.slides if _dicom_series(path) == series])
            else:
                left_out.append((file, why.get(file, otherwise)))
    return Found(tuple(sorted(slides)), tuple(left_out))


def _sort(place: Path, names: Iterable[str]) -> Found:
    """What the files of one folder are; none of those that are the data of a slide."""
    if _data_of(place) is not None:
        return Found(())
    kinds = {place / name: _kind_or_suffix(place / name) for name in names if not name.startswith(".")}
    files = [path for path, kind in kinds.items() if kind in ("slide", "image")]
    mine = _companions(files, {path for path in files if kinds[path] == "slide"})
    dicom = _find_dicom(place, [path for path, kind in kinds.items() if kind == "dicom"])
    return Found((*dicom, *(path for path in files if path not in mine)), tuple(mine.items()))


def _data_of(place: Path) -> tuple[Path, Path] | None:
    """(folder of data, file of the slide that it is of) where a folder holds parts of an MRXS or Deep Zoom slide."""
    if (place / "Slidedat.ini").is_file():
        return place, place.parent / f"{place.name}.mrxs"
    if place.name.isdecimal() and place.parent.name.endswith("_files"):
        return place.parent, place.parent.parent / f"{place.parent.name.removesuffix('_files')}.dzi"
    return None


def slide_stem(path: str | Path) -> str:
    """A slide's name without folder and ending; an ending that is none of a slide's (1.2.840.1) stays."""
    path = Path(path)
    return path.stem if path.suffix.lower() in SLIDE_SUFFIXES | IMAGE_SUFFIXES else path.name


def find_dicom_file(folder: Path) -> Path:
    """One file of the single DICOM series in a folder. Raises SlideError if there is none or there are several."""
    files = [file for file in _files(folder) if _kind(file) == "dicom"]
    if not files:
        if (folder / "Slidedat.ini").is_file():
            raise SlideError("This is the data folder of an MRXS slide; pass the .mrxs file beside it.")
        raise SlideError("The path given is a folder without a DICOM slide; pass one slide file.")
    series = {file: _dicom_series(file) for file in files}
    if len(set(series.values()) - {b""}) > 1:
        raise SlideError("The folder holds several DICOM series; pass one file of the slide.")
    return max(files, key=lambda file: bool(series[file]))  # a DICOMDIR names no series


def _kind(file: Path) -> str:
    """ "slide" | "dicom" | "image" | "" of a file, by content, or by its ending where the content says nothing."""
    with file.open("rb") as stream:
        head = stream.read(_MOST_TEXT)
    suffix = file.suffix.lower()
    if head[128:132] == b"DICM" or suffix == ".dcm":
        return "dicom"
    if suffix in SLIDE_SUFFIXES or _is_tiff(head):
        return "slide"
    if is_image(head) or suffix in IMAGE_SUFFIXES:
        return "image"
    return "slide" if any(head.startswith(begin) and word in head for begin, word in _BEGINNINGS) else ""


def _kind_or_suffix(file: Path) -> str:
    """_kind; of a file that cannot be read, what its ending says."""
    try:
        return _kind(file)
    except OSError:
        suffix = file.suffix.lower()
        if suffix == ".dcm":
            return "dicom"
        return "slide" if suffix in SLIDE_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else ""


def _is_tiff(head: bytes) -> bool:
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def _find_dicom(folder: Path, files: list[Path]) -> list[Path]:
    """The DICOM slides among the files of one folder: the folder itself, or one file of each of several series."""
    by_series: dict[bytes, Path] = {}
    for file in sorted(files):
        try:
            by_series.setdefault(_dicom_series(file), file)
        except OSError:
            by_series.setdefault(file.name.encode(errors="replace"), file)
    if len(by_series) > 1:
        by_series.pop(b"", None)  # a DICOMDIR
    return [folder] if len(by_series) == 1 else list(by_series.values())


def _dicom_series(file: Path) -> bytes:
    """SeriesInstanceUID (0020,000E) in explicit little endian, b"" where it is not found."""
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    at = head.find(b"\x20\x00\x0e\x00UI")
    if at < 0 or at + 8 > len(head):
        return b""
    (length,) = struct.unpack_from("<H", head, at + 6)
    return head[at + 8 : at + 8 + length].rstrip(b"\0 ")


def _companions(files: Iterable[Path], slides: set[Path]) -> dict[Path, str]:
    """Files of one folder that belong to a slide in it, or show its label: path -> why it is left out."""
    listed = {name for slide in slides if slide.suffix.lower() in (".vms", ".vmu") for name in _listed_by(slide)}
    stems = {slide.stem for slide in slides}
    found: dict[Path, str] = {}
    for file in files:
        owners = [stem for stem in _beginnings(file.stem) if stem in stems]
        image = file not in slides
        if file.name.lower().endswith(_UNFINISHED) or file.name.startswith("~$"):
            found[file] = "an unfinished download or a copy kept aside, by its name"
        elif file.name in listed and file.suffix.lower() not in (".vms", ".vmu"):
            found[file] = "a part of the VMS slide beside it"
        elif image and (owners or file.stem in stems):
            found[file] = "a picture that belongs to the slide of the same name"
        elif owners and any(_COMPANION.search(file.stem[len(stem) :]) for stem in owners):
            found[file] = "a macro, label, thumbnail, map or mask of the slide of the same name"
        elif _COMPANION.search(file.stem if image else _last_word(file)):
            found[file] = "a macro, label, thumbnail, map or mask, by its name"
    return found


def _is_picture(path: Path) -> bool:
    """Is it an image, or a TIFF that no scanner named?"""
    return path.suffix.lower() in IMAGE_SUFFIXES | {".tif", ".tiff"}


def _beginnings(name: str) -> list[str]:
    """What a name begins with, up to each sign that is no letter or digit: a_b-c -> a, a_b."""
    return [name[:i] for i, sign in enumerate(name) if i and not sign.isalnum()]


def _last_word(slide: Path) -> str:
    """Of a plain TIFF, whatever may be in it: a_b-macro.tif -> macro; of scanners' own endings nothing."""
    return re.split(r"[^A-Za-z0-9]+", slide.stem)[-1] if slide.suffix.lower() in (".tif", ".tiff") else ""


def _listed_by(slide: Path) -> set[str]:
    """Names of the files that a .vms or .vmu names as its parts."""
    try:
        with slide.open("rb") as stream:
            text = stream.read(_MOST_TEXT).decode(errors="replace")
    except OSError:
        return set()
    return {line.split("=", 1)[1].strip() for line in text.splitlines() if "=" in line}
