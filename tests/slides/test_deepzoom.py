"""Deep Zoom: the px of the slide it was made from, from a folder or a server; what goes wrong is one sentence."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsewsi.phantom import write_phantom
from sparsewsi.slides import deepzoom, remote
from sparsewsi.slides.deepzoom import open_deep_zoom, parse_descriptor
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.remote import find_address
from sparsewsi.slides.slide import open_slide

SIZE, TILE, OVERLAP = (301, 190), 64, 2


def descriptor(size: tuple[int, int] = SIZE, ending: str = "png", more: str = "") -> str:
    return (
        f'<?xml version="1.0"?>{more}<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="{ending}" '
        f'Overlap="{OVERLAP}" TileSize="{TILE}"><Size Width="{size[0]}" Height="{size[1]}"/></Image>'
    )


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """uint8 (190, 301, 3) that no two tiles share."""
    return np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)


@pytest.fixture
def pyramid(picture, tmp_path) -> Path:
    """The picture as Deep Zoom, written by its definition: levels halve, tiles overlap their neighbours."""
    level_image = Image.fromarray(picture)
    for level in range((max(SIZE) - 1).bit_length(), -1, -1):
        folder = tmp_path / "HE_files" / str(level)
        folder.mkdir(parents=True)
        width, height = level_image.size
        for row in range(-(-height // TILE)):
            for column in range(-(-width // TILE)):
                left, top = max(0, column * TILE - OVERLAP), max(0, row * TILE - OVERLAP)
                right, bottom = ((n + 1) * TILE + OVERLAP for n in (column, row))
                part = level_image.crop((left, top, min(width, right), min(height, bottom)))
                part.save(folder / f"{column}_{row}.png")
        level_image = level_image.resize((-(-width // 2), -(-height // 2)), Image.Resampling.BOX)
    (tmp_path / "HE.dzi").write_text(descriptor())
    return tmp_path / "HE.dzi"


class Server(ThreadingHTTPServer):
    asked: list[str]
    failures: int = 0  # so many requests are answered 503 first
    dead: bool = False


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.dead:
            self.close_connection = True
        elif self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def server(pyramid) -> Iterator[Server]:
    yield from serve(pyramid.parent)


def serve(folder: Path) -> Iterator[Server]:
    serving = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    serving.asked = []
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    yield serving
    serving.shutdown()
    serving.server_close()


def address_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/HE.dzi"


def test_every_px_of_every_place_is_the_pictures(pyramid, picture):
    with open_slide(pyramid, slide_mpp=0.5) as slide:
        assert slide.size == SIZE
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)
        assert np.array_equal(slide.read_level(0, (0, 0), SIZE), picture)
        assert np.array_equal(slide.read((63, 60), (70, 9), 0.5), picture[60:69, 63:133])
        beyond = slide.read_level(0, (290, 180), (20, 20))
        assert np.array_equal(beyond[:10, :11], picture[180:, 290:])
        assert (beyond[10:] == 255).all()
        small = Image.fromarray(picture).resize((151, 95), Image.Resampling.BOX)
        assert np.array_equal(slide.read_level(1, (0, 0), (151, 95)), np.asarray(small))


def test_over_http_it_is_the_same_slide_and_no_tile_is_asked_for_twice(pyramid, server):
    with open_slide(pyramid, slide_mpp=0.5) as here, open_slide(address_of(server), slide_mpp=0.5) as there:
        assert there.name == here.name
        assert there.vendor == "deepzoom"
        for _ in range(2):
            assert np.array_equal(there.read((10, 20), (200, 100), 0.5), here.read((10, 20), (200, 100), 0.5))
    tiles = [path for path in server.asked if "/9/" in path]
    assert len(tiles) == len(set(tiles)) == 8, "columns 0 to 3 and rows 0 to 1, of 15 tiles"


def test_a_phantom_that_openslide_cut_up_is_the_phantom(tmp_path):
    """The tree is another's work: openslide-python's generator of Deep Zoom, with its own tile size and overlap."""
    import openslide
    from openslide.deepzoom import DeepZoomGenerator

    write_phantom(tmp_path / "phantom.tiff", seed=4, size=1_024)
    with openslide.OpenSlide(tmp_path / "phantom.tiff") as opened:
        tree = DeepZoomGenerator(opened, tile_size=254, overlap=1, limit_bounds=False)
        for level, (columns, rows) in enumerate(tree.level_tiles):
            (tmp_path / "web" / "P_files" / str(level)).mkdir(parents=True)
            for column, row in np.ndindex(columns, rows):
                tile = tree.get_tile(level, (column, row))
                tile.save(tmp_path / "web" / "P_files" / str(level) / f"{column}_{row}.png")
        (tmp_path / "web" / "P.dzi").write_text(tree.get_dzi("png"))
    for serving in serve(tmp_path / "web"):
        address = f"http://127.0.0.1:{serving.server_port}/P.dzi"
        with open_slide(tmp_path / "phantom.tiff") as here, open_slide(address, slide_mpp=0.5) as there:
            assert there.size == here.size
            assert np.array_equal(there.read_level(0, (0, 0), there.size), here.read_level(0, (0, 0), here.size))
            assert np.array_equal(there.read((250, 251), (90, 80), 0.5), here.read((250, 251), (90, 80), 0.5))


def test_a_path_made_of_the_address_is_still_the_address(server):
    assert find_address(Path(address_of(server))) == address_of(server)
    assert find_address("/slides/HE.dzi") is None
    with open_slide(Path(address_of(server)), slide_mpp=0.5) as slide:
        assert slide.size == SIZE


def test_the_resolution_is_asked_for(pyramid):
    with open_slide(pyramid) as slide, pytest.raises(SlideError, match="slide_mpp"):
        slide.require_mpp()


def test_a_busy_server_is_asked_again_and_a_dead_one_is_a_sentence(server, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _seconds: None)
    server.failures = 2
    with open_slide(address_of(server), slide_mpp=0.5) as slide:
        slide.read_level(0, (0, 0), (10, 10))
        server.dead = True
        for _ in range(2):
            with pytest.raises(SlideError, match=r"^The slide's server broke off; check the network") as told:
                slide.read_level(0, (0, 0), SIZE)
            assert "127.0.0.1" not in str(told.value)
        server.dead = False
        assert slide.read_level(0, (0, 0), SIZE).std() > 0, "nothing half was kept"


def test_the_cache_is_bounded(pyramid, monkeypatch):
    monkeypatch.setattr(deepzoom, "CACHE_BYTES", 30_000)
    source, _ = open_deep_zoom(pyramid) or pytest.fail("a .dzi is Deep Zoom")
    source.read(0, (0, 0), SIZE)
    assert 0 < source._tiles.held <= 30_000


@pytest.mark.parametrize("change", ["missing", "short", "other size", "huge"])
def test_a_tile_that_is_not_whole_is_never_shown_as_something_else(pyramid, monkeypatch, change):
    tile = pyramid.parent / "HE_files" / "9" / "1_1.png"
    if change == "missing":
        tile.unlink()
    elif change == "short":
        tile.write_bytes(tile.read_bytes()[:200])
    elif change == "other size":
        Image.new("RGB", (8, 8)).save(tile)
    with open_slide(pyramid, slide_mpp=0.5) as slide:
        slide.read_level(0, (0, 0), (30, 30))
        if change == "huge":
            monkeypatch.setattr(deepzoom, "MOST_BYTES", 1000)
        with pytest.raises(SlideError) as told:
            slide.read_level(0, (100, 100), (10, 10))
    assert "HE" not in str(told.value).replace("Deep Zoom", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk",
        "<Image/>",
        descriptor((0, 10)),
        descriptor((1 << 30, 10)),
        descriptor(ending="tif"),
        descriptor(more='<!DOCTYPE x [<!ENTITY a "b">]>'),
        descriptor().replace('"64"', '"-1"'),
    ],
)
def test_a_descriptor_that_cannot_be_is_refused(text):
    with pytest.raises(SlideError, match="no Deep Zoom description"):
        parse_descriptor(text.encode())


def test_other_files_are_not_looked_at(tmp_path):
    assert open_deep_zoom(tmp_path / "slide.svs") is None
    assert open_deep_zoom("https://example.org/slide.svs") is None


# ---- what is damaged, or of another picture


@pytest.mark.parametrize("fill", [0, 200, 255])
def test_a_level_that_shows_something_else_is_left_out(pyramid, fill):
    folder = max((place for place in pyramid.with_name(f"{pyramid.stem}_files").iterdir()), key=lambda p: int(p.name))
    for tile in (folder.parent / str(int(folder.name) - 1)).iterdir():
        with Image.open(tile) as image:
            Image.new("RGB", image.size, (fill,) * 3).save(tile)
    with open_slide(pyramid, slide_mpp=0.5) as slide:
        assert 2.0 not in slide.level_downsamples
        assert "left out" in slide.warnings[0]
