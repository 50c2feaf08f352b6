"""Tissue: pale and fatty tissue in, pens, dust and holes out; the grid and the coverage threshold are exact."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw
from scipy import ndimage

from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import open_slide
from sparsewsi.slides.stain import doubt_colours
from sparsewsi.slides.tissue import LOST, coverage, find_tissue, patch_coords, patch_side, tissue_mask, why_empty

MPP = 2.0  # um per px of the painted slides
PATCH = 56  # px at MPP: 112 um
GLASS = (243, 241, 244)


def write_slide(path: Path, rgb: np.ndarray, levels: int = 2, mpp: float = MPP, **extra) -> Path:
    """A tiled JPEG pyramid (every level a quarter as wide) that states mpp."""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            step = 4**level
            tiff.write(
                np.asarray(Image.fromarray(rgb).reduce(step)),
                photometric="rgb",
                tile=(256, 256),
                compression="jpeg",
                compressionargs={"level": 80},
                resolution=(1e4 / mpp / step, 1e4 / mpp / step),
                resolutionunit="CENTIMETER",
                metadata=None,
                subfiletype=1 if level else 0,
                **extra,
            )
    return path


def blob(shape: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """Ellipse, (x, y) in px."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1


class Painted:
    """A slide of 4.6 x 3.6 mm with everything on it, and where each thing lies (bool (h, w), level-0 px)."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shape = (1792, 2304)  # whole JPEG blocks on both levels
        rgb = np.full((*shape, 3), GLASS, np.float32) + rng.normal(0, 1.5, (*shape, 1)).astype(np.float32)
        grain = ndimage.gaussian_filter(rng.normal(0, 1, shape).astype(np.float32), 3)
        grain *= 18 / grain.std()
        self.dense = blob(shape, (500, 550), (330, 380))
        self.pale = blob(shape, (1150, 500), (230, 300))
        self.fat = blob(shape, (1800, 600), (320, 330))
        self.pigment = blob(shape, (380, 420), (60, 50))
        self.hole = blob(shape, (560, 650), (130, 110))
        for where, colour, strength in [(self.dense, (196, 128, 178), 1.0), (self.pale, (238, 226, 238), 0.15)]:
            rgb[where] = np.array(colour, np.float32) + strength * grain[where][:, None]
        rgb[self.pigment] = (110, 70, 45)
        # Fat: membranes 4 um thick around cells of 90 um.
        seeds = np.zeros(shape, np.int32)
        points = rng.uniform((0, 0), shape, (2200, 2)).astype(int)
        seeds[points[:, 0], points[:, 1]] = np.arange(1, len(points) + 1)
        nearest = np.asarray(ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True))
        cells = seeds[nearest[0], nearest[1]]
        walls = (cells != np.roll(cells, 2, 0)) | (cells != np.roll(cells, 2, 1))
        rgb[self.fat & walls] = (222, 180, 208)
        rgb[self.hole] = GLASS

        image = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        before = np.asarray(image)
        for i, ink in enumerate([(25, 95, 75), (40, 60, 160), (200, 25, 30), (22, 22, 24)]):
            y = 1200 + 120 * i
            draw.line([(200, y), (700, y + 40), (1100, y - 10)], fill=ink, width=50, joint="curve")
        self.pens = (np.asarray(image) != before).any(2)
        before = np.asarray(image)
        for x, y, r in [(1500, 1300, 40), (1700, 1400, 8), (1800, 1250, 3), (2000, 1350, 70)]:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(70, 68, 70) if r < 70 else (150, 149, 150))
        draw.line([(1300, 1700), (2300, 1500)], fill=(150, 150, 150), width=4)  # a hair
        self.dust = (np.asarray(image) != before).any(2)
        self.rgb = np.asarray(image)
        self.tissue = (self.dense & ~self.hole) | self.pale | self.fat
        anything = self.dense | self.pale | self.fat | self.pens | self.dust
        self.empty = np.asarray(ndimage.distance_transform_edt(~anything)) > 80


@pytest.fixture(scope="module")
def painted() -> Painted:
    return Painted()


@pytest.fixture(scope="module")
def painted_slide(painted, tmp_path_factory) -> Path:
    return write_slide(tmp_path_factory.mktemp("painted") / "a.tiff", painted.rgb)


def covered(coords: np.ndarray, side: int, where: np.ndarray) -> np.ndarray:
    """Share of each patch that is True in where (level-0 px): (N,)."""
    return np.array([where[y : y + side, x : x + side].sum() / side**2 for x, y in coords])


# ---- what is tissue ----


def test_dense_pale_and_fatty_tissue_is_kept(painted, painted_slide):
    with open_slide(painted_slide) as slide:
        mask, scale = tissue_mask(slide)
    assert scale * MPP == pytest.approx(8.0, rel=0.5)
    full = mask.repeat(round(scale), 0).repeat(round(scale), 1)[: painted.tissue.shape[0], : painted.tissue.shape[1]]
    inner = np.asarray(ndimage.binary_erosion(painted.fat, iterations=40), bool)
    assert full[painted.dense & ~painted.hole].mean() > 0.99
    assert full[painted.pale].mean() > 0.97
    assert full[inner].mean() > 0.95
    assert full[painted.pigment].mean() > 0.9
    assert (full & painted.tissue).sum() / full.sum() > 0.97


def test_no_patch_on_pens_dust_holes_or_glass(painted, painted_slide):
    with open_slide(painted_slide) as slide:
        coords = patch_coords(slide, MPP, PATCH)
        side = patch_side(slide, MPP, PATCH)
    assert side == PATCH
    assert (covered(coords, side, painted.tissue) > 0.05).mean() > 0.98
    assert covered(coords, side, painted.pens | painted.dust).max() == 0
    assert covered(coords, side, painted.empty).max() == 0
    assert covered(coords, side, painted.hole).max() < 0.95


def test_pen_over_tissue_is_taken_out(painted, tmp_path):
    rgb = painted.rgb.astype(np.float32)
    stroke = np.zeros(rgb.shape[:2], bool)
    stroke[480:560, 100:900] = True
    rgb[stroke] *= np.array([0.15, 0.5, 0.4], np.float32)  # green ink lets the tissue shine through
    with open_slide(write_slide(tmp_path / "a.tiff", rgb.astype(np.uint8))) as slide:
        coords = patch_coords(slide, MPP, PATCH)
    assert covered(coords, PATCH, stroke).max() < 0.1


@pytest.mark.parametrize("glass", [(255, 255, 255), (228, 222, 230), (244, 240, 228), (205, 204, 203)])
def test_the_colour_of_the_glass_does_not_matter(painted, tmp_path, glass):
    rgb = painted.rgb * (np.array(glass, np.float32) / np.array(GLASS, np.float32))
    with open_slide(write_slide(tmp_path / "a.tiff", np.clip(rgb, 0, 255).astype(np.uint8))) as slide:
        coords = patch_coords(slide, MPP, PATCH)
    assert covered(coords, PATCH, painted.empty | painted.pens | painted.dust).max() == 0
    got = {(x, y) for x, y in coords.tolist()}
    grid = [(x, y) for y in range(0, 1792, PATCH) for x in range(0, 2304, PATCH)]
    solid = covered(np.array(grid), PATCH, painted.tissue) > 0.5
    assert sum(patch in got for patch, inside in zip(grid, solid) if inside) / solid.sum() > 0.97


def test_padding_white_beside_grey_glass_is_no_tissue(painted, tmp_path):
    rgb = painted.rgb.copy()
    rgb[:, :96] = 255
    rgb[1728:] = 255
    with open_slide(write_slide(tmp_path / "a.tiff", rgb)) as slide:
        coords = patch_coords(slide, MPP, PATCH)
    assert len(coords)
    assert covered(coords, PATCH, painted.empty).max() == 0


def test_a_slide_of_one_level_gives_the_same_tissue(painted, painted_slide, tmp_path):
    with open_slide(painted_slide) as slide:
        pyramid, scale = tissue_mask(slide)
    with open_slide(write_slide(tmp_path / "a.tiff", painted.rgb, levels=1)) as slide:
        flat, flat_scale = tissue_mask(slide)
    assert scale == flat_scale
    assert (pyramid & flat).sum() / (pyramid | flat).sum() > 0.95


def test_tissue_up_to_the_border_is_kept(tmp_path):
    rng = np.random.default_rng(1)
    rgb = np.clip(rng.normal((190, 120, 170), 12, (600, 600, 3)), 0, 255).astype(np.uint8)
    with open_slide(write_slide(tmp_path / "a.tiff", rgb)) as slide:
        mask, _ = tissue_mask(slide)
        assert mask.all()
        coords = patch_coords(slide, MPP, 100, min_tissue=1.0)
    assert len(coords) == 36


# ---- nothing found ----


def empty_reason(path: Path) -> str:
    with open_slide(path) as slide:
        coords = patch_coords(slide, MPP, PATCH)
        assert coords.shape == (0, 2)
        assert coords.dtype == np.int32
        assert not tissue_mask(slide)[0].any()
        return why_empty(slide, MPP, PATCH)


def test_no_tissue_is_an_answer_with_its_reason(tmp_path):
    glass = np.full((600, 800, 3), GLASS, np.uint8)
    inked = glass.copy()
    inked[200:300, 100:600] = (30, 100, 80)
    cells = np.zeros((600, 800, 3), np.uint8)
    cells[100:160, 200:260, 2] = 200
    assert "blank" in empty_reason(write_slide(tmp_path / "a.tiff", glass))
    assert "blank" in empty_reason(write_slide(tmp_path / "b.tiff", np.full((600, 800, 3), 255, np.uint8)))
    assert "pen-coloured" in empty_reason(write_slide(tmp_path / "c.tiff", inked))
    assert "fluorescence" in empty_reason(write_slide(tmp_path / "d.tiff", cells))


def test_tissue_too_small_for_a_patch_is_told(painted_slide):
    with open_slide(painted_slide) as slide:
        assert len(patch_coords(slide, MPP, 1500, min_tissue=0.9)) == 0
        assert "lower min_tissue" in why_empty(slide, MPP, 1500, min_tissue=0.9)
        assert why_empty(slide, MPP, PATCH) == ""


def damaged(path: Path, tiles: range) -> Path:
    """The slide with zeros over these tiles of its finest level."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in tiles]
    with path.open("r+b") as file:
        for offset, length in places:
            file.seek(offset)
            file.write(bytes(length))
    return path


def test_damage_is_kept_for_whoever_reads_the_patches_there(painted, tmp_path):
    path = write_slide(tmp_path / "a.tiff", painted.rgb, levels=1)
    with open_slide(path) as slide:
        intact = tissue_mask(slide)[0]
    with open_slide(damaged(path, range(11, 13))) as slide:  # x 512 to 1024, y 256 to 512
        mask, scale = tissue_mask(slide)
    hole = np.zeros_like(mask)
    hole[round(256 / scale) : round(512 / scale), round(512 / scale) : round(1024 / scale)] = True
    near = ndimage.binary_dilation(hole, iterations=LOST)
    assert mask[hole].all()
    far = np.logical_not(near)
    assert (mask & far == intact & far).mean() > 0.99
    with open_slide(damaged(path, range(4, 50))) as slide, pytest.raises(SlideError, match="damaged or cut short"):
        tissue_mask(slide)


# ---- the grid ----


def test_coverage_is_exact_for_squares_that_cut_mask_px():
    rng = np.random.default_rng(0)
    mask = rng.random((37, 53)) < 0.5
    left, top, side = rng.uniform(-3, 56, 40), rng.uniform(-3, 40, 30), 4.37
    got = coverage(mask, left, top, side)

    def overlap(start: float, n: int) -> np.ndarray:
        return np.clip(np.minimum(start + side, np.arange(n) + 1) - np.maximum(start, np.arange(n)), 0, None)

    expected = [[overlap(y, 37) @ mask @ overlap(x, 53) / side**2 for x in left] for y in top]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    whole = coverage(np.ones((10, 10), bool), np.array([0.0, 2.5, 8.0, 20.0]), np.array([0.0]), 4.0)
    np.testing.assert_allclose(whole, [[1, 1, 0.5, 0]])


@pytest.mark.parametrize("min_tissue", [0.0, 0.1, 0.37, 0.5, 0.999, 1.0])
def test_exactly_the_patches_at_or_above_the_threshold_are_kept(painted_slide, min_tissue):
    with open_slide(painted_slide) as slide:
        mask, scale = tissue_mask(slide)
        coords = patch_coords(slide, 1.7, 50, min_tissue)
        side = patch_side(slide, 1.7, 50)
    x, y = np.arange(0, 2304, side), np.arange(0, 1792, side)
    share = coverage(mask, x / scale, y / scale, side / scale)
    expected = [(x[j], y[i]) for i in range(len(y)) for j in range(len(x)) if share[i, j] >= min_tissue - 1e-9]
    assert [tuple(c) for c in coords.tolist()] == expected


def test_the_grid_is_aligned_to_the_origin_in_raster_order_without_overlap(painted_slide):
    with open_slide(painted_slide) as slide:
        for mpp, patch_size in [(2.0, 56), (1.3, 64), (4.1, 30)]:
            side = patch_side(slide, mpp, patch_size)
            coords = patch_coords(slide, mpp, patch_size)
            assert abs(side - patch_size * mpp / MPP) <= 0.5
            assert (coords % side == 0).all()
            assert len({tuple(c) for c in coords.tolist()}) == len(coords) > 0
            raster = coords[:, 1].astype(np.int64) * 10**6 + coords[:, 0]
            assert (np.diff(raster) > 0).all()
            assert (patch_coords(slide, mpp, patch_size) == coords).all()


def test_what_cannot_be_cut_into_patches_is_refused(painted_slide, tmp_path):
    with open_slide(painted_slide) as slide:
        for call in (patch_coords, why_empty):
            with pytest.raises(SlideError, match=r"2 µm/px.*0\.5 µm/px"):
                call(slide, 0.5, 224)
            with pytest.raises(SlideError, match="min_tissue"):
                call(slide, MPP, PATCH, 1.5)
            with pytest.raises(SlideError, match="patch_size"):
                call(slide, MPP, 0)
        with pytest.raises(SlideError, match="resolution"):
            tissue_mask(slide, 0.0)
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        for call in (lambda: tissue_mask(slide), lambda: patch_coords(slide, 0.5, 224)):
            with pytest.raises(SlideError, match="slide_mpp="):
                call()


# ---- real slides, where they are ----


@pytest.mark.parametrize(
    ("name", "slide_mpp", "least", "most"),
    [
        ("slides/CMU-1-Small-Region.svs", None, 0.3, 0.5),
        ("slides/TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.55, 0.75),
        ("wsi/celiac-disease__whole_1.0mpp.tiff", None, 0.3, 0.45),
        ("wsi/insidious-lymph-node-metastasis__whole_1.0mpp.tiff", None, 0.75, 0.97),
        ("wsi/mucinous-adenocarcinoma-colon__region_x15000_y11000_0.5mpp.tiff", None, 0.85, 0.96),
    ],
)
def test_share_of_tissue_of_real_slides(shared_data, name, slide_mpp, least, most):
    with open_slide(shared_data / name, slide_mpp=slide_mpp) as slide:
        mask, _ = tissue_mask(slide)
        assert least < mask.mean() < most
        assert len(patch_coords(slide, 0.5, 224))


def test_fluorescence_has_no_tissue_and_says_why(shared_data):
    with open_slide(shared_data / "slides/hamamatsu_test3-DAPI-2-387.ndpi") as slide:
        assert len(patch_coords(slide, 0.5, 224)) == 0
        assert "fluorescence" in why_empty(slide, 0.5, 224)


def test_pens_on_real_tissue_are_taken_out(shared_data):
    # In level-0 px of the pictures: well inside the stroke, and well away from it.
    for name, pen, clean in [
        ("tcga-green-pen.png", (330, 100, 90, 90), (560, 300, 90, 90)),
        ("tcga-red-pen.png", (60, 240, 60, 60), (300, 200, 60, 60)),
    ]:
        with open_slide(shared_data / "slides/images" / name, slide_mpp=2.0) as slide:
            mask, scale = tissue_mask(slide)
        share = [
            mask[int(y / scale) : int((y + h) / scale), int(x / scale) : int((x + w) / scale)].mean()
            for x, y, w, h in (pen, clean)
        ]
        assert share[0] == 0, name
        assert share[1] > 0.95, name


def test_a_slide_far_too_coarse_is_refused_with_both_numbers(shared_data):
    with (
        open_slide(shared_data / "slides/dicom_camelyon") as slide,
        pytest.raises(SlideError, match=r"28\.97 µm/px.*0\.5 µm/px"),
    ):
        patch_coords(slide, 0.5, 224)


# ---- colours that run the wrong way


def paint_nuclei(ground: tuple[int, int, int], nuclei: tuple[int, int, int], count: int) -> np.ndarray:
    """Glass around a square of stroma of 0.5 um/px with round nuclei of 6 um, and the grain of a camera."""
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (1536, 1536), GLASS)
    draw = ImageDraw.Draw(image)
    draw.rectangle((256, 256, 1280, 1280), fill=ground)
    for x, y in rng.integers(270, 1266, (count, 2)).tolist():
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=nuclei)
    grain = rng.normal(0, 4, (1536, 1536, 3))
    return np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("ground", "nuclei", "count"),
    [
        ((226, 160, 196), (96, 66, 140), 2000),
        ((205, 120, 170), (80, 50, 120), 6000),
        ((235, 190, 215), (130, 95, 170), 900),
    ],
)
def test_red_and_blue_that_were_swapped_are_told(tmp_path, ground, nuclei, count):
    rgb = paint_nuclei(ground, nuclei, count)
    for name, pixels, swapped in (("rgb", rgb, False), ("bgr", np.ascontiguousarray(rgb[..., ::-1]), True)):
        with open_slide(write_slide(tmp_path / f"{name}.tiff", pixels, mpp=0.5)) as slide:
            assert tissue_mask(slide)[0].any()
            assert ("red and blue may be swapped" in find_tissue(slide).note) == swapped


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_the_colours_of_real_slides_run_as_they_should(shared_data, name):
    with open_slide(shared_data / "slides" / name, slide_mpp=0.5) as slide:
        assert "swapped" not in find_tissue(slide).note


@pytest.mark.parametrize(("channel", "value"), [(0, 10), (1, 0), (2, 255)])
def test_a_channel_that_holds_nothing_is_told(channel, value):
    tissue = paint_nuclei((226, 160, 196), (96, 66, 140), 2000)[300:1200, 300:1200]
    assert doubt_colours(tissue[None]) == ""
    tissue[..., channel] = value
    assert f"The {('red', 'green', 'blue')[channel]} channel" in doubt_colours(tissue[None])
