"""Files about a selection: QuPath, spreadsheets and a second run can read what the first one wrote."""

import csv
import json

import pytest
import torch
from PIL import Image

from sparsewsi import export
from sparsewsi.bag import Bag
from sparsewsi.config import SparseWSIConfig
from sparsewsi.model import Selection
from sparsewsi.selector import hard_topk


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
