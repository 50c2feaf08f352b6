"""What holds the px: OpenSlide decides about damage, and no file is shown in other colours than it holds."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from sparsewsi.bags.extract import read_patches
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import open_slide
from sparsewsi.slides.tiff import has_end

TILE = 128


def paint(width: int = 640, height: int = 384) -> np.ndarray:
    rng = np.random.default_rng(0)
    grain = rng.integers(90, 220, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC))


PIXELS = paint()


def write_jpeg(path: Path, change: Callable[[bytes], bytes], codec: str = "jpeg") -> Path:
    """A TIFF of JPEG or JPEG 2000 tiles, every third of them changed."""
    tiles = []
    for i, top in enumerate(range(0, PIXELS.shape[0], TILE)):
        for j, left in enumerate(range(0, PIXELS.shape[1], TILE)):
            px = np.ascontiguousarray(PIXELS[top : top + TILE, left : left + TILE])
            data = bytes(imagecodecs.jpeg8_encode(px, level=92)) if codec == "jpeg" else j2k(px)
            tiles.append(change(data) if (i + j) % 3 == 2 else data)
    aperio = "Aperio Image Library v1\r\n640x384 (128x128) J2K/KDU Q=90|AppMag = 20|MPP = 0.5"
    how = {"photometric": "ycbcr", "subsampling": (2, 2), "compression": "jpeg"}
    if codec != "jpeg":
        how = {"photometric": "rgb", "compression": "aperio_jp2000_rgb", "description": aperio}
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=PIXELS.shape,
        dtype=np.uint8,
        tile=(TILE, TILE),
        metadata=None,
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
        **how,  # type: ignore[arg-type]
    )
    return path


def j2k(px: np.ndarray) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(px, level=0, codecformat="j2k"))


def with_segment(marker: int, content: bytes) -> Callable[[bytes], bytes]:
    """A header segment put behind the start of a JPEG."""
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
    return lambda data: data[:2] + segment + data[2:]


THUMBNAIL = imagecodecs.jpeg8_encode(np.zeros((16, 16, 3), np.uint8))

WHOLE = {
    "zeros behind": lambda data: data + bytes(3000),
    "one byte behind": lambda data: data + b"\xff",
    "FF behind": lambda data: data + b"\xff" * 600,
    "another JPEG behind": lambda data: data + THUMBNAIL,
    "text behind": lambda data: data + b"redacted " * 50,
    "EXIF thumbnail": with_segment(0xE1, b"Exif\0\0" + THUMBNAIL),
    "comment with an end": with_segment(0xFE, b"\xff\xd9" * 20),
    "fill bytes before a marker": lambda data: data[:2] + b"\xff\xff" + data[2:],
}


def lost_patches(path: Path) -> int:
    grid = [(x, y) for y in range(0, 384, 64) for x in range(0, 640, 64)]
    with open_slide(path) as slide:
        return sum(int((~fine).sum()) for _, fine in read_patches(slide, np.array(grid), 0.5, 64))


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_tile_with_more_bytes_in_it_loses_no_patch(tmp_path, kind):
    path = write_jpeg(tmp_path / "a.tif", WHOLE[kind])
    plain = write_jpeg(tmp_path / "b.tif", lambda data: data)
    assert lost_patches(path) == 0
    with open_slide(path) as slide, open_slide(plain) as other:
        np.testing.assert_array_equal(slide.read((0, 0), (640, 384), 0.5), other.read((0, 0), (640, 384), 0.5))


@pytest.mark.parametrize("behind", [bytes(2000), b"\xff" * 400, b"x"])
def test_a_whole_tile_of_jpeg_2000_with_more_bytes_behind_it_loses_no_patch(tmp_path, behind):
    assert lost_patches(write_jpeg(tmp_path / "a.svs", lambda data: data + behind, "j2k")) == 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("filler", [b"", b"\0", b"\xff"])
def test_a_tile_that_is_cut_loses_its_patches(tmp_path, share, filler):
    def cut(data: bytes) -> bytes:
        kept = data[: int(len(data) * share)]
        return kept + filler * (len(data) - len(kept))

    assert lost_patches(write_jpeg(tmp_path / "a.tif", cut)) == 4 * 5  # 5 of 15 tiles, 4 patches each


def test_the_end_of_a_tile_is_found_behind_its_headers():
    jpeg = bytes(imagecodecs.jpeg8_encode(PIXELS))
    for data in (jpeg, j2k(PIXELS)):
        assert has_end(data)
        assert has_end(data + bytes(99))
        assert not has_end(data[:-2])
        assert not has_end(data[:100])
    assert not has_end(with_segment(0xE1, b"Exif\0\0" + THUMBNAIL)(jpeg)[:-2])
    assert not has_end(b"")


# ---- channels, bits, orientation


def write(path: Path, pixels: np.ndarray, **how) -> Path:
    settings: dict[str, Any] = {"photometric": "rgb", "compression": "zlib"} | how
    tifffile.imwrite(path, pixels, tile=(64, 64), metadata=None, resolution=(2e4, 2e4), resolutionunit=3, **settings)
    return path


def fourth(value: int) -> np.ndarray:
    return np.dstack([PIXELS, np.full(PIXELS.shape[:2], value, np.uint8)])


@pytest.mark.parametrize("meaning", [None, ["unspecified"], ["assocalpha"], ["unassalpha"]])
def test_a_fourth_channel_of_zeros_is_refused_and_one_of_255_is_read(tmp_path, meaning):
    with pytest.raises(SlideError, match=r"fourth channel of zeros.*three channels"):
        open_slide(write(tmp_path / "a.tif", fourth(0), extrasamples=meaning))
    with open_slide(write(tmp_path / "b.tif", fourth(255), extrasamples=meaning)) as slide:
        np.testing.assert_array_equal(slide.read((0, 0), (640, 384), 0.5), PIXELS)


@pytest.mark.parametrize("more", [1, 2])
@pytest.mark.parametrize("level", [3, 90, 250])
def test_a_fourth_channel_that_is_no_transparency_is_refused(tmp_path, more, level):
    noise = np.random.default_rng(0).integers(0, level, (*PIXELS.shape[:2], more), dtype=np.uint8)
    with pytest.raises(SlideError, match="fourth channel"):
        open_slide(write(tmp_path / "a.tif", np.dstack([PIXELS, noise]), extrasamples=["unspecified"] * more))


def test_cmyk_is_no_fourth_channel(tmp_path):
    ink = np.dstack([255 - PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    with open_slide(write(tmp_path / "a.tif", ink, photometric="separated")) as slide:
        assert np.abs(slide.read((0, 0), (640, 384), 0.5).astype(int) - PIXELS).max() <= 2


@pytest.mark.parametrize("dtype", ["i1", "i2", "f4", "u4"])
def test_numbers_that_are_no_colours_are_named(tmp_path, dtype):
    with pytest.raises(SlideError, match="signed, floating or 32-bit"):
        open_slide(write(tmp_path / "a.tif", (PIXELS // 2).astype(dtype)))


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_less_than_16_bits_in_16_are_refused(tmp_path, bits):
    deep = PIXELS.astype(np.uint16) << (bits - 8)
    with pytest.raises(SlideError, match="16 bits a channel but uses only the lower"):
        open_slide(write(tmp_path / "a.tif", deep))


def test_16_bits_that_are_used_are_read(tmp_path):
    with open_slide(write(tmp_path / "a.tif", PIXELS.astype(np.uint16) * 257)) as slide:
        np.testing.assert_array_equal(slide.read((0, 0), (640, 384), 0.5), PIXELS)


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_a_tiff_turned_by_its_tag_is_refused_or_told(tmp_path, orientation):
    tag = [(274, 3, 1, orientation, True)]
    with pytest.raises(SlideError, match="turned or mirrored"):
        open_slide(write(tmp_path / "a.tif", PIXELS, extratags=tag))
    how = {"compression": "jpeg", "photometric": "ycbcr"}
    turned, plain = (write(tmp_path / f"{len(tags)}.tif", PIXELS, extratags=tags, **how) for tags in (tag, []))
    with open_slide(turned) as slide, open_slide(plain) as other:
        assert "turned or mirrored" in slide.warnings[0]
        np.testing.assert_array_equal(slide.read((0, 0), (640, 384), 0.5), other.read((0, 0), (640, 384), 0.5))


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_image_turned_by_exif_is_shown_upright_and_told(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / f"a.{kind}", exif=exif, quality=95)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}[orientation]  # Image.Transpose
    upright = np.asarray(image.transpose(Image.Transpose(turn)))
    with open_slide(tmp_path / f"a.{kind}", slide_mpp=0.5) as slide:
        assert slide.size == upright.shape[1::-1]
        assert "EXIF" in slide.warnings[0]
        got = slide.read((0, 0), slide.size, 0.5)
    assert np.abs(got.astype(int) - upright).mean() < 8


def test_an_image_that_is_upright_says_nothing(tmp_path):
    for kind in ("jpg", "png"):
        exif = Image.Exif()
        exif[274] = 1
        Image.fromarray(PIXELS).save(tmp_path / f"a.{kind}", exif=exif)
        with open_slide(tmp_path / f"a.{kind}") as slide:
            assert slide.warnings == ()


def test_a_png_with_a_fourth_channel_of_zeros_shows_its_colours(tmp_path):
    Image.fromarray(fourth(0)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", slide_mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read((0, 0), (640, 384), 0.5), PIXELS)


def test_a_deep_png_that_uses_few_of_its_bits_is_refused(tmp_path):
    for bits in (9, 10, 12):
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(PIXELS.astype(np.uint16) << (bits - 8)))
        with open_slide(tmp_path / "a.png", slide_mpp=0.5) as slide, pytest.raises(SlideError, match="full range"):
            slide.read((0, 0), (8, 8), 0.5)
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(PIXELS.astype(np.uint16) * 257))
    with open_slide(tmp_path / "b.png", slide_mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read((0, 0), (640, 384), 0.5), PIXELS)


# ---- paths as they are pasted


def test_quoted_paths_and_file_urls_are_understood(tmp_path, monkeypatch):
    place = tmp_path / "my slides é"
    place.mkdir()
    path = write(place / "a b.tif", PIXELS)
    monkeypatch.setenv("HOME", str(tmp_path))
    pasted = [f'"{path}"', f"'{path}'", path.as_uri(), f"  {path}\n", f'"{path.as_uri()}"', "~/my slides é/a b.tif"]
    for text in [*pasted, f"file://localhost{path.as_uri().removeprefix('file://')}"]:
        with open_slide(text) as slide:
            assert slide.size == (640, 384)
    odd = write(place / "'quoted'", PIXELS)
    with open_slide(str(odd)) as slide:
        assert slide.size == (640, 384)


# ---- data that are whole by their ends, and do not add up within


def overwrite(filler: bytes) -> Callable[[bytes], bytes]:
    """Bytes in the middle of the coded data put in place of what was there."""
    return lambda data: data[: len(data) // 2] + filler + data[len(data) // 2 + len(filler) :]


HURT = {"ends": b"\xff\xd9" * 4, "a marker": b"\xff\xc4\0\2", "a restart": b"\xff\xd3" * 3}
UNSEEN = {"zeros": bytes(90), "other data": bytes(range(1, 251))}  # which may be read as px, and then none can tell


@pytest.mark.parametrize("kind", [*HURT, *UNSEEN])
def test_a_tile_whose_data_do_not_add_up_is_lost_where_openslide_loses_it(tmp_path, kind):
    path = write_jpeg(tmp_path / "a.tif", overwrite((HURT | UNSEEN)[kind]))
    lost = 0
    for y in range(0, 384, TILE):
        for x in range(0, 640, TILE):
            try:
                openslide.OpenSlide(path).read_region((x, y), 0, (TILE, TILE))
            except openslide.OpenSlideError:
                lost += 4
    assert lost > 0 or kind in UNSEEN
    assert lost_patches(path) == lost


@pytest.mark.parametrize("kind", HURT)
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_whose_data_do_not_add_up_is_refused(tmp_path, kind, how):
    Image.fromarray(PIXELS).save(path := tmp_path / "a.jpg", quality=90, **how)
    with open_slide(path, slide_mpp=0.5) as slide:
        assert slide.read((0, 0), (64, 64), 0.5).shape == (64, 64, 3)
    path.write_bytes(overwrite(HURT[kind])(path.read_bytes()))
    with pytest.raises(SlideError, match="damaged"), open_slide(path, slide_mpp=0.5) as slide:
        slide.read((0, 0), (64, 64), 0.5)


@pytest.mark.parametrize("kind", [*HURT, *UNSEEN])
def test_a_png_whose_data_do_not_add_up_is_refused(tmp_path, kind):
    Image.fromarray(PIXELS).save(path := tmp_path / "a.png")
    path.write_bytes(overwrite((HURT | UNSEEN)[kind])(path.read_bytes()))
    with pytest.raises(SlideError, match="damaged"), open_slide(path, slide_mpp=0.5) as slide:
        slide.read((0, 0), (64, 64), 0.5)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_shows_what_pillow_shows(tmp_path, mode):
    Image.fromarray(PIXELS).convert(mode).save(path := tmp_path / "a.jpg", quality=90)
    with Image.open(path) as image, open_slide(path, slide_mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read((0, 0), image.size, 0.5), np.asarray(image.convert("RGB")))
