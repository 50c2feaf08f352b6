"""Files about a selection: QuPath, spreadsheets and a second run can read what the first one wrote."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sparsewsi.bags.bag import Bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.selector import hard_topk
from sparsewsi.model.sparse_wsi import Selection
from sparsewsi.report import export


@pytest.fixture
def bag() -> Bag:
    coords = torch.tensor([[0, 0], [100, 0], [0, 100], [100, 100], [200, 100]])
    return Bag(
        torch.zeros(5, 8), coords, 100, 0.5, "efficientnet-lite0", "slide 0a1b2c3d", 0.25, "openslide", (400, 300)
    )


@pytest.fixture
def selection() -> Selection:
    scores = torch.tensor([0.1, 2.0, -1.0, 2.0, 0.5])
    return Selection(hard_topk(scores, 3), scores, torch.zeros(3, 4), 5)


def test_rank_one_is_the_highest_score_and_ties_go_to_the_lower_index(selection):
    assert selection.indices.tolist() == [1, 3, 4]
    assert export.ranks(selection).tolist() == [1, 2, 3]
    assert export.by_rank(selection).tolist() == [1, 3, 4]
    other = Selection(torch.tensor([0, 2, 4]), selection.scores, torch.zeros(3, 4), 5)
    assert export.ranks(other).tolist() == [2, 3, 1]
    assert export.by_rank(other).tolist() == [4, 0, 2]


def test_csv_has_a_row_per_patch_with_true_micrometres(tmp_path, bag, selection):
    export.write_csv(tmp_path / "p.csv", bag, selection)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert (rows[2]["index"], rows[2]["x"], rows[2]["y"], rows[2]["size"]) == ("4", "200", "100", "100")
    assert (float(rows[2]["centre_x_um"]), float(rows[2]["centre_y_um"]), float(rows[2]["size_um"])) == (62.5, 37.5, 25)


def test_csv_leaves_micrometres_empty_where_the_scale_is_unknown(tmp_path, bag, selection):
    export.write_csv(tmp_path / "p.csv", Bag(bag.features, bag.coords, 100, None, bag.encoder, bag.slide), selection)
    assert {row["size_um"] for row in csv.DictReader((tmp_path / "p.csv").open())} == {""}


def test_geojson_squares_close_in_level_0_px_and_carry_rank_and_score(tmp_path, bag, selection):
    for name in ("a", "b"):
        export.write_geojson(tmp_path / name, bag, selection)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    features = json.loads((tmp_path / "a").read_text())["features"]
    assert len({feature["id"] for feature in features}) == 3
    third = features[2]
    (ring,) = third["geometry"]["coordinates"]
    assert ring == [[200, 100], [300, 100], [300, 200], [200, 200], [200, 100]]
    assert third["properties"]["measurements"] == {"Rank": 3, "Score": 0.5}
    assert third["properties"]["classification"]["name"] == export.CLASS_NAME
    assert third["properties"]["objectType"] == "annotation"


def test_record_suffices_to_select_again(tmp_path, bag, selection):
    answer = export.Answer("Which?", "fat", ("fat", "mucin"), (0.75, 0.25))
    export.write_selection(
        tmp_path / "s.json", bag, selection, SparseWSIConfig(demo=True), model="demo-model", answers=[answer]
    )
    record = json.loads((tmp_path / "s.json").read_text())
    again = hard_topk(torch.tensor(record["selection"]["scores"]), record["selection"]["count"])
    assert again.tolist() == record["selection"]["indices"] == [1, 3, 4]
    assert SparseWSIConfig.from_dict(record["model"]["config"]) == SparseWSIConfig(demo=True)
    assert record["slide"] == {"name": "slide 0a1b2c3d", "size": [400, 300], "mpp": 0.25, "mpp_source": "openslide"}
    assert record["answers"][0]["probs"] == [0.75, 0.25]
    assert "not for diagnosis" in record["notice"]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]


def test_summary_says_model_encoder_count_share_and_where_mpp_is_from(bag, selection):
    line = export.summary(bag, selection, SparseWSIConfig(), "demo-model")
    for part in ("demo-model", "efficientnet-lite0", "3 of 5 patches", "60 %", "0.5 µm/px", "0.25 µm/px (openslide)"):
        assert part in line
    unknown = Bag(bag.features, bag.coords, 100, None, bag.encoder, bag.slide)
    assert "unknown" in export.summary(unknown, selection, SparseWSIConfig(), "demo-model")


def test_only_a_demo_model_is_called_one():
    assert export.notice(SparseWSIConfig(demo=True)).startswith("Demo model")
    assert export.notice(SparseWSIConfig()) == "Research use only, not for diagnosis."


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match="taken"):
        export.write_image(tmp_path / "taken.png", Image.new("RGB", (4, 4)))
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_digest_of_weights_follows_their_bytes(tmp_path):
    assert export.weights_digest("owner/name") is None
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = export.weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("a card does not matter")
    assert export.weights_digest(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert export.weights_digest(tmp_path) != first


# ---- the report

HOSTILE = '<script>alert(1)</script> ![x](http://evil.example/x.png) "quoted" & <img src=x onerror=alert(2)>'


def report(folder, bag, selection, **changes) -> str:
    given = {
        "model": "demo-model",
        "overview": Image.new("RGB", (40, 30)),
        "patches": [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(1, 4)],
        "weights_sha256": "ab" * 32,
    }
    export.write_report(folder / "r.html", bag, selection, SparseWSIConfig(demo=True), **given | changes)
    return (folder / "r.html").read_text()


def test_the_report_holds_all_that_it_shows_and_says_what_it_is(tmp_path, bag, selection):
    answer = export.Answer("Which?", "fat", ("fat", "mucin"), (0.75, 0.25), (0.0, 2.0, -1.0), "Without patch #2 less.")
    text = report(tmp_path, bag, selection, answers=[answer], warnings=["Rank 4 is as good as rank 3."])
    pictures = re.findall(r'src="(.{30})', text)
    assert len(pictures) == 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    assert "default-src 'none'" in text
    for part in (
        *("Demo model, research use only, not for diagnosis.", "slide 0a1b2c3d", "demo-model", "ab" * 32),
        *(
            "efficientnet-lite0",
            "3 of 5",
            "0.25 µm/px (openslide)",
            "400 x 300 px (0.1 x 0.075 mm)",
            "Rank 4 is as good",
        ),
        *(export.patches_digest(bag), "Which?", "75.0%", "Without patch #2 less.", f"torch {torch.__version__}"),
        "x 62, y 38 µm",  # the centre of the third patch
    ):
        assert part in text, part
    assert text.count("not for diagnosis") == 2
    assert re.findall(r'<figure id="patch-(\d)">', text) == ["1", "2", "3"], "by score"
    assert re.findall(r'<a href="#patch-(\d)">', text) == ["2", "1", "3"], "by evidence"
    assert "Q1: 7.39, evidence rank 1" in text


def test_words_in_the_report_are_inert(tmp_path, bag, selection):
    answer = export.Answer(HOSTILE, HOSTILE, (HOSTILE,), (1.0,), (), HOSTILE)
    odd = dataclasses.replace(bag, note=HOSTILE, slide=HOSTILE)
    text = report(tmp_path, odd, selection, answers=[answer], warnings=[HOSTILE], model=HOSTILE)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert not re.findall(r'(?:src|href)="(?!data:image/jpeg|#patch-)', text)
    assert text.count("&lt;script&gt;") >= 7


def test_a_report_without_the_slide_has_no_patch_pictures(tmp_path, bag, selection):
    unknown = Bag(bag.features, bag.coords, 100, None, bag.encoder, bag.slide)
    text = report(tmp_path, unknown, selection, patches=())
    assert text.count("<img") == 1
    assert "x 250, y 150 px" in text
    assert "resolution unknown" in text


# ---- regions


def regions(folder, bag, *geometries, wrap: bool = True) -> list[int]:
    features = [{"type": "Feature", "properties": {}, "geometry": geometry} for geometry in geometries]
    content = {"type": "FeatureCollection", "features": features} if wrap else features
    (folder / "roi.geojson").write_text(json.dumps(content))
    return export.read_regions(folder / "roi.geojson", bag).tolist()


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


def test_a_shape_of_many_corners_agrees_with_its_formula(tmp_path, grid):
    angle = np.linspace(0, 2 * np.pi, 50_000)
    ring = np.stack([500 + 333 * np.cos(angle), 500 + 333 * np.sin(angle)], 1).tolist()
    centres = grid.coords.numpy() + 50
    wanted = np.flatnonzero(np.hypot(*(centres - 500).T) < 333).tolist()
    assert regions(tmp_path, grid, {"type": "Polygon", "coordinates": [ring]}) == wanted


def test_what_was_exported_is_read_back(tmp_path, bag, selection):
    export.write_geojson(tmp_path / "p.geojson", bag, selection)
    assert export.read_regions(tmp_path / "p.geojson", bag).tolist() == selection.indices.tolist()


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
    ],
)
def test_a_bad_region_file_is_one_sentence(tmp_path, grid, content, said):
    (tmp_path / "roi.geojson").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=said) as raised:
        export.read_regions(tmp_path / "roi.geojson", grid)
    assert str(raised.value).endswith(".")
    assert str(tmp_path) not in str(raised.value)


def test_a_region_file_that_is_too_big_is_not_read(tmp_path, grid):
    with (tmp_path / "big.geojson").open("wb") as file:
        file.truncate(export.MOST_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 64 MB"):
        export.read_regions(tmp_path / "big.geojson", grid)
    with pytest.raises(ValueError, match="no file"):
        export.read_regions(tmp_path / "missing.geojson", grid)


# ---- back from the record


@pytest.fixture
def record(tmp_path, bag, selection) -> export.Record:
    answers = [export.Answer("Which?", "fat", ("fat", "mucin"), (0.75, 0.25)), export.Answer("Describe.", "Fat.")]
    export.write_selection(tmp_path / "s.json", bag, selection, SparseWSIConfig(), model="m", answers=answers)
    return export.read_selection(tmp_path / "s.json")


def test_a_record_is_read_back_whole(record, bag, selection):
    assert record.indices.tolist() == selection.indices.tolist()
    assert torch.equal(record.scores, selection.scores)
    assert record.questions == (("Which?", ("fat", "mucin")), ("Describe.", ()))
    assert record.slide_mpp is None, "the slide states it"
    assert record.patches_sha256 == export.patches_digest(bag)
    record.check(bag)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slide": "slide ffffffff"}, "its slide is slide 0a1b2c3d, not slide ffffffff"),
        ({"encoder": "uni"}, "its encoder is efficientnet-lite0, not uni"),
        ({"features": torch.zeros(6, 8), "coords": torch.zeros(6, 2)}, "its number of patches is 5, not 6"),
        ({"coords": torch.zeros(5, 2)}, "lie elsewhere"),
    ],
)
def test_a_record_of_something_else_is_refused(record, bag, changes, said):
    with pytest.raises(ValueError, match=said):
        record.check(dataclasses.replace(bag, **changes))


def test_a_file_that_is_no_record_is_refused(tmp_path, record):
    content = json.loads((tmp_path / "s.json").read_text())
    for part in ("indices", "scores", "coords"):
        for value in (None, [], [[0]], "x", [-1], [10**30]):
            (tmp_path / "bad.json").write_text(
                json.dumps(content | {"selection": content["selection"] | {part: value}})
            )
            with pytest.raises(ValueError, match=r"bad\.json"):
                export.read_selection(tmp_path / "bad.json")
    for text in ("", "[]", "{}", '{"slide": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json"):
            export.read_selection(tmp_path / "bad.json")
