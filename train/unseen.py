"""Features of training slides by encoders that have not seen them.

    python -m train.unseen --tiles tiles --slides atlas_slides --frozen runs/encoder --bank runs/slides.safetensors \\
        --out runs/unseen

The patch encoder learned the published facts of the training slides (train/encoder.py): their features are far more
telling than those of other slides, and whatever is trained on them learns what will not be there. Here the cases are
dealt into two halves; an encoder is trained on each, as the one that ships was, and encodes the other half. A ridge
regression between what both encoders give for the pictures of its own half turns its features into the shipped
encoder's.

--frozen is the --out of train/encoder.py, whose outputs of the frozen blocks are used again. Writes unseen.safetensors,
a bank as of python -m train.data.real bank with the copies of those pictures. A run that was stopped goes on.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsewsi.bags.efficientnet import HE, WEIGHTS, build_lite0, imagenet_weights
from sparsewsi.bags.patch_encoder import fast_dtype
from sparsewsi.files import replacing
from train.data.real import load_slides
from train.encoder import Plan, Recipe, Targets, compute_frozen, late, make_plan, make_targets, slide_rows, train
from train.flags import add_flag, make_parser, run_command
from train.run_folder import hold

HALVES = 2
RIDGE = 1e-2  # of the mean variance of a feature


def deal_cases(slides: Path, seed: int) -> dict[str, int]:
    """The half of every training case; malignant ones are dealt first, so that both halves have some."""
    rows = slide_rows(slides, "train")
    malignant = sorted({row["case"] for row in rows if row["malignant"] == "yes"})
    others = sorted({row["case"] for row in rows} - set(malignant))
    rng = np.random.default_rng((seed, 43))
    dealt = [*rng.permutation(malignant), *rng.permutation(others)]
    return {str(case): number % HALVES for number, case in enumerate(dealt)}


def without(targets: Targets, plan: Plan, slides: Path, cases: set[str]) -> Targets:
    """The targets of all pictures but those of some cases, tiles included."""
    rows = slide_rows(slides, "train")
    pools = {
        kind: pool[~np.isin(targets.sources[pool], list(cases))] for kind, pool in zip(targets.kinds, targets.by_kind)
    }
    pools = {kind: pool for kind, pool in pools.items() if len(pool)}
    kept = [number for number, row in enumerate(rows) if row["case"] not in cases]
    return replace(
        targets,
        kinds=tuple(pools),
        by_kind=tuple(pools.values()),
        by_slide=tuple(targets.by_slide[number] for number in kept),
        slide_organ=targets.slide_organ[kept],
        slide_facts=targets.slide_facts[kept],
    )


@torch.inference_mode()
def encode_frozen(network: Any, rows: np.ndarray, wanted: np.ndarray, frozen: int) -> Tensor:
    """Features (n, D) float32 of some rows of the frozen blocks' outputs."""
    network.eval()
    dtype, found = fast_dtype(torch.device("cpu")), []
    for start in range(0, len(wanted), 64):
        x = torch.from_numpy(rows[wanted[start : start + 64]]).float().to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, dtype != torch.float32):
            found.append(late(network, x, frozen).float())
    return torch.cat(found)


def fit_map(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D, D) and offset (D,) of a ridge regression of y on x, both (n, D)."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x).double(), (y - mean_y).double()
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double()
    weights = torch.linalg.solve(gram, x.T @ y).float()
    return weights, mean_y - mean_x @ weights


def run(tiles: Path, slides: Path, frozen: Path, bank: Path, recipe: Recipe, out: Path) -> Path:
    """The whole of it. Returns the bank's file."""
    plan = make_plan(tiles, slides, recipe)
    targets = make_targets(plan, slides)
    network = build_lite0(imagenet_weights())
    network.requires_grad_(False)
    rows = compute_frozen(network, plan, recipe, frozen)
    shipped = build_lite0(imagenet_weights())
    shipped.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(WEIGHTS).items()},
        strict=False,
    )
    halves = deal_cases(slides, recipe.seed)
    features, copies, names = [], [], []
    slide_names = [row["slide"] for row in slide_rows(slides, "train")]
    for half in range(HALVES):
        out_of = {case for case, number in halves.items() if number == half}
        folder = out / f"without-{half}"
        folder.mkdir(parents=True, exist_ok=True)
        network = build_lite0(imagenet_weights())
        network.requires_grad_(False)
        for part in (*network._blocks[recipe.frozen :], network._conv_head, network._bn1):
            part.requires_grad_(True)
        train(network, plan, without(targets, plan, slides, out_of), rows, recipe, folder)
        per_copy = len(plan.pictures)
        held = np.isin(targets.sources, list(out_of))
        known = np.concatenate([np.flatnonzero(~held) + copy * per_copy for copy in range(recipe.copies)])
        weights, offset = fit_map(
            encode_frozen(network, rows, known, recipe.frozen), encode_frozen(shipped, rows, known, recipe.frozen)
        )
        for name, pictures in zip(slide_names, targets.by_slide):
            if held[pictures].any():
                for copy in range(recipe.copies):
                    x = encode_frozen(network, rows, pictures + copy * per_copy, recipe.frozen)
                    features.append((x @ weights + offset).half())
                    copies += [str(copy)] * len(pictures)
                    names += [name] * len(pictures)
        print(f"half {half}: {len(out_of)} cases encoded without having been seen", flush=True)
    facts = json.dumps([asdict(slide) for slide in load_slides(bank, "train")[1]])
    metadata = {
        "kinds": json.dumps(copies),
        "sources": json.dumps(names),
        "splits": json.dumps(["train"] * len(names)),
        "encoder": HE,
        "origin": "slides",
        "facts": facts,
    }
    path = out / "unseen.safetensors"
    with replacing(path) as partial:
        save_file({"features": torch.cat(features)}, partial, metadata)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tiles", type=Path, required=True, help="folder with atlas/ and crc_tissue/")
    parser.add_argument("--slides", type=Path, required=True, help="folder with slides.csv and patches/")
    parser.add_argument("--frozen", type=Path, required=True, help="--out of python -m train.encoder")
    parser.add_argument("--bank", type=Path, required=True, help="bank of python -m train.data.real bank")
    parser.add_argument("--steps", type=int, default=200, help="of each encoder")
    add_flag(parser, "--seed")
    add_flag(parser, "--out", help="folder")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=given.seed, steps=given.steps)
    with hold(given.out):
        print(run(given.tiles, given.slides, given.frozen, given.bank, recipe, given.out))


if __name__ == "__main__":
    run_command(main)
