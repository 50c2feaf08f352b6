"""What a linear probe reads from the features of patch encoders, on slides that no encoder was trained on.

    python -m train.studies.probe --tiles ../data/tiles --slides ../data/atlas_slides --out runs/probe \\
        --encoders efficientnet-lite0 efficientnet-lite0-he [--test]

Tiles: logistic regression on the tiles of train slides, asked about the tiles of held-out slides, of the kinds that
both have. Slides: logistic regression on the mean feature of a slide's patches, train slides to held-out slides. Held
out are the slides of role val (with --test: test) and those whose tiles are of that split in mosaic_split.json, which
train.encoder does not read either. The strength of both regressions is fixed.
Intervals: 95 % percentiles of a bootstrap over held-out slides (tiles) or cases (slides); of a difference, paired.
Features are kept in --out, so that a second call is quick.
"""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.files import replacing
from train.data.tiles import SPLIT_FILE, Tile, augment_tile, find_tiles, turn_tile
from train.flags import add_flag, make_parser, run_command

DRAWS = 2_000
STRENGTH = {"tiles": 1e-2, "slides": 1e-3}  # C of the regressions; weaker where there are few examples
COPIES = 2


@dataclass(frozen=True)
class Features:
    """What one encoder makes of all tiles and of all slides."""

    tiles: np.ndarray  # (tiles, D)
    copies: np.ndarray  # (train tiles * COPIES, D), restained, scaled and turned as feature banks have them
    slides: np.ndarray  # (slides, D), the mean of a slide's patches


def read_tiles(folder: Path) -> list[Tile]:
    """The labelled tiles, glass apart."""
    return [tile for tile in find_tiles(folder) if tile.kind != "background"]


def read_slides(folder: Path) -> list[dict[str, str]]:
    """Rows of slides.csv; "split" is the role, or for a slide with tiles that are held out, theirs."""
    split = json.loads(SPLIT_FILE.read_text())["atlas"]
    with (folder / "slides.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        row | {"split": split.get(row["case"], row["role"]) if row["role"] == "train" else row["role"]} for row in rows
    ]


def slide_patches(path: Path) -> np.ndarray:
    """uint8 (N, H, W, 3)."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names])


def compute_features(encoder: PatchEncoder, tiles: Sequence[Tile], slides: Sequence[dict], folder: Path) -> Features:
    """Encode the middle of every tile, restained copies of train tiles and all patches of every slide."""
    of_tiles, of_copies = [], []
    for number, tile in enumerate(tiles):
        image, rng = Image.open(tile.file).convert("RGB"), np.random.default_rng((0, number))
        of_tiles.append(turn_tile(image)[0])
        of_copies += [augment_tile(image, rng) for _ in range(COPIES if tile.split == "train" else 0)]
    of_slides = []
    for row in slides:
        of_slides.append(encoder(slide_patches(folder / "patches" / f"{row['slide']}.zip")).numpy().mean(0))
        print(f"{encoder.name}: {len(of_slides)} of {len(slides)} slides", flush=True)
    encoded = [encoder(np.stack(pictures)).numpy() for pictures in (of_tiles, of_copies)]
    return Features(encoded[0], encoded[1], np.stack(of_slides))


def load_features(name: str, tiles: Sequence[Tile], slides: Sequence[dict], folder: Path, out: Path) -> Features:
    """compute_features, kept in out/<name>.safetensors."""
    path = out / f"{name.replace('/', '+').replace(':', '+')}.safetensors"
    if not path.is_file():
        made = compute_features(load_encoder(name), tiles, slides, folder)
        with replacing(path) as partial:
            save_file(vars(made), partial)
    kept = Features(**load_file(path))
    if (len(kept.tiles), len(kept.slides)) != (len(tiles), len(slides)):
        raise ValueError(f"{path} holds features of other tiles or slides. Delete it and try again.")
    return kept


def fit(x: np.ndarray, y: np.ndarray, strength: float) -> Pipeline:
    """Logistic regression on standardised features, classes weighted alike."""
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1_000)
    return make_pipeline(StandardScaler(), model).fit(x, y)


Measure = Callable[[np.ndarray, np.ndarray], float]  # truth, what the probe says


def accuracy(truth: np.ndarray, said: np.ndarray) -> float:
    return float((truth == said).mean())


def macro_recall(truth: np.ndarray, said: np.ndarray) -> float:
    return float(np.mean([(said[truth == kind] == kind).mean() for kind in np.unique(truth)]))


def auc(truth: np.ndarray, said: np.ndarray) -> float:
    return float(roc_auc_score(truth, said)) if len(np.unique(truth)) == 2 else float("nan")


def bootstrap(measure: Measure, truth: np.ndarray, said: Sequence[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """(DRAWS, encoders): the measure on groups drawn with replacement, the same ones for every encoder."""
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    values = []
    for _ in range(DRAWS):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        values.append([measure(truth[rows], one[rows]) for one in said])
    return np.array(values)


def state(name: str, measure: Measure, truth: np.ndarray, said: Sequence[np.ndarray], groups: np.ndarray) -> str:
    """A row of the table: each encoder's value with its interval, and the last minus the first."""
    drawn = bootstrap(measure, truth, said, groups)
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    cells = [f"{measure(truth, one):.3f} ({a:.3f}-{b:.3f})" for one, a, b in zip(said, low, high)]
    if len(said) > 1:
        gain = drawn[:, -1] - drawn[:, 0]
        ends = np.nanpercentile(gain, [2.5, 97.5])
        cells.append(f"{measure(truth, said[-1]) - measure(truth, said[0]):+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f})")
    return f"| {name} | {len(truth)} of {len(np.unique(groups))} | {' | '.join(cells)} |"


def tile_rows(found: Sequence[Features], tiles: Sequence[Tile], split: str) -> list[str]:
    """Accuracy and macro recall of the kinds that train and held-out slides share."""
    kinds, sources, splits = (
        np.array([getattr(tile, field) for tile in tiles]) for field in ("kind", "source", "split")
    )
    shared = sorted(set(kinds[splits == "train"]) & set(kinds[splits == split]))
    learn, held = (np.isin(kinds, shared) & (splits == part) for part in ("train", split))
    of_copy = np.repeat(np.flatnonzero(splits == "train"), COPIES)  # the tile of each copy
    copies = np.isin(kinds[of_copy], shared)
    lines = []
    for how in ("tissue of a tile", "the same, learned from restained copies as well"):
        said = []
        for one in found:
            x, y = one.tiles[learn], kinds[learn]
            if lines:
                x, y = np.concatenate([x, one.copies[copies]]), np.concatenate([y, kinds[of_copy][copies]])
            said.append(fit(x, y, STRENGTH["tiles"]).predict(one.tiles[held]))
        for name, measure in (("accuracy", accuracy), ("macro recall", macro_recall)):
            lines.append(state(f"{how}, {len(shared)} kinds: {name}", measure, kinds[held], said, sources[held]))
    recalls = [[f"{(one[kinds[held] == kind] == kind).mean():.2f}" for one in said] for kind in shared]
    counts = [(kinds[held] == kind).sum() for kind in shared]
    listed = [f"{kind}: n {count}, {', '.join(each)}" for kind, count, each in zip(shared, counts, recalls)]
    return [*lines, "", "Recall with restained copies:", *listed, ""]


def slide_rows(found: Sequence[Features], slides: Sequence[dict], split: str) -> list[str]:
    """AUC of yes-or-no facts, accuracy of the organ."""
    splits, cases = (np.array([row[field] for row in slides]) for field in ("split", "case"))
    lines = []
    for fact in ("malignant", "carcinoma_present", "neoplasm", "organ_group"):
        values = np.array([row[fact] for row in slides])
        told = np.isin(values, ["yes", "no"]) if fact != "organ_group" else values != "unclear"
        learn = told & (splits == "train")
        held = told & (splits == split) & np.isin(values, values[learn])
        truth = values if fact == "organ_group" else (values == "yes").astype(int)
        said = []
        for one in found:
            probe = fit(one.slides[learn], truth[learn], STRENGTH["slides"])
            x = one.slides[held]
            said.append(probe.predict(x) if fact == "organ_group" else probe.decision_function(x))
        name, measure = (
            (f"organ among {len(set(values[learn]))}: accuracy", accuracy)
            if fact == "organ_group"
            else (f"{fact}: AUC", auc)
        )
        lines.append(state(f"slide, {name}", measure, truth[held], said, cases[held]))
    return lines


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tiles", type=Path, required=True, help="folder with atlas/ and crc_tissue/")
    parser.add_argument("--slides", type=Path, required=True, help="folder with slides.csv and patches/")
    parser.add_argument("--encoders", nargs="+", default=["efficientnet-lite0", "efficientnet-lite0-he"])
    parser.add_argument("--test", action="store_true", help="ask the test slides; once, when everything is chosen")
    add_flag(parser, "--out", help="folder for the features")
    arguments = parser.parse_args()
    tiles, slides = read_tiles(arguments.tiles), read_slides(arguments.slides)
    found = [load_features(name, tiles, slides, arguments.slides, arguments.out) for name in arguments.encoders]
    split = "test" if arguments.test else "val"
    print(f"{split} slides | n of groups | {' | '.join(arguments.encoders)} | last minus first")
    print("\n".join([*tile_rows(found, tiles, split), *slide_rows(found, slides, split)]))


if __name__ == "__main__":
    run_command(main)
