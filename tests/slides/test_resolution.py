"""Resolution: where it comes from, and that one ten times off, or in another unit, is doubted in words."""

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from benchmarks.inputs import APERIO, make_mrxs, make_tiff, make_vms, picture
from sparsewsi.slides.find import find_slides_in
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.resolution import Resolution, explain_too_coarse, find_resolution
from sparsewsi.slides.slide import open_slide
from sparsewsi.slides.tissue import patch_coords, why_empty

SIZE = (40_000, 30_000)
SMALL = (4000, 3000)


def by_tags(mpp: float, size: tuple[int, int] = SMALL, power: float | None = None) -> Resolution:
    """Of a plain TIFF that states mpp as its resolution."""
    tags = {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": f"{1e4 / mpp}", "tiff.YResolution": f"{1e4 / mpp}"}
    more = {} if power is None else {"openslide.objective-power": str(power)}
    return find_resolution(tags | more, "generic-tiff", size)


def by_property(mpp: float, size: tuple[int, int] = SMALL, power: float | None = None) -> Resolution:
    """Of a scanner's format that states mpp."""
    facts = {"openslide.mpp-x": str(mpp), "openslide.mpp-y": str(mpp)}
    more = {} if power is None else {"openslide.objective-power": str(power)}
    return find_resolution(facts | more, "aperio", size)


def by_ome(size: str, unit: str = "", frame: tuple[int, int] = SMALL) -> Resolution:
    pixels = f'<Pixels PhysicalSizeX="{size}" PhysicalSizeY="{size}"'
    pixels += f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"/>' if unit else "/>"
    text = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">{pixels}</Image></OME>'
    return find_resolution({"tiff.ImageDescription": text}, "generic-tiff", frame)


@pytest.mark.parametrize("mpp", [0.1213, 0.2201, 0.2275, 0.2528, 0.26, 0.454, 0.499, 0.5021, 0.55, 1.0, 2.0, 4.0])
def test_what_scanners_have_is_not_doubted(mpp):
    for found in (by_tags(mpp), by_property(mpp), by_ome(str(mpp))):
        assert found.mpp == pytest.approx(mpp)
        assert found.notes == ()
    for power in (10 / mpp, 9 / mpp, 20 / mpp, 5 / mpp):  # relay lenses halve and double
        assert by_property(mpp, power=power).notes == ()


@pytest.mark.parametrize(
    ("stated", "words", "remedy"),
    [
        (0.0502, "ten times too small", "0.502"),
        (0.0546, "ten times too small", "0.546"),
        (0.0984, "per inch written as px per cm", "0.25"),
        (1.27, "per cm written as px per inch", "0.5"),
        (0.635, "per cm written as px per inch", "0.25"),
    ],
)
def test_a_tiff_that_states_another_unit_is_doubted(stated, words, remedy):
    found = by_tags(stated)
    assert found.mpp == pytest.approx(stated)
    assert words in found.doubt
    assert f"slide_mpp={remedy}" in found.doubt
    assert found.doubt in found.notes


@pytest.mark.parametrize(
    ("stated", "words", "remedy"),
    [
        (250.0, "nm instead of um", "0.25"),
        (499.0, "nm instead of um", "0.499"),
        (0.00025, "mm instead of um", "0.25"),
        (0.0000502, "cm instead of um", "0.502"),
        (5e-7, "m instead of um", "0.5"),
        (0.0025, "hundred times too small", "0.25"),
        (0.0274, "ten times too small", "0.274"),
        (48.0, "hundred times too large", "0.48"),
    ],
)
def test_what_no_slide_has_is_refused_with_the_likely_error(stated, words, remedy):
    for found in (by_tags(stated), by_property(stated), by_ome(repr(stated))):
        assert found.mpp is None
        assert words in found.problem
        assert f"slide_mpp={remedy}" in found.problem


@pytest.mark.parametrize("dpi", [72, 96, 150, 300, 600, 1200])
def test_a_default_of_a_program_is_called_one(dpi):
    found = by_tags(25_400 / dpi)
    assert found.mpp is None or found.mpp > 20
    assert found.mpp is not None or "default" in found.problem


@pytest.mark.parametrize(
    ("stated", "power", "remedy"),
    [
        (2.5, 40, "0.25"),
        (0.05, 20, "0.5"),
        (0.63, 40, "0.248"),
        (0.197, 20, "0.5"),
        (5.0, 20, "0.5"),
        (6.35, 40, "0.25"),
    ],
)
def test_disagreement_with_the_objective_is_doubted(stated, power, remedy):
    for found in (by_tags(stated, power=power), by_property(stated, power=power)):
        assert f"objective of {power}x" in found.doubt
        assert f"slide_mpp={remedy}" in found.doubt
    given = find_resolution({"openslide.objective-power": str(power)}, "aperio", SMALL, slide_mpp=stated)
    assert given.mpp == stated
    assert f"objective of {power}x" in given.doubt


@pytest.mark.parametrize("stated", [2.5, 5.0, 2.2])
def test_a_slide_larger_than_glass_is_doubted(stated):
    for found in (by_tags(stated, SIZE), by_property(stated, SIZE), by_ome(str(stated), frame=SIZE)):
        assert "larger than a glass slide" in found.doubt
        assert f"slide_mpp={stated / 10:.3g}" in found.doubt
    assert by_property(stated, (8000, 6000)).doubt == ""
    objective = find_resolution({"openslide.objective-power": str(10 / stated)}, "aperio", SIZE)
    assert "larger than a glass slide" in objective.doubt


@pytest.mark.parametrize(("size", "unit", "mpp"), [("0.25", "µm", 0.25), ("250", "nm", 0.25), ("0.0005", "mm", 0.5)])
def test_ome_xml_states_its_unit(size, unit, mpp):
    found = by_ome(size, unit)
    assert found.mpp == pytest.approx(mpp)
    assert found.source == "ome"


def ome(pixels: str, more: str = "") -> Resolution:
    text = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{more}<Pixels {pixels}/></OME>'
    return find_resolution({"tiff.ImageDescription": text}, "generic-tiff", SMALL)


@pytest.mark.parametrize("unit", ["&#181;m", "&#xB5;m", "&micro;m", "\u00b5m", "\u03bcm", "um"])
@pytest.mark.parametrize("form", ['{}="{}"', "{}='{}'", '{} = "{}"'])
def test_ome_xml_is_read_as_xml_may_be_written(unit, form):
    facts = {f"PhysicalSize{axis}": "0.25" for axis in "XY"} | {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
    assert ome(" ".join(form.format(*fact) for fact in facts.items())).mpp == 0.25


@pytest.mark.parametrize(("power", "doubted"), [("40", True), ("20", False), ("10", False), ("5", False), ("2", True)])
def test_the_objective_of_ome_xml_is_held_against_its_resolution(power, doubted):
    found = ome('PhysicalSizeX="1" PhysicalSizeY="1"', f'<Objective ID="Objective:0" NominalMagnification="{power}"/>')
    assert found.mpp == 1.0
    assert bool(found.doubt) == doubted


def test_two_statements_that_differ_are_told():
    for stated, tags in [(0.499, 0.25), (0.25, 1.0), (0.5, 5.0)]:
        facts = {"openslide.mpp-x": str(stated), "openslide.mpp-y": str(stated), "tiff.ResolutionUnit": "inch"}
        facts |= {"tiff.XResolution": str(25_400 / tags), "tiff.YResolution": str(25_400 / tags)}
        found = find_resolution(facts, "aperio", SMALL)
        assert found.mpp == stated
        assert f"{tags:g} µm/px" in found.notes[0]


@pytest.mark.parametrize(("used", "other"), [("0.25", "0.5"), ("0.5", "0,2520"), ("0.4990", "0.2490")])
def test_another_resolution_in_the_same_description_is_told(used, other):
    text = f"Aperio Image Library v11|AppMag = 20|MPP = {other}|Left = 3|MPP = {used}"
    facts = {"openslide.mpp-x": used, "openslide.mpp-y": used, "tiff.ImageDescription": text}
    found = find_resolution(facts, "aperio", SMALL)
    assert found.mpp == float(used)
    assert f"{float(other.replace(',', '.')):.4g} µm/px" in found.notes[0]
    facts["tiff.ImageDescription"] = text.replace(other, used)
    assert find_resolution(facts, "aperio", SMALL).notes == ()


@pytest.mark.parametrize(("given", "words"), [(40, "magnification"), (250, "nm instead of um"), (0.0005, "mm instead")])
def test_a_resolution_given_that_no_slide_has_is_refused(tmp_path, given, words):
    with pytest.raises(SlideError, match=words):
        open_slide(tmp_path / "whatever", slide_mpp=given)


@pytest.mark.parametrize("stated", [5.0, 2.5, 12.7, 20.0])
def test_too_coarse_names_the_likely_error_and_no_other_magnification(stated):
    for source in ("argument", "openslide", "tiff resolution"):
        said = explain_too_coarse(Resolution(stated, source), 0.5, 2.0)
        assert f"{stated:g} µm/px" in said
        assert "slide_mpp=" in said
        assert "higher magnification" not in said


# ---- what is said where nothing is found


def write(path: Path, mpp: float, radius: int) -> Path:
    """A disc of tissue, radius px, on glass."""
    y, x = np.mgrid[:1200, :1600]
    rgb = np.full((1200, 1600, 3), (240, 238, 241), np.uint8)
    rgb[(x - 800) ** 2 + (y - 600) ** 2 < radius**2] = (190, 110, 170)
    resolution = (1e4 / mpp, 1e4 / mpp)
    tifffile.imwrite(
        path, rgb, photometric="rgb", tile=(256, 256), metadata=None, resolution=resolution, resolutionunit="CENTIMETER"
    )
    return path


@pytest.mark.parametrize(("stated", "radius"), [(0.06, 500), (0.2, 200), (0.1, 400)])
def test_blank_is_never_said_of_tissue_at_a_wrong_resolution(tmp_path, stated, radius):
    with open_slide(write(tmp_path / "a.tif", stated, radius)) as slide:
        assert len(patch_coords(slide, 0.5, 224)) == 0
        said = why_empty(slide, 0.5, 224)
    assert "blank" not in said
    assert "slide_mpp=" in said


# ---- the same for every format


def _aperio(stated: float, power: int | None) -> dict[str, bytes]:
    text = APERIO.replace("MPP = 0.5", f"MPP = {stated}")
    return {"a.svs": make_tiff("jpeg", text.replace("AppMag = 20", f"AppMag = {power}") if power else text[:90])}


def _ome(stated: float) -> dict[str, bytes]:
    pixels = f'<Pixels SizeX="768" SizeY="768" PhysicalSizeX="{stated}" PhysicalSizeY="{stated}"/>'
    text = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="i">{pixels}</Image></OME>'
    return {"a.ome.tif": make_tiff("jpeg", text)}


def _mrxs(stated: float) -> dict[str, bytes]:
    files = make_mrxs()
    text = files["a/Slidedat.ini"].replace(b"_X = 0.5\n", f"_X = {stated}\n".encode())
    return files | {"a/Slidedat.ini": text.replace(b"_Y = 0.5\n", f"_Y = {stated}\n".encode())}


def _vms(stated: float) -> dict[str, bytes]:
    files = make_vms()
    return files | {"a.vms": files["a.vms"].replace(b"256000", str(round(512_000 * stated)).encode())}


FORMATS = {
    "SVS": lambda stated: _aperio(stated, 20),
    "OME-TIFF": _ome,
    "MRXS": _mrxs,
    "VMS": _vms,
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("stated", [5.0, 0.05, 500.0, 0.0005])
def test_ten_times_off_or_another_unit_is_doubted_or_refused_in_every_format(tmp_path, kind, stated):
    for name, content in FORMATS[kind](stated).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with open_slide(find_slides_in(tmp_path).slides[0]) as slide:
        try:
            slide.check_mpp(0.5)
            said = " ".join(slide.warnings)
        except SlideError as error:
            said = str(error)
        assert "slide_mpp=" in said
        assert re.search("may be|which no slide has|If that is|objective|but .* is used", said)


@pytest.mark.parametrize("given", [5.0, 0.05, 500.0, 0.0005, 20])
@pytest.mark.parametrize("name", ["a.png", "a.dzi"])
def test_a_resolution_that_is_given_to_an_image_is_doubted_the_same_way(tmp_path, given, name):
    Image.fromarray(picture(64)).save(tmp_path / "a.png")
    (tmp_path / "a_files" / "0").mkdir(parents=True)
    text = '<Image TileSize="254" Overlap="0" Format="png"><Size Width="64" Height="64"/></Image>'
    (tmp_path / "a.dzi").write_text(text)
    for level in range(7):
        (tmp_path / "a_files" / str(level)).mkdir(exist_ok=True)
        Image.fromarray(picture(1 << level)).save(tmp_path / "a_files" / str(level) / "0_0.png")
    try:
        with open_slide(tmp_path / name, slide_mpp=given) as slide:
            slide.check_mpp(0.5)
            said = slide.doubt
    except SlideError as error:
        said = str(error)
    assert "slide_mpp=" in said
