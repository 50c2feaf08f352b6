"""QuPath reads what is written, and what is drawn in it is read back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.report import qupath


def test_geojson_squares_close_in_level_0_px_and_carry_rank_and_score(tmp_path, bag, selection):
    for name in ("a", "b"):
        qupath.write_geojson(tmp_path / name, bag, selection)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    features = json.loads((tmp_path / "a").read_text())["features"]
    assert len({feature["id"] for feature in features}) == 3
    third = features[2]
    (ring,) = third["geometry"]["coordinates"]
    assert ring == [[200, 100], [300, 100], [300, 200], [200, 200], [200, 100]]
    assert third["properties"]["measurements"] == {"Rank": 3, "Score": 0.5}
    assert third["properties"]["classification"]["name"] == qupath.CLASS_NAME
    assert third["properties"]["objectType"] == "annotation"


# ---- regions


def regions(folder, bag, *geometries, wrap: bool = True) -> list[int]:
    features = [{"type": "Feature", "properties": {}, "geometry": geometry} for geometry in geometries]
    content = {"type": "FeatureCollection", "features": features} if wrap else features
    (folder / "roi.geojson").write_text(json.dumps(content))
    return qupath.read_regions(folder / "roi.geojson", bag).tolist()


def square(left: float, top: float, right: float, bottom: float) -> list:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


@pytest.fixture
def grid() -> Bag:
    """10 x 10 patches of 100 px; index = 10 row + column."""
    place = torch.arange(100)
    coords = torch.stack([place % 10, place // 10], 1) * 100
    return Bag(torch.zeros(100, 4), coords, 100, 0.5, "efficientnet-lite0", "slide 0a1b2c3d")


def test_patches_whose_centre_is_inside_are_found_and_holes_are_left_out(tmp_path, grid):
    hole = {"type": "Polygon", "coordinates": [square(0, 0, 300, 300), square(110, 110, 190, 190)]}
    assert regions(tmp_path, grid, hole) == [0, 1, 2, 10, 12, 20, 21, 22]
    far = {"type": "MultiPolygon", "coordinates": [[square(0, 0, 120, 60)], [square(840, 940, 1000, 1000)]]}
    assert regions(tmp_path, grid, far, wrap=False) == [0, 98, 99]
    triangle = {"type": "Polygon", "coordinates": [[[0, 0], [390, 0], [0, 390]]]}  # not closed
    assert regions(tmp_path, grid, triangle) == [0, 1, 2, 10, 11, 20]


def test_points_and_small_regions_take_the_patch_around_them(tmp_path, grid):
    assert regions(tmp_path, grid, {"type": "Point", "coordinates": [250, 130, 0]}) == [12]
    assert regions(tmp_path, grid, {"type": "MultiPoint", "coordinates": [[0, 0], [100, 0], [5000, 5000]]}) == [0, 1]
    assert regions(tmp_path, grid, {"type": "Polygon", "coordinates": [square(561, 802, 569, 809)]}) == [85]
    line = {"type": "LineString", "coordinates": [[0, 0], [9, 9]]}
    both = {"type": "GeometryCollection", "geometries": [line, {"type": "Point", "coordinates": [950, 950]}]}
    assert regions(tmp_path, grid, both) == [99]


@pytest.mark.parametrize(
    ("classes", "places", "said"),
    [
        ((None, None), ([50, 50], [9000, 40]), "1 of 2 regions meet no patch, the first at (9000, 40)"),
        (({"name": "Tumor"}, {"name": "Ignore*"}), ([50, 50], [150, 50]), "such as Ignore*: 1"),
        (({"name": "Tumor"}, {"name": "Stroma: Ignore*"}), ([50, 50], [150, 50]), "such as Ignore*: 1"),
        (("Tumor", "Ignore*"), ([50, 50], [150, 50]), "left out for a class"),
        ((None, {"name": "Tumor*", "color": [1, 2, 3]}), ([50, 50], [150, 50]), "left out for a class"),
        (({"name": "Tumor"}, None), ([50, 50], [50, 60]), ""),
    ],
)
def test_regions_that_are_left_out_are_told_beside_those_that_are_found(tmp_path, grid, classes, places, said):
    features = [
        {"type": "Feature", "properties": {"classification": kind}, "geometry": {"type": "Point", "coordinates": place}}
        for kind, place in zip(classes, places)
    ]
    (tmp_path / "roi.geojson").write_text(json.dumps(features))
    found = qupath.find_regions(tmp_path / "roi.geojson", grid)
    assert found.rows.tolist() == [0]
    assert said in found.note if said else found.note == ""


@pytest.mark.parametrize("far", [1, 0.3, 0.9])
def test_positions_that_are_fractions_are_told(tmp_path, grid, far):
    with pytest.raises(ValueError, match="between 0 and 1"):
        regions(tmp_path, grid, {"type": "Polygon", "coordinates": [square(0, 0.1, far, far)]})


@pytest.mark.parametrize("rings", [[(0, 300), (110, 190)], [(110, 190), (0, 300)], [(110, 190), (0, 300), (130, 170)]])
def test_rings_enclose_the_same_in_whatever_order_they_stand(tmp_path, grid, rings):
    found = regions(tmp_path, grid, {"type": "Polygon", "coordinates": [square(a, a, b, b) for a, b in rings]})
    assert found == ([0, 1, 2, 10, 12, 20, 21, 22] if len(rings) == 2 else [0, 1, 2, 10, 11, 12, 20, 21, 22])


def test_lines_beside_regions_are_told(tmp_path, grid):
    line = {
        "type": "Feature",
        "properties": {},
        "geometry": {"type": "LineString", "coordinates": [[0, 0], [900, 900]]},
    }
    point = {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [50, 50]}}
    (tmp_path / "roi.geojson").write_text(json.dumps([line, point, line]))
    assert qupath.find_regions(tmp_path / "roi.geojson", grid).note == "lines, which enclose no patch: 2"


def test_regions_that_are_all_ignored_are_no_regions(tmp_path, grid):
    feature = {"type": "Feature", "properties": {"classification": {"name": "Ignore*"}}}
    feature["geometry"] = {"type": "Polygon", "coordinates": [square(0, 0, 300, 300)]}
    (tmp_path / "roi.geojson").write_text(json.dumps(feature))
    with pytest.raises(ValueError, match="another class"):
        qupath.read_regions(tmp_path / "roi.geojson", grid)


def test_a_shape_of_many_corners_agrees_with_its_formula(tmp_path, grid):
    angle = np.linspace(0, 2 * np.pi, 50_000)
    ring = np.stack([500 + 333 * np.cos(angle), 500 + 333 * np.sin(angle)], 1).tolist()
    centres = grid.coords.numpy() + 50
    wanted = np.flatnonzero(np.hypot(*(centres - 500).T) < 333).tolist()
    assert regions(tmp_path, grid, {"type": "Polygon", "coordinates": [ring]}) == wanted


def test_what_was_exported_is_read_back(tmp_path, bag, selection):
    qupath.write_geojson(tmp_path / "p.geojson", bag, selection)
    assert qupath.read_regions(tmp_path / "p.geojson", bag).tolist() == selection.indices.tolist()


POLYGON = '{"type": "Polygon", "coordinates": %s}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "JSON"),
        ("not json", "JSON"),
        ("\x00\xff", "JSON"),
        ("[" * 100_000, "JSON"),
        ("42", "GeoJSON"),
        ('{"type": "Topology"}', "GeoJSON"),
        ("[]", "no polygon"),
        ('{"type": "FeatureCollection", "features": null}', "no polygon"),
        ('{"type": "LineString", "coordinates": [[0, 0], [1, 1]]}', "no polygon"),
        (POLYGON % "null", "three corners"),
        (POLYGON % "[]", "three corners"),
        (POLYGON % "[[[0, 0], [1, 1]]]", "three corners"),
        (POLYGON % '[[[0, 0], [1, "a"], [2, 2]]]', "pixel positions"),
        (POLYGON % "[[[0, 0], [1, NaN], [2, 2]]]", "pixel positions"),
        (POLYGON % "[[[0, 0], [1, 1e300], [2, 2]]]", "pixel positions"),
        (POLYGON % "[[[0], [1], [2]]]", "pixel positions"),
        (POLYGON % "[[[9000, 0], [9001, 0], [9000, 1]]]", "no patch of slide 0a1b2c3d"),
        (POLYGON % f"[{[[0, 0]] * 200_001}]", "200,000 corners"),
        (json.dumps({"type": "MultiPoint", "coordinates": [[1, 1]] * 5001}), "5,000 regions or points"),
        (json.dumps({"type": "MultiPolygon", "coordinates": [[[[0, 0], [1, 1], [2, 0]]]] * 5001}), "5,000 regions"),
        (json.dumps([{"type": "Point", "coordinates": [1, 1]}] * 5001), "5,000 regions or points"),
    ],
)
def test_a_bad_region_file_is_one_sentence(tmp_path, grid, content, said):
    (tmp_path / "roi.geojson").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=said) as raised:
        qupath.read_regions(tmp_path / "roi.geojson", grid)
    assert str(raised.value).endswith(".")
    assert str(tmp_path) not in str(raised.value)


def test_a_region_file_that_is_too_big_is_not_read(tmp_path, grid):
    with (tmp_path / "big.geojson").open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ValueError, match="larger than 8 MB"):
        qupath.read_regions(tmp_path / "big.geojson", grid)
    with pytest.raises(ValueError, match="no file"):
        qupath.read_regions(tmp_path / "missing.geojson", grid)


# ---- slides of which only a part was scanned


@pytest.mark.parametrize("bounds", [(50, 30, 700, 700), (1010, 715, 768, 512), (3, 0, 900, 900)])
def test_positions_count_from_the_corner_of_what_was_scanned_as_in_qupath(tmp_path, bag, selection, bounds):
    scanned = replace(bag, bounds=bounds)
    paths = []
    for name, written in (("whole", bag), ("part", scanned)):
        paths.append(tmp_path / f"{name}.geojson")
        qupath.write_geojson(paths[-1], written, selection)
    whole, part = (json.loads(path.read_text())["features"] for path in paths)
    for here, there in zip(whole, part):
        ours, theirs = (np.array(feature["geometry"]["coordinates"][0]) for feature in (here, there))
        assert (ours - theirs == bounds[:2]).all()
        assert here["id"] == there["id"]
    wanted = sorted(selection.indices.tolist())
    for path, read in zip(paths, (bag, scanned)):
        assert qupath.read_regions(path, read).tolist() == wanted
