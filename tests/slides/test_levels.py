"""Levels and pages: a scale is measured where sizes do not say it, and no other image is taken for the slide."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparsewsi.slides.levels import measure_downsamples
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import open_slide

RNG = np.random.default_rng(0)
WIDTH, HEIGHT = 1500, 840


def paint(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Something that looks different everywhere, at every scale."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        grain = rng.integers(0, 256, (-(-height // side), -(-width // side), 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BILINEAR))
    return (total / 3).astype(np.uint8)


SLIDE = paint()


def reduce(pixels: np.ndarray, factor: int) -> np.ndarray:
    height, width = (side // factor * factor for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels[:height, :width]).reduce(factor))


def fit(pixels: np.ndarray, width: int, height: int, fill: int = 255) -> np.ndarray:
    """Padded or cut at the right and at the bottom."""
    out = np.full((height, width, 3), fill, np.uint8)
    part = pixels[:height, :width]
    out[: part.shape[0], : part.shape[1]] = part
    return out


def write(path: Path, pages: Sequence[tuple[np.ndarray, int]], mpps: Sequence[float] = (), **extra) -> Path:
    """A tiled TIFF of (px, subfile type) in this order; mpps: um/px that each page states."""
    with tifffile.TiffWriter(path, ome=extra.pop("ome", False)) as tiff:
        names = extra.pop("names", [None] * len(pages))
        for (pixels, kind), mpp, name in zip(pages, mpps or [0.5] * len(pages), names):
            tiff.write(
                pixels,
                photometric="rgb",
                tile=(64, 64),
                compression="zlib",
                subfiletype=kind,
                resolution=(1e4 / mpp, 1e4 / mpp),
                resolutionunit="CENTIMETER",
                metadata=None if name is None else {"axes": "YXS", "Name": name},
                **extra,
            )
    return path


@pytest.mark.parametrize(
    ("factor", "size", "fill"),
    [
        (2, (768, 448), 255),  # whole tiles of 64 px
        (2, (1024, 512), 255),  # whole tiles of 512 px
        (2, (704, 384), 255),  # cut to whole tiles
        (2, (768, 420), 0),  # padded across alone
        (3, (512, 320), 0),
        (4, (512, 256), 255),
        (5, (300, 192), 0),
    ],
)
def test_the_scale_of_a_level_padded_or_cut_is_measured(tmp_path, factor, size, fill):
    width, height = size
    level = fit(reduce(SLIDE, factor), width, height, fill)
    with open_slide(write(tmp_path / "a.tif", [(SLIDE, 0), (level, 1)])) as slide:
        assert slide.level_downsamples == (1.0, factor)
        assert slide.warnings == ()
        right, bottom = (min(a // factor, b) - 50 for a, b in zip((WIDTH, HEIGHT), size))
        for x, y in [(0, 0), (right // 2, bottom // 2), (right, bottom)]:
            got = slide.read_level(1, (x * factor, y * factor), (50, 50))
            wanted = slide.read_scaled((x * factor, y * factor), (50, 50), factor)
            true = reduce(SLIDE[y * factor : (y + 50) * factor, x * factor : (x + 50) * factor], factor)
            assert np.abs(got.astype(int) - true).mean() < 4  # OpenSlide blends px that lie between two of level 0
            assert np.abs(wanted.astype(int) - true).mean() < 4


@pytest.mark.parametrize(("width", "height"), [(900, 900), (1000, 500), (640, 1290)])
def test_ratios_that_agree_with_each_other_but_not_with_the_px_are_not_believed(tmp_path, width, height):
    whole = paint(1, width, height)
    grown = [round(side / 2 * 1.04) for side in (width, height)]
    level = fit(reduce(whole, 2), *grown)
    with open_slide(write(tmp_path / "a.tif", [(whole, 0), (level, 1)])) as slide:
        assert slide.level_downsamples == (1.0, 2.0)


def test_padding_beyond_the_slide_is_white(tmp_path):
    level = fit(reduce(SLIDE, 2), 768, 448, fill=0)
    with open_slide(write(tmp_path / "a.tif", [(SLIDE, 0), (level, 1)])) as slide:
        assert slide.level_sizes[1] == (750, 420)
        beyond = slide.read_level(1, (WIDTH, HEIGHT - 20), (20, 20))
        assert (beyond == 255).all()
        assert (slide.thumbnail(700)[0].min(2) > 0).all()


@pytest.mark.parametrize("size", [(400, 300), (512, 512), (750, 420), (300, 168), (700, 420)])
def test_a_picture_of_something_else_is_no_level(tmp_path, size):
    """A label or macro image marked as reduced: OpenSlide takes it for a level, whatever its size."""
    other = paint(9, *size)
    pages = [(SLIDE, 0), (other, 1), (reduce(SLIDE, 2), 1)]
    with open_slide(write(tmp_path / "a.tif", pages)) as slide:
        assert set(slide.level_downsamples) == {1.0, 2.0}
        assert str(size[0]) in slide.warnings[0]
        got = slide.read_scaled((0, 0), (WIDTH // 2, HEIGHT // 2), 2.0)
    assert np.abs(got.astype(int) - reduce(SLIDE, 2)).mean() < 1


@pytest.mark.parametrize("fill", [0, 128, 255])
@pytest.mark.parametrize("factor", [2, 4])
def test_a_level_that_shows_nothing_where_the_slide_does_is_left_out(tmp_path, fill, factor):
    """A conversion that broke off leaves a level of the right size without px."""
    empty = np.full_like(reduce(SLIDE, factor), fill)
    with open_slide(write(tmp_path / "a.tif", [(SLIDE, 0), (empty, 1)])) as slide:
        assert slide.level_downsamples == (1.0,)
        assert "not this slide" in slide.warnings[0]


def test_an_empty_level_in_the_middle_does_not_cost_the_good_one_behind_it(tmp_path):
    empty = np.full_like(reduce(SLIDE, 2), 255)
    with open_slide(write(tmp_path / "a.tif", [(SLIDE, 0), (empty, 1), (reduce(SLIDE, 4), 1)])) as slide:
        assert slide.level_downsamples == (1.0, 4.0)
        assert "750 x 420" in slide.warnings[0]


@pytest.mark.parametrize("fill", [0, 128, 255])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.7])
@pytest.mark.parametrize("level", [1, 2])
def test_a_level_with_holes_is_left_out_though_those_around_it_are_whole(tmp_path, fill, kept, level):
    """Wherever it stands, and where a killed writer got as far as part of its rows."""
    pages = [SLIDE, *(reduce(SLIDE, factor).copy() for factor in (2, 4, 8))]
    pages[level][round(kept * len(pages[level])) :] = fill
    with open_slide(write(tmp_path / "a.tif", [(page, int(i > 0)) for i, page in enumerate(pages)])) as slide:
        assert slide.level_downsamples == tuple(scale for i, scale in enumerate((1.0, 2.0, 4.0, 8.0)) if i != level)
        assert len(slide.warnings) == 1


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "change",
    [
        lambda px: px[:, ::-1],
        lambda px: px[::-1],
        lambda px: px[::-1, ::-1],
        lambda px: np.roll(px, (50, 70), (0, 1)),
        lambda px: 255 - px,
        lambda px: paint(4, *px.shape[1::-1]),
    ],
)
def test_a_level_in_the_middle_that_shows_other_px_is_left_out(tmp_path, change, level):
    pages = [SLIDE, *(reduce(SLIDE, factor) for factor in (2, 4, 8))]
    pages[level] = np.ascontiguousarray(change(pages[level]))
    with open_slide(write(tmp_path / "a.tif", [(page, int(i > 0)) for i, page in enumerate(pages)])) as slide:
        assert slide.level_downsamples == tuple(scale for i, scale in enumerate((1.0, 2.0, 4.0, 8.0)) if i != level)
        assert len(slide.warnings) == 1


@pytest.mark.parametrize("factors", [(2, 4, 8), (2, 8), (4, 16)])
@pytest.mark.parametrize("first", [0, 1])
def test_levels_of_every_nth_px_are_levels(tmp_path, factors, first):
    levels = [SLIDE[first * f // 2 :: f, first * f // 2 :: f][: HEIGHT // f, : WIDTH // f] for f in factors]
    path = write(tmp_path / "a.tif", [(SLIDE, 0), *((level, 1) for level in levels)])
    with open_slide(path) as slide:
        assert slide.level_downsamples == (1.0, *factors)
        assert slide.warnings == ()


@pytest.mark.parametrize("fill", [0, 200, 255])
def test_a_full_image_with_holes_is_told(tmp_path, fill):
    whole = SLIDE.copy()
    whole[400:] = fill
    with open_slide(write(tmp_path / "a.tif", [(whole, 0), (reduce(SLIDE, 2), 1), (reduce(SLIDE, 4), 1)])) as slide:
        assert slide.level_downsamples == (1.0, 2.0, 4.0)
        assert "not whole" in slide.warnings[0]


@pytest.mark.parametrize("fill", [0, 240, 255])
def test_glass_and_fill_are_no_holes(tmp_path, fill):
    whole = SLIDE.copy()
    whole[:, 512:1024] = fill
    pages = [(whole, 0), *((reduce(whole, factor), 1) for factor in (2, 4, 8))]
    with open_slide(write(tmp_path / "a.tif", pages)) as slide:
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)
        assert slide.warnings == ()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(750, 420), (375, 210), (450, 450), (600, 300)])
def test_a_label_is_no_level(tmp_path, size, seed):
    """Bars and lines of text on white, whatever their scale."""
    label, rng = Image.new("RGB", size, "white"), np.random.default_rng(seed)
    for _ in range(int(rng.integers(1, 7))):
        x, y = (int(rng.integers(0, side)) for side in size)
        label.paste((0, 0, 0), (x, y, x + int(rng.integers(20, 300)), y + int(rng.integers(5, 90))))
    with open_slide(write(tmp_path / "a.tif", [(SLIDE, 0), (np.asarray(label), 1)])) as slide:
        assert slide.level_downsamples == (1.0,)


@pytest.mark.parametrize("size", [(768, 448), (512, 256), (400, 300)])
def test_a_scale_that_cannot_be_measured_is_told(tmp_path, size):
    blank = np.full((HEIGHT, WIDTH, 3), 240, np.uint8)
    level = np.full((*size[::-1], 3), 240, np.uint8)
    with open_slide(write(tmp_path / "a.tif", [(blank, 0), (level, 1)])) as slide:
        assert any("too little to measure" in warning for warning in slide.warnings)


def test_levels_that_fit_are_not_read_to_be_measured():
    def never(*_args) -> np.ndarray:
        raise AssertionError("a level was read")

    sizes = [(40001, 30003), (20000, 15001), (10000, 7501), (5000, 3750), (312, 235)]
    assert measure_downsamples(sizes, never) == ([1.0, 2.0, 4.0, 8.0, 128.0], [])


# ---- pages


@pytest.mark.parametrize(("first", "rest"), [(4, (1, 2)), (2, (1,)), (8, (1, 2, 4)), (4, (2, 1))])
def test_a_reduced_page_first_is_read_at_its_own_scale_and_told(tmp_path, first, rest):
    factors = (first, *rest)
    pages = [(reduce(SLIDE, f) if f > 1 else SLIDE, int(f > 1)) for f in factors]
    with open_slide(write(tmp_path / "a.tif", pages, [0.25 * f for f in factors])) as slide:
        assert slide.size[0] * (slide.mpp or 0) == pytest.approx(WIDTH * 0.25, rel=0.01)
        assert "reduced" in slide.warnings[0]
        assert f"{WIDTH} x {HEIGHT}" in slide.warnings[0]


@pytest.mark.parametrize("size", [(375, 210), (300, 400), (160, 90)])
@pytest.mark.parametrize("kind", [0, 1, 9])
def test_a_macro_image_that_comes_first_is_never_shown(tmp_path, size, kind):
    path = write(tmp_path / "a.tif", [(paint(5, *size), kind), (SLIDE, 0)], [8.0, 0.5])
    with pytest.raises(SlideError, match=r"macro or label.*slide itself first"):
        open_slide(path)


@pytest.mark.parametrize("size", [(1400, 800), (600, 840), (420, 420)])
def test_a_larger_image_first_that_may_be_a_label_is_never_shown(tmp_path, size):
    """No name says so, and it is larger than the slide behind it."""
    slide, label = (paint(3, *size), 0), (paint(5, 1500, 1000), 0)
    for rest in ([slide], [slide, (reduce(slide[0], 2), 1)]):
        with pytest.raises(SlideError, match=r"may be its label.*neither is shown"):
            open_slide(write(tmp_path / "a.tif", [label, *rest], [8.0, *[0.5] * len(rest)]))


@pytest.mark.parametrize("size", [(500, 400), (840, 840), (300, 700)])
def test_another_large_image_beside_a_pyramid_is_told(tmp_path, size):
    pages = [(SLIDE, 0), (reduce(SLIDE, 2), 1), (paint(5, *size), 0)]
    with open_slide(write(tmp_path / "a.tif", pages)) as slide:
        assert slide.size == (WIDTH, HEIGHT)
        assert f"{size[0]} x {size[1]}" in slide.warnings[0]


@pytest.mark.parametrize("size", [(128, 128), (200, 100), (90, 240)])
def test_a_small_image_behind_the_slide_is_no_matter(tmp_path, size):
    with open_slide(write(tmp_path / "a.tif", [(SLIDE, 0), (paint(5, *size), 0)])) as slide:
        assert slide.warnings == ()


@pytest.mark.parametrize("name", ["macro image", "Label", "slide_overview", "Thumbnail"])
def test_an_ome_tiff_that_begins_with_another_image_is_refused(tmp_path, name):
    pages = [(reduce(SLIDE, 4), 0), (SLIDE, 0)]
    path = write(tmp_path / "a.ome.tif", pages, [2.0, 0.5], ome=True, names=[name, "main"])
    with pytest.raises(SlideError, match="OME-TIFF"):
        open_slide(path)


def test_an_ome_tiff_that_begins_with_the_slide_is_read(tmp_path):
    pages = [(SLIDE, 0), (paint(5, 300, 400), 0)]
    with open_slide(write(tmp_path / "a.ome.tif", pages, ome=True, names=["main", "label"])) as slide:
        assert slide.size == (WIDTH, HEIGHT)
        assert slide.warnings == ()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_other_images_of_full_size_are_told(tmp_path, count):
    pages = [(paint(i), 0) for i in range(count)]
    with open_slide(write(tmp_path / "a.tif", pages)) as slide:
        assert f"{count} images" in slide.warnings[0]
        np.testing.assert_array_equal(slide.read_scaled((0, 0), (90, 90), 1.0), paint(0)[:90, :90])


def test_of_two_levels_of_one_size_the_one_that_fits_is_read(tmp_path):
    for seed, order in ((7, (0, 1)), (8, (1, 0))):
        twins = [(reduce(SLIDE, 2), 1), (reduce(paint(seed), 2), 1)]
        with open_slide(write(tmp_path / f"{seed}.tif", [(SLIDE, 0), *(twins[i] for i in order)])) as slide:
            got = slide.read_scaled((0, 0), (WIDTH // 2, HEIGHT // 2), 2.0)
            assert np.abs(got.astype(int) - twins[0][0]).mean() < 1
            assert slide.warnings
