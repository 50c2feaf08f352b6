"""Slides: exact scale, white beyond the border, the source of the resolution, one sentence for what is no slide."""

import copy
import dataclasses
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from openslide import lowlevel
from PIL import Image

from sparsewsi.slides import slide as slide_module
from sparsewsi.slides import sources
from sparsewsi.slides.refusals import SlideError, quote_reason
from sparsewsi.slides.slide import open_slide
from sparsewsi.slides.tiff import TiffTiles
from sparsewsi.slides.tissue import patch_coords, tissue_mask

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (200, 320, 3), dtype=np.uint8)


def write_tiff(
    path: Path, levels, mpp: float | tuple[float, float] | None = 0.5, description: str | None = None, **extra
) -> Path:
    """A tiled, lossless pyramidal TIFF of the arrays in levels, as OpenSlide's generic-tiff reads it."""
    across, down = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate(levels):
            if across and down:
                factor = levels[0].shape[1] / level.shape[1]
                extra |= {"resolution": (1e4 / across / factor, 1e4 / down / factor), "resolutionunit": "CENTIMETER"}
            tiff.write(
                level,
                photometric="rgb",
                tile=(64, 64),
                compression="zlib",
                metadata=None,
                description=description if i == 0 else None,
                subfiletype=1 if i else 0,
                **extra,
            )
    return path


def write_scn(path: Path, rgb: np.ndarray, collection: tuple[int, int], corner: tuple[int, int], nm: int = 500) -> Path:
    """A Leica SCN of a scan smaller than the slide, with bounds and px that hold nothing; (w, h), px of nm nm."""
    (height, width), (x, y) = rgb.shape[:2], corner
    scan = (
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
        "<numericalAperture>0.5</numericalAperture><illuminationSource>brightfield</illuminationSource>"
        "</illuminationSettings></scanSettings>"
    )

    def image(name: str, view: tuple[int, int, int, int], dimensions: list[tuple[int, int, int]]) -> str:
        listed = "".join(
            f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{ifd}"/>' for r, (w, h, ifd) in enumerate(dimensions)
        )
        return (
            f'<image name="{name}"><creationDate>2020-01-01T00:00:00Z</creationDate><device model="m" version="1"/>'
            f'<pixels sizeX="{dimensions[0][0]}" sizeY="{dimensions[0][1]}">{listed}</pixels>'
            f'<view sizeX="{view[2] * nm}" sizeY="{view[3] * nm}" offsetX="{view[0] * nm}" '
            f'offsetY="{view[1] * nm}"/>{scan}</image>'
        )

    half = rgb.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3)).astype(np.uint8)
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c" '
        f'sizeX="{collection[0] * nm}" sizeY="{collection[1] * nm}">'
        + image("macro", (0, 0, *collection), [(64, 64, 2)])
        + image("main", (x, y, width, height), [(width, height, 0), (width // 2, height // 2, 1)])
        + "</collection></scn>"
    )
    macro = np.full((64, 64, 3), 240, np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for i, (level, scale) in enumerate([(rgb, 1), (half, 2), (macro, 1)]):
            tiff.write(
                level,
                photometric="rgb",
                tile=(64, 64),
                compression="jpeg",
                compressionargs={"level": 98},
                resolution=(1e7 / nm / scale, 1e7 / nm / scale),
                resolutionunit="CENTIMETER",
                metadata=None,
                description=xml if i == 0 else None,
            )
    return path


def refusal(path, **kwargs) -> str:
    """The sentence with which a slide is refused, on opening or on the first reading."""

    def use() -> None:
        with open_slide(path, **kwargs) as slide:
            slide.thumbnail(64)
            slide.require_mpp()

    with pytest.raises(SlideError) as caught:
        use()
    return str(caught.value)


# ---- reading ----


@pytest.mark.parametrize(("mpp", "wanted"), [(0.5, 1.25), (0.4, 0.5), (0.25, 0.5), (0.499, 0.5), (0.5, 7.3)])
def test_every_px_is_the_mean_of_exactly_its_area(tmp_path, mpp, wanted):
    ratio = wanted / mpp
    size = (int(150 / ratio), int(90 / ratio))
    x, y = 21, 34
    with open_slide(write_tiff(tmp_path / "a.tiff", [NOISE], mpp)) as slide:
        got = slide.read((x, y), size, wanted)
    for row, column in [(0, 0), (size[1] - 1, size[0] - 1), (size[1] // 2, size[0] // 3)]:
        weights = [
            np.clip(np.minimum(edge + ratio, np.arange(n) + 1) - np.maximum(edge, np.arange(n)), 0, None)
            for edge, n in ((y + row * ratio, 200), (x + column * ratio, 320))
        ]
        mean = np.einsum("i,j,ijc->c", *weights, NOISE.astype(float)) / ratio**2
        np.testing.assert_allclose(got[row, column], mean, atol=0.51)


def test_a_known_pattern_has_its_size_at_every_resolution(tmp_path):
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, (np.arange(400) // 20) % 2 == 1] = 255  # 10 um wide at 0.5 um/px
    with open_slide(write_tiff(tmp_path / "a.tiff", [stripes, stripes[::2, ::2]])) as slide:
        for mpp in (0.3, 0.5, 0.7, 1.0, 1.3, 2.0):
            row = slide.read((0, 100), (int(180 / mpp), 1), mpp)[0, :, 0].astype(float)
            crossings = np.nonzero((row[:-1] < 127) & (row[1:] >= 127))[0] + 1
            np.testing.assert_allclose(np.diff(crossings) * mpp, 20.0, atol=2 * mpp)
            assert abs(crossings[0] * mpp - 10.0) <= mpp


def test_the_nearest_finer_level_is_read(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    levels = [np.full((512 >> i, 512 >> i, 3), c, np.uint8) for i, c in enumerate(colours)]
    with open_slide(write_tiff(tmp_path / "a.tiff", levels, 0.25)) as slide:
        for mpp, level in [(0.2, 0), (0.25, 0), (0.49, 0), (0.5, 1), (0.9, 1), (1.0, 2), (8.0, 2)]:
            assert tuple(slide.read((0, 0), (8, 8), mpp)[2, 2]) == colours[level], mpp


@pytest.mark.parametrize("mpp", [0.5, 1.0, 0.8, 0.35])
def test_blocks_and_neighbours_join_without_a_seam(tmp_path, monkeypatch, mpp):
    with open_slide(write_tiff(tmp_path / "a.tiff", [NOISE])) as slide:
        whole = slide.read((-7, -3), (120, 80), mpp)
        step = 40 * mpp / 0.5
        apart = [slide.read((-7 + i * step, -3), (40, 80), mpp) for i in range(3)]
        monkeypatch.setattr(slide_module, "BLOCK", (64, 48))
        blocks = slide.read((-7, -3), (120, 80), mpp)
    assert np.abs(whole.astype(int) - np.concatenate(apart, 1)).max() <= 1
    assert np.abs(whole.astype(int) - blocks).max() <= 1


@pytest.mark.parametrize("kind", ["tiff", "png"])
def test_white_beyond_the_borders(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write_tiff(path, [NOISE]) if kind == "tiff" else Image.fromarray(NOISE).save(path)
    with open_slide(path, slide_mpp=0.5) as slide:
        corner = slide.read((-10, -20), (30, 40), 0.5)
        far = slide.read((310, 190), (30, 40), 0.5)
        nowhere = slide.read((5000, -5000), (8, 8), 0.5)
    np.testing.assert_array_equal(corner[20:, 10:], NOISE[:20, :20])
    np.testing.assert_array_equal(far[:10, :10], NOISE[190:, 310:])
    assert (corner[:20] == 255).all()
    assert (corner[:, :10] == 255).all()
    assert (far[10:] == 255).all()
    assert (far[:, 10:] == 255).all()
    assert (nowhere == 255).all()


def test_rounded_level_sizes_do_not_shift_the_far_edge(tmp_path):
    wide = np.full((64, 4003, 3), 255, np.uint8)
    wide[:, 3200:] = 0
    small = wide[::16, ::16]  # 251 px: OpenSlide takes the level to be 15.97 times smaller
    with open_slide(write_tiff(tmp_path / "a.tiff", [wide, small])) as slide:
        assert slide.level_downsamples == (1.0, 16.0)
        left, right = slide.read_level(1, (3200 - 16, 0), (2, 1))[0, :, 0]
        assert left > 250  # OpenSlide takes whole level-0 px for the corner and blends the rest away
        assert right == 0


def test_thumbnail_covers_the_slide_and_is_never_enlarged(tmp_path):
    with open_slide(write_tiff(tmp_path / "a.tiff", [NOISE])) as slide:
        small, scale = slide.thumbnail(100)
        assert small.shape == (63, 100, 3)
        assert scale == 3.2
        same, scale = slide.thumbnail(1000)
        assert scale == 1
        np.testing.assert_array_equal(same, NOISE)


def test_bounds_and_empty_px_of_a_scan_smaller_than_the_slide(tmp_path):
    path = write_scn(tmp_path / "a.scn", np.full((256, 384, 3), 100, np.uint8), (1000, 800), (300, 400))
    with open_slide(path) as slide:
        assert (slide.size, slide.bounds, slide.mpp, slide.vendor) == ((1000, 800), (300, 400, 384, 256), 0.5, "leica")
        assert slide.mpp_source == "openslide"
        region = slide.read((290, 390), (20, 20), 0.5)
    assert (region[:10] == 255).all()
    assert (region[:, :10] == 255).all()
    assert np.abs(region[10:, 10:].astype(int) - 100).max() <= 2


def test_tissue_is_searched_within_the_bounds_on_the_grid_of_the_slide(tmp_path):
    rgb = np.full((512, 768, 3), (190, 120, 170), np.uint8)
    with open_slide(write_scn(tmp_path / "a.scn", rgb, (3000, 2000), (1010, 715), nm=2000)) as slide:
        assert slide.mpp == 2.0
        coords = patch_coords(slide, 2.0, 56)
        everything = patch_coords(slide, 2.0, 56, min_tissue=0)
        mask, scale = tissue_mask(slide)
    y, x = np.nonzero(mask)
    assert abs(x.min() * scale - 1010) <= 2 * scale
    assert abs((x.max() + 1) * scale - 1778) <= 2 * scale
    assert abs(y.min() * scale - 715) <= 2 * scale
    for c in (coords, everything):
        assert (c % 56 == 0).all()
        assert (c > np.array([1010, 715]) - 56).all()
        assert (c < np.array([1778, 1227])).all()
    assert len(coords) >= 13 * 9
    assert len(everything) == 14 * 10


def test_threads_may_share_a_slide(tmp_path):
    for name in ("a.tiff", "a.png"):
        path = tmp_path / name
        write_tiff(path, [NOISE]) if name == "a.tiff" else Image.fromarray(NOISE).save(path)
        with open_slide(path) as slide, ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda y, s=slide: s.read_scaled((0, y), (320, 1), 1.0), range(200)))
        np.testing.assert_array_equal(np.concatenate(rows), NOISE)


# ---- without OpenSlide ----

SMOOTH = np.asarray(Image.fromarray(NOISE).resize((800, 500), Image.Resampling.BICUBIC))


APERIO = "Aperio Image Library v1\r\n800x500 (64x64) J2K/KDU Q=90|AppMag = 20|MPP = 0.5"


def write_compressed(
    path: Path, photometric: str = "ycbcr", compression: str = "jpeg", levels: int = 2, description: str | None = None
) -> Path:
    """A pyramid of 64 px tiles, its last tiles cut by the border; a level is half as wide as the one before."""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            tiff.write(
                np.asarray(Image.fromarray(SMOOTH).reduce(2**level)),
                photometric=photometric,
                tile=(64, 64),
                compression=compression,
                compressionargs={"level": 90},
                description=description,
                resolution=(2e4 / 2**level, 2e4 / 2**level),
                resolutionunit="CENTIMETER",
                metadata=None,
                subfiletype=1 if level else 0,
            )
    return path


def damage(path: Path, tile: int, start: float = 0.0) -> None:
    """Zeros over a tile of the finest level, from a fraction of its data on."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, length = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset + int(start * length))
        file.write(bytes(length - int(start * length)))


def source_of(slide) -> Any:
    return slide._source


def direct(slide, level: int = 0) -> bool:
    return source_of(slide)._direct(level) is not None


@pytest.mark.parametrize("kind", ["YCbCr", "RGB", "JPEG 2000"])
def test_px_read_without_openslide_are_those_of_openslide(tmp_path, kind):
    path = tmp_path / "a.svs"
    if kind == "JPEG 2000":
        write_compressed(path, "rgb", "aperio_jp2000_rgb", levels=1, description=APERIO)
    else:
        write_compressed(path, kind.lower(), "jpeg")
    with open_slide(path) as slide:
        assert all(direct(slide, level) for level in range(len(slide.level_sizes)))
        for level, (width, height) in enumerate(slide.level_sizes):
            for x, y, w, h in RNG.integers((-90, -90, 1, 1), (width + 20, height + 20, 300, 200), (40, 4)).tolist():
                theirs = source_of(slide)._read_openslide(level, (x, y), (w, h))
                np.testing.assert_array_equal(source_of(slide).read(level, (x, y), (w, h)), theirs)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000", "png"])
def test_patches_go_where_they_are_wanted(tmp_path, kind):
    """Whole tiles are decoded there, parts of tiles and what lies beyond the slide are copied."""
    if kind == "png":
        Image.fromarray(SMOOTH).save(path := tmp_path / "a.png")
    else:
        how: dict[str, Any] = {"compression": "aperio_jp2000_rgb", "levels": 1, "description": APERIO}
        path = write_compressed(tmp_path / "a.svs", "rgb", **(how if kind == "jpeg2000" else {}))
    with open_slide(path, slide_mpp=0.5) as slide:
        size = (64, 64)
        corners = [(0, 0), size, (17, 40), (-30, -9), (slide.size[0] - 5, 0)]
        out = np.full((len(corners), *size[::-1], 3), 7, np.uint8)
        pixels, fine = slide.read_batch(corners, size, 0.5, out)
        assert pixels is out
        assert fine.all()
        for corner, patch in zip(corners, pixels):
            np.testing.assert_array_equal(patch, slide.read(corner, size, 0.5))


def test_neighbours_that_share_tiles_decode_them_once(tmp_path):
    with open_slide(write_compressed(tmp_path / "a.tiff")) as slide:
        assert direct(slide)
        decoded: list[int] = []
        grid = source_of(slide)._tiles._grids[0]

        def decode(data: bytes, number: int) -> np.ndarray:
            decoded.append(number)
            return grid.decode(data, number)

        source_of(slide)._tiles._grids[0] = dataclasses.replace(grid, decode=decode)
        for y in range(0, 480, 40):
            for x in range(0, 760, 40):
                slide.read((x, y), (40, 40), 0.5)
        assert sorted(decoded) == sorted(set(decoded))


def test_a_tile_that_ends_early_is_damage_and_spoils_no_other(tmp_path):
    for start in (0.0, 0.5):
        path = write_compressed(tmp_path / f"{start}.tiff")
        damage(path, 15, start)  # x 128 to 192, y 64 to 128
        with open_slide(path) as slide, ThreadPoolExecutor(4) as pool:
            assert direct(slide)

            def fails(xy, slide=slide) -> bool:
                try:
                    slide.read(xy, (64, 64), 0.5)
                except SlideError:
                    return True
                return False

            places = [(x, y) for y in range(0, 448, 64) for x in range(0, 768, 64)]
            assert [xy for xy, failed in zip(places, pool.map(fails, places)) if failed] == [(128, 64)]


def test_openslide_reads_on_after_a_damaged_tile(tmp_path, monkeypatch):
    path = write_compressed(tmp_path / "a.tiff")
    damage(path, 15)
    monkeypatch.setattr(sources, "TIFF_VENDORS", ())
    with open_slide(path) as slide:
        assert not direct(slide)
        before = slide.read((256, 64), (64, 64), 0.5)
        with pytest.raises(SlideError, match="damaged or cut short"):
            slide.read((128, 64), (64, 64), 0.5)
        np.testing.assert_array_equal(slide.read((256, 64), (64, 64), 0.5), before)


def test_what_does_not_agree_with_openslide_is_left_to_it(tmp_path, monkeypatch):
    path = write_compressed(tmp_path / "a.tiff")
    read = TiffTiles.read
    monkeypatch.setattr(TiffTiles, "read", lambda *args: read(*args) ^ 1)
    with open_slide(path) as slide:
        assert not direct(slide)
        theirs = source_of(slide)._read_openslide(0, (0, 0), (800, 500))
        np.testing.assert_array_equal(slide.read((0, 0), (800, 500), 0.5), theirs)
    with open_slide(write_tiff(tmp_path / "b.tiff", [NOISE])) as slide:  # deflate
        assert not direct(slide)


# ---- resolution ----


def mpp_of(path, **kwargs) -> tuple[float | None, str | None]:
    with open_slide(path, **kwargs) as slide:
        return slide.mpp, slide.mpp_source


def test_resolution_and_where_it_comes_from(tmp_path):
    aperio = "Aperio Image Library v1\r\n320x200 (64x64) JPEG/RGB Q=90"
    plain = write_tiff(tmp_path / "plain.tiff", [NOISE], 0.2501)
    stated = write_tiff(tmp_path / "stated.svs", [NOISE], None, description=f"{aperio}|AppMag = 20|MPP = 0.4990")
    power = write_tiff(tmp_path / "power.svs", [NOISE], None, description=f"{aperio}|AppMag = 40")
    tags = write_tiff(tmp_path / "tags.svs", [NOISE], 0.3, description=f"{aperio}|AppMag = 40")
    nothing = write_tiff(tmp_path / "nothing.svs", [NOISE], None, description=aperio)
    assert mpp_of(plain) == (pytest.approx(0.2501, rel=1e-6), "tiff resolution")
    assert mpp_of(stated) == (0.499, "openslide")
    assert mpp_of(power) == (0.25, "objective power")
    assert mpp_of(tags)[1] in ("tiff resolution", "objective power")
    assert mpp_of(nothing) == (None, None)
    assert mpp_of(stated, slide_mpp=0.25) == (0.25, "argument")
    with open_slide(nothing) as slide:
        slide.thumbnail(50)
        with pytest.raises(SlideError, match=r"states no resolution.*slide_mpp="):
            slide.read((0, 0), (8, 8), 0.5)


@pytest.mark.parametrize("dpi", [1, 72, 96, 150, 300, 600, 1e6])
def test_a_default_of_a_program_is_no_resolution(tmp_path, dpi):
    path = write_tiff(tmp_path / "a.tiff", [NOISE], None, resolution=(dpi, dpi), resolutionunit="INCH")
    assert mpp_of(path) == (None, None)
    assert "slide_mpp=" in refusal(path)


def test_px_that_are_not_square(tmp_path):
    nearly = write_tiff(tmp_path / "a.tiff", [NOISE], (0.5, 0.51))
    oblong = write_tiff(tmp_path / "b.tiff", [NOISE], (0.5, 1.0))
    with open_slide(nearly) as slide:
        assert slide.mpp == pytest.approx((0.5 * 0.51) ** 0.5)
        assert "0.51" in slide.warnings[0]
    sentence = refusal(oblong)
    assert "0.5 µm/px across and 1 down" in sentence
    assert "slide_mpp=" in sentence
    assert mpp_of(oblong, slide_mpp=0.7) == (0.7, "argument")


def test_a_resolution_that_contradicts_the_objective_is_told(tmp_path):
    text = "Aperio Image Library v1\r\n320x200 (64x64) JPEG/RGB Q=90|AppMag = 40|MPP = 2.5"
    with open_slide(write_tiff(tmp_path / "a.svs", [NOISE], None, description=text)) as slide:
        assert slide.mpp == 2.5
        assert "40x" in slide.warnings[0]


@pytest.mark.parametrize("slide_mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_resolution_given_must_be_positive(tmp_path, slide_mpp):
    with pytest.raises(SlideError, match="positive"):
        open_slide(tmp_path / "whatever", slide_mpp=slide_mpp)


def test_up_to_twice_enlarged_is_told_and_beyond_refused(tmp_path):
    path = write_tiff(tmp_path / "a.tiff", [NOISE], None)
    with open_slide(path, slide_mpp=1.0) as slide:
        assert slide.check_mpp(1.0) is None
        assert slide.check_mpp(2.0) is None
        assert "2 times" in (slide.check_mpp(0.5) or "")
        assert slide.read((0, 0), (16, 16), 0.5).shape == (16, 16, 3)
        with pytest.raises(SlideError, match=r"1 µm/px.*0\.49 µm/px"):
            slide.check_mpp(0.49)
        with pytest.raises(SlideError, match="positive"):
            slide.check_mpp(0.0)


# ---- PNG and JPEG ----


def test_png_and_jpeg_are_slides_of_one_level(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png", dpi=(72, 72))
    smooth = np.full((200, 320, 3), (180, 120, 160), np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    with open_slide(tmp_path / "a.png", slide_mpp=0.25) as slide:
        assert (slide.vendor, slide.level_sizes, slide.mpp_source) == ("png", ((320, 200),), "argument")
        np.testing.assert_array_equal(slide.read((5, 6), (30, 20), 0.25), NOISE[6:26, 5:35])
    with open_slide(tmp_path / "a.jpg", slide_mpp=0.25) as slide:
        assert slide.vendor == "jpeg"
        assert np.abs(slide.read((0, 0), (100, 60), 0.5).astype(int) - smooth[0, 0]).max() <= 3
    assert "slide_mpp=" in refusal(tmp_path / "a.png")


def test_transparent_px_of_a_png_are_white(tmp_path):
    rgba = np.dstack([NOISE, np.full((200, 320), 255, np.uint8)])
    rgba[:100, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", slide_mpp=0.5) as slide:
        whole = slide.read((0, 0), (320, 200), 0.5)
    assert (whole[:100] == 255).all()
    np.testing.assert_array_equal(whole[100:], NOISE[100:])


def test_images_that_are_too_large_too_deep_or_cut_short(tmp_path, monkeypatch):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "head.png").write_bytes(content[:20])
    assert "16 or 32 bits" in refusal(tmp_path / "deep.png")
    assert "cut short" in refusal(tmp_path / "cut.png")
    assert "cut short" in refusal(tmp_path / "head.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    open_slide(tmp_path / "a.png").close()  # between the limit and twice the limit Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    assert "pyramidal TIFF" in refusal(tmp_path / "a.png")


# ---- what is refused ----


def test_what_is_no_slide_gets_one_sentence_without_its_name(tmp_path):
    good = write_tiff(tmp_path / "good-PATIENT.tiff", [NOISE]).read_bytes()
    big_endian = tmp_path / "be-PATIENT.tiff"
    with tifffile.TiffWriter(big_endian, byteorder=">") as tiff:
        tiff.write(NOISE, photometric="rgb", metadata=None)
    ome = tmp_path / "PATIENT.ome.tif"
    tifffile.imwrite(ome, NOISE[..., 0], ome=True)
    folder = tmp_path / "PATIENT-folder"
    folder.mkdir()
    (folder / "x.txt").write_text("x")
    mrxs = tmp_path / "PATIENT"
    mrxs.mkdir()
    (mrxs / "Slidedat.ini").write_text("[GENERAL]")
    fifo = tmp_path / "PATIENT-fifo"
    os.mkfifo(fifo)
    cases = {
        "absent.svs": (None, "no file"),
        "empty.svs": (b"", "empty"),
        "zeros.svs": (bytes(5000), "zeros"),
        "junk.svs": (bytes(RNG.integers(0, 256, 5000, dtype=np.uint8)), "not a slide"),
        "page.svs": (b"<!DOCTYPE html><html>404 Not Found</html>\n" * 9, "text"),
        "cut.tiff": (good[:6] + b"\xff" * 2 + good[8:], "cut short"),
        "short.tiff": (good[:30], "cut short"),
        "slide.mrxs": (b"\xff\xd8\xff\xe0" + bytes(300), "data folder"),
        "part.dcm": (bytes(128) + b"DICM" + bytes(300), "DICOM"),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / f"PATIENT-{name}"
        if content is not None:
            path.write_bytes(content)
        cases[name] = (path, expected)
    more = [(big_endian, "tiled TIFF"), (ome, "OME-TIFF"), (folder, "folder"), (mrxs, ".mrxs file"), (fifo, "neither")]
    for path, expected in [*cases.values(), *more, ("", "No slide"), ("a\0b", "no"), ("x" * 5000, "cannot be read")]:
        sentence = refusal(path)
        assert expected in sentence, (path, sentence)
        assert "PATIENT" not in sentence
        assert str(tmp_path) not in sentence
        assert "\n" not in sentence
        assert sentence.endswith(".")


def test_a_slide_whose_data_are_cut_short_is_refused_when_read(tmp_path):
    content = write_tiff(tmp_path / "a.tiff", [NOISE]).read_bytes()
    for share in (0.95, 0.6, 0.2):
        (tmp_path / "cut.tiff").write_bytes(content[: int(len(content) * share)])
        assert refusal(tmp_path / "cut.tiff")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = write_tiff(tmp_path / "a.tiff", [NOISE])
    path.chmod(0)
    assert "permission" in refusal(path)


def test_permission_denied_is_told_as_such(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tiff", [NOISE])

    def deny(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", deny)
    sentence = refusal(path)
    assert "permission" in sentence
    assert "a.tiff" not in sentence


def test_messages_of_openslide_that_may_name_files_are_left_out():
    assert quote_reason("Unsupported TIFF compression: 52479") == ": Unsupported TIFF compression: 52479"
    for error in (
        "Couldn't open /data/P12/x.dat",
        r"no C:\x",
        "missing Slidedat.ini",
        "",
        f"Bad {'A' * 3000}",
        "a \x1b[2J",
    ):
        assert quote_reason(error) == ""


# ---- names, privacy, lifetime ----


def test_the_name_tells_slides_apart_without_naming_them(tmp_path):
    one = write_tiff(tmp_path / "TCGA-AA-0001.tiff", [NOISE])
    two = write_tiff(tmp_path / "TCGA-AA-0002.tiff", [NOISE[::-1].copy()])
    moved = tmp_path / "elsewhere.tiff"
    shutil.copy(one, moved)
    names = []
    for path in (one, two, moved):
        with open_slide(path) as slide:
            names.append(slide.name)
            assert "TCGA" not in repr(slide)
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("slide ")
    assert len(names[0]) == len("slide ") + 8


def test_a_phantom_is_called_one(tmp_path):
    text = json.dumps({"sparsewsi_phantom": {"seed": 7, "kind": "x"}})
    with open_slide(write_tiff(tmp_path / "a.tiff", [NOISE], description=text)) as slide:
        assert (slide.name, slide.phantom_seed) == ("phantom 7", 7)
    for odd in ('{"sparsewsi_phantom": 3}', '{"sparsewsi_phantom": {"seed": "../x"}}', '{"sparsewsi_phantom"'):
        with open_slide(write_tiff(tmp_path / "b.tiff", [NOISE], description=odd)) as slide:
            assert slide.phantom_seed is None
            assert slide.name.startswith("slide ")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, '{"sparsewsi_phantom": 7}', '{"sparsewsi_phantom": ']
)
def test_a_description_that_only_begins_as_a_phantoms_makes_none(tmp_path, text):
    description = text if "phantom" in text else f'"sparsewsi_phantom" {text}'
    path = write_tiff(tmp_path / "a.tiff", [NOISE], description=description)
    with open_slide(path) as slide:
        assert slide.phantom_seed is None


def test_label_and_macro_images_are_never_opened(tmp_path, monkeypatch):
    def opened(*args):
        raise AssertionError("an associated image was opened")

    monkeypatch.setattr(lowlevel, "read_associated_image", opened)
    monkeypatch.setattr(lowlevel, "get_associated_image_names", opened)
    path = write_scn(tmp_path / "a.scn", np.full((256, 384, 3), 100, np.uint8), (1000, 800), (300, 400))
    with open_slide(path) as slide:
        slide.thumbnail(100)
        slide.read((0, 0), (64, 64), 0.5)


def test_a_slide_is_not_pickled_copied_or_read_after_closing(tmp_path):
    for name in ("a.tiff", "a.png"):
        path = tmp_path / name
        write_tiff(path, [NOISE]) if name == "a.tiff" else Image.fromarray(NOISE).save(path)
        with open_slide(path, slide_mpp=0.5) as slide:
            for copier in (pickle.dumps, copy.deepcopy, copy.copy):
                with pytest.raises(TypeError, match="open file"):
                    copier(slide)
        with pytest.raises(SlideError, match="closed"):
            slide.read((0, 0), (8, 8), 0.5)
        slide.close()


# ---- real slides, where they are ----


@pytest.mark.parametrize(
    ("name", "vendor", "mpp"),
    [
        ("slides/CMU-1-Small-Region.svs", "aperio", 0.499),
        ("slides/TCGA-CR-7395-01A-01-TS1.svs", "aperio", None),
        ("slides/hamamatsu_test3-DAPI-2-387.ndpi", "hamamatsu", 0.2282),
        ("slides/boxes.tiff", "generic-tiff", None),
        ("slides/dicom_boxes", "dicom", 0.499),
        ("slides/dicom_boxes/boxes_1.dcm", "dicom", 0.499),
        ("slides/dicom_camelyon", "dicom", 28.97),
        ("slides/images/tcga-red-pen.png", "png", None),
        ("wsi/celiac-disease__whole_1.0mpp.tiff", "generic-tiff", 1.0),
    ],
)
def test_real_slides_open(shared_data, name, vendor, mpp):
    with open_slide(shared_data / name) as slide:
        assert slide.vendor == vendor
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-3))
        thumbnail, scale = slide.thumbnail(256)
        assert max(thumbnail.shape) <= 256
        assert thumbnail.shape[1] * scale >= slide.size[0]


def test_a_dicom_slide_has_one_name_whichever_file_is_given(shared_data):
    folder = shared_data / "slides/dicom_boxes"
    names = set()
    for path in (folder, folder / "boxes_0.dcm", folder / "boxes_1.dcm"):
        with open_slide(path) as slide:
            names.add(slide.name)
    assert len(names) == 1


def test_a_folder_of_several_dicom_slides_is_refused(shared_data, tmp_path):
    for file in ("dicom_boxes/boxes_0.dcm", "dicom_highdicom/highdicom_sm_image.dcm"):
        shutil.copy(shared_data / "slides" / file, tmp_path)
    assert "several" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unopenable.tiff", "compression"),
        ("unreadable.svs", "damaged"),
        ("histolab_broken.svs", "text"),
        ("qupath_OS-1-detail.ome.tif", "OME-TIFF"),
        ("qupath_OS-2-ndpi.ome.tif", "pyramidal TIFF"),
        ("images", "folder"),
    ],
)
def test_real_files_that_are_no_slide(shared_data, name, words):
    assert words in refusal(shared_data / "slides" / name)
