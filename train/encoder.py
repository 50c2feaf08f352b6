"""Adapt EfficientNet-Lite0 to H&E: the encoder `efficientnet-lite0-he`.

    python -m train.encoder --tiles ../data/tiles --slides ../data/atlas_slides --out runs/encoder

The first blocks stay those of ImageNet. Their outputs for several restained, turned, scaled and blurred copies of every
picture are computed once and kept on disk, so that a step only costs the last blocks. Three things are learned at once:
the tissue of labelled tiles, the tissue of phantom patches, and from the mean feature of a few patches of one slide its
published facts (organ, neoplasm, malignant, carcinoma). Only train slides are read, those of the atlas only if none of
their tiles is kept for validation or test (mosaic_split.json).

A run that was stopped goes on where it was when the same command is given again. --out then holds log.jsonl and
efficientnet-lite0-he.safetensors (fp16), which load_encoder finds in sparsewsi/bags/weights.

B pictures, D feature dim. Pixels are uint8 RGB.
"""

import copy
import csv
import hashlib
import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsewsi import phantom
from sparsewsi.bags.efficientnet import HE, build_lite0, fold_lite0, imagenet_weights, pixels_to_lite0
from sparsewsi.bags.patch_encoder import fast_dtype
from sparsewsi.files import append_line, replacing, write_json
from train.data.bank import list_phantom_seeds
from train.data.tiles import SPLIT_FILE, find_tiles
from train.flags import add_flag, make_parser, run_command
from train.run_folder import cut_metrics, hold

SIDE = 224
PER_PHANTOM = 4  # patches of a kind of a phantom
FACTS = ("neoplasm", "malignant", "carcinoma_present")
UNKNOWN = -1  # a fact that the published text does not state


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, the data apart."""

    seed: int = 0
    copies: int = 4  # of every picture; the first is left as it is
    of_a_slide: int = 40  # patches of a slide
    phantoms: int = 12  # phantom slides
    frozen: int = 12  # blocks of 16
    steps: int = 300
    tiles_a_step: int = 48
    slides_a_step: int = 8
    patches_a_slide: int = 6
    phantoms_a_step: int = 16
    rate: float = 5e-4
    head_rate: float = 2e-3
    decay: float = 0.02
    slide_weight: float = 0.3
    phantom_weight: float = 0.3
    save_every: int = 50


# ------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Picture:
    """One image to learn from. group: "tile", "slide" or "phantom"; name: its kind, or for "slide" which slide."""

    group: str
    name: str
    source: str
    file: Path
    member: str = ""  # inside a zip file

    def read(self) -> Image.Image:
        if not self.member:
            return Image.open(self.file).convert("RGB")
        with zipfile.ZipFile(self.file) as archive:
            return Image.open(io.BytesIO(archive.read(self.member))).convert("RGB")


def slide_rows(folder: Path, role: str) -> list[dict[str, str]]:
    """Rows of slides.csv of one role. Train: without the cases whose tiles are kept for validation or test."""
    held_out = {name for name, split in json.loads(SPLIT_FILE.read_text())["atlas"].items() if split != "train"}
    with (folder / "slides.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["role"] == role]
    return [row for row in rows if row["case"] not in held_out] if role == "train" else rows


def pictures(tiles: Path, slides: Path, most: int) -> list[Picture]:
    """The labelled tiles and the patches of slides that may be learned from, about `most` of a slide."""
    found = [Picture("tile", tile.kind, tile.source, tile.file) for tile in find_tiles(tiles) if tile.split == "train"]
    for row in slide_rows(slides, "train"):
        file = slides / "patches" / f"{row['slide']}.zip"
        with zipfile.ZipFile(file) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        # by name, that is by column: every k-th is spread over the slide
        found += [Picture("slide", row["slide"], row["case"], file, name) for name in names[:: -(-len(names) // most)]]
    return found


# --------------------------------------------------------------------------------------------------- augmentation

# Optical density of haematoxylin, eosin and what is left (Ruifrok and Johnston 2001), rows of unit length.
_STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_STAINS = _STAINS / _STAINS.norm(dim=1, keepdim=True)


def restain(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Scale and shift the density of each stain (Beer-Lambert), by a factor of about 1.5 either way.

    pixels: (B, 3, H, W), 0 to 255. One picture in eight loses its hue: a kind must not be known by its slide's colour.
    """
    b, _, high, wide = pixels.shape
    density = -((pixels + 1) / 256).log()
    scale = (0.35 * torch.randn(b, 3, 1, generator=rng)).exp()
    shift = 0.05 * torch.randn(b, 1, 3, generator=rng)
    change = torch.linalg.inv(_STAINS) @ (scale * _STAINS)  # (B, 3, 3): to amounts of stain, scaled, and back
    grey = torch.rand(b, 1, 1, generator=rng) < 0.125
    tint = 0.6 + 0.8 * torch.rand(b, 1, 3, generator=rng)
    change = torch.where(grey, tint.expand(b, 3, 3) / 3, change)
    density = change.mT @ density.view(b, 3, -1) + (shift @ _STAINS).mT
    return (256 * (-density).exp() - 1).clamp(0, 255).view(b, 3, high, wide)


def reshape(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Cut SIDE px out after turning, mirroring, shifting and scaling (0.7 to 1.4 times) each picture; (B, 3, H, W)."""
    b, side = len(pixels), pixels.shape[-1]
    draw = torch.rand(6, b, generator=rng)
    zoom = (SIDE / side) * torch.exp((2 * draw[0] - 1) * math.log(1.4))  # > 1: reaches past the border, mirrored
    turn = (draw[1] * 4).floor() * (math.pi / 2)
    mirror = torch.where(draw[2] < 0.5, 1.0, -1.0)
    theta = torch.stack(
        [
            torch.stack([zoom * turn.cos() * mirror, -zoom * turn.sin(), 0.1 * (2 * draw[3] - 1)], 1),
            torch.stack([zoom * turn.sin() * mirror, zoom * turn.cos(), 0.1 * (2 * draw[4] - 1)], 1),
        ],
        1,
    )
    grid = nn.functional.affine_grid(theta, [b, 3, SIDE, SIDE], align_corners=False)
    return nn.functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def blur(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Blur three pictures in ten by a Gaussian of 0.4 to 1.3 px; (B, 3, H, W)."""
    draw = torch.rand(2, len(pixels), generator=rng)
    chosen = draw[0] < 0.3
    sharp, sigma = pixels[chosen], 0.4 + 0.9 * draw[1, chosen]
    planes = 3 * len(sharp)
    if planes:
        kernel = torch.exp(-0.5 * (torch.arange(-3.0, 4) / sigma[:, None]) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (planes, 7)
        x = nn.functional.pad(sharp, (3, 3, 3, 3), mode="reflect").flatten(0, 1)[None]
        x = nn.functional.conv2d(x, kernel[:, None, None, :], groups=planes)
        pixels[chosen] = nn.functional.conv2d(x, kernel[:, None, :, None], groups=planes).view_as(sharp)
    return pixels


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """uint8 (B, H, H, 3) -> uint8 (B, SIDE, SIDE, 3), every picture another way."""
    x = pixels.permute(0, 3, 1, 2).float()
    x = restain(blur(reshape(x, rng), rng), rng)
    return x.round().to(torch.uint8).permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------ outputs of the frozen blocks


def _canvas(image: Image.Image, side: int = 256) -> np.ndarray:
    """An image as a square of 256 px at its own scale, mirrored past its borders; one below SIDE px is enlarged."""
    if min(image.size) < SIDE:
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (max(0, (full - side) // 2) for full in image.size)
    pixels = np.asarray(image)[top : top + side, left : left + side]
    missing = [side - full for full in pixels.shape[:2]]
    return np.pad(pixels, [*((lack // 2, lack - lack // 2) for lack in missing), (0, 0)], "reflect")


@dataclass(frozen=True)
class Plan:
    """Which row of the frozen outputs is which: copies of all pictures, then copies of all phantom patches."""

    pictures: tuple[Picture, ...]
    phantoms: tuple[tuple[int, str], ...]  # seed, kind; PER_PHANTOM patches each
    copies: int

    @property
    def rows(self) -> int:
        return self.copies * (len(self.pictures) + PER_PHANTOM * len(self.phantoms))

    def batches(self, size: int = 32) -> Iterator[tuple[int, int, Callable[[], np.ndarray]]]:
        """(first row, copy, function that gives uint8 (b, 256, 256, 3))."""
        row = 0
        for number in range(self.copies):
            for start in range(0, len(self.pictures), size):
                part = self.pictures[start : start + size]
                yield row, number, lambda part=part: np.stack([_canvas(picture.read()) for picture in part])
                row += len(part)
        for number in range(self.copies):
            for seed, kind in self.phantoms:
                yield row, number, lambda seed=seed, kind=kind: phantom.patches(seed, kind, PER_PHANTOM, 256, mixed=0.4)
                row += PER_PHANTOM


def make_plan(tiles: Path, slides: Path, recipe: Recipe) -> Plan:
    """Everything a recipe learns from."""
    kinds = tuple((seed, kind) for seed in list_phantom_seeds("train", recipe.phantoms) for kind in phantom.KINDS)
    return Plan(tuple(pictures(tiles, slides, recipe.of_a_slide)), kinds, recipe.copies)


def early(network: Any, x: Tensor, blocks: int) -> Tensor:
    """Stem and the first blocks."""
    x = network._swish(network._bn0(network._conv_stem(x)))
    for block in network._blocks[:blocks]:
        x = block(x)
    return x


def late(network: Any, x: Tensor, blocks: int) -> Tensor:
    """What `early` leaves: (B, 1280) from its output."""
    for block in network._blocks[blocks:]:
        x = block(x)
    return network._swish(network._bn1(network._conv_head(x))).mean((2, 3))


def compute_frozen(network: Any, plan: Plan, recipe: Recipe, out: Path) -> np.ndarray:
    """Outputs of the frozen blocks for every row of the plan, float16, as a memory map of out/frozen.npy.

    out/frozen.json says how far it is: a stopped run goes on there, another recipe or other data begin anew.
    """
    network, dtype = fold_lite0(copy.deepcopy(network)), fast_dtype(torch.device("cpu"))
    network = network.to(dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        shape = (plan.rows, *early(network, torch.zeros(1, 3, SIDE, SIDE, dtype=dtype), recipe.frozen).shape[1:])
    told = (
        f"{dtype}" + repr([(str(picture.file.name), picture.member) for picture in plan.pictures]) + repr(plan.phantoms)
    )
    key = hashlib.sha256(f"{told}{recipe.seed}{recipe.copies}{recipe.frozen}".encode()).hexdigest()
    progress, path = out / "frozen.json", out / "frozen.npy"
    state = json.loads(progress.read_text()) if progress.is_file() and path.is_file() else {}
    done = state["done"] if state.get("key") == key else 0
    if done:
        rows = np.lib.format.open_memmap(path, "r+")
    else:
        progress.unlink(missing_ok=True)
        rows = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    began = time.time()
    for number, (first, number_of_copy, read) in enumerate(plan.batches()):
        if number < done:
            continue
        pixels = torch.from_numpy(read())
        margin = (pixels.shape[1] - SIDE) // 2
        if number_of_copy:
            pixels = augment(pixels, torch.Generator().manual_seed(1_000_003 * recipe.seed + number))
        else:
            pixels = pixels[:, margin : margin + SIDE, margin : margin + SIDE]
        with torch.inference_mode():
            x = pixels_to_lite0(pixels).to(dtype, memory_format=torch.channels_last)
            rows[first : first + len(pixels)] = early(network, x, recipe.frozen).half().numpy()
        if number % 50 == 49 or first + len(pixels) == plan.rows:
            rows.flush()
            write_json(progress, {"key": key, "done": number + 1})
            print(
                f"frozen blocks: {first + len(pixels)} of {plan.rows} pictures, {time.time() - began:.0f} s", flush=True
            )
    return rows


# --------------------------------------------------------------------------------------------------------- training


class Heads(nn.Module):
    """What is asked of the features in training; thrown away afterwards."""

    def __init__(self, kinds: int, phantom_kinds: int, organs: int, dim: int = 1280):
        super().__init__()
        self.tile = nn.Linear(dim, kinds)
        self.phantom = nn.Linear(dim, phantom_kinds)
        self.organ = nn.Linear(dim, organs)
        self.facts = nn.Linear(dim, len(FACTS))


@dataclass(frozen=True)
class Targets:
    """Labels of the rows of one copy, as numbers."""

    kinds: tuple[str, ...]
    by_kind: tuple[np.ndarray, ...]  # pictures of each kind
    sources: np.ndarray  # (pictures,) of each picture
    organs: tuple[str, ...]
    by_slide: tuple[np.ndarray, ...]  # pictures of each slide
    slide_organ: Tensor  # (slides,) UNKNOWN where it is not told
    slide_facts: Tensor  # (slides, FACTS) 0, 1 or UNKNOWN


def make_targets(plan: Plan, slides: Path) -> Targets:
    """The labels of a plan's pictures."""
    groups = np.array([picture.group for picture in plan.pictures])
    names = np.array([picture.name for picture in plan.pictures])
    kinds = tuple(sorted(set(names[groups == "tile"].tolist())))
    rows = slide_rows(slides, "train")
    organs = tuple(sorted({row["organ_group"] for row in rows} - {"unclear"}))
    value = {"yes": 1, "no": 0}
    return Targets(
        kinds,
        tuple(np.flatnonzero((groups == "tile") & (names == kind)) for kind in kinds),
        np.array([picture.source for picture in plan.pictures]),
        organs,
        tuple(np.flatnonzero((groups == "slide") & (names == row["slide"])) for row in rows),
        torch.tensor([organs.index(row["organ_group"]) if row["organ_group"] in organs else UNKNOWN for row in rows]),
        torch.tensor([[value.get(row[fact], UNKNOWN) for fact in FACTS] for row in rows]),
    )


def draw_tiles(targets: Targets, count: int, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """Pictures and their kinds: each kind equally likely, and within a kind each slide."""
    chosen = rng.integers(len(targets.kinds), size=count)
    rows = np.empty(count, np.int64)
    for place, kind in enumerate(chosen):
        pool = targets.by_kind[kind]
        source = rng.choice(np.unique(targets.sources[pool]))
        rows[place] = rng.choice(pool[targets.sources[pool] == source])
    return rows, torch.from_numpy(chosen)


def draw_slides(targets: Targets, recipe: Recipe, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """Pictures (slides * patches,) and the slides they are of; half of the slides are malignant ones."""
    malignant = targets.slide_facts[:, FACTS.index("malignant")].numpy() == 1
    pools = [np.flatnonzero(malignant), np.flatnonzero(~malignant)]
    chosen = np.array(
        [rng.choice(pools[place % 2] if len(pools[place % 2]) else pools[1]) for place in range(recipe.slides_a_step)]
    )
    rows = [rng.choice(targets.by_slide[slide], recipe.patches_a_slide) for slide in chosen]
    return np.concatenate(rows), torch.from_numpy(chosen)


def slide_loss(heads: Heads, pooled: Tensor, slides: Tensor, targets: Targets) -> Tensor:
    """Cross-entropies of the facts of slides that are told, from their mean features (slides, D)."""
    organ = nn.functional.cross_entropy(
        heads.organ(pooled), targets.slide_organ[slides], ignore_index=UNKNOWN, reduction="none"
    )
    facts = targets.slide_facts[slides]
    told = (facts != UNKNOWN).float()
    binary = nn.functional.binary_cross_entropy_with_logits(
        heads.facts(pooled), facts.clamp(0).float(), reduction="none"
    )
    return organ.mean() / math.log(max(2, len(targets.organs))) + (binary * told).sum() / told.sum().clamp(1)


def train(network: Any, plan: Plan, targets: Targets, rows: np.ndarray, recipe: Recipe, out: Path) -> None:
    """Fine-tune the blocks that are not frozen; network is changed in place. Goes on from out/state.pt."""
    torch.manual_seed(recipe.seed)
    heads = Heads(len(targets.kinds), len(phantom.KINDS), len(targets.organs))
    tail = nn.ModuleList([*network._blocks[recipe.frozen :], network._conv_head, network._bn1])
    groups = [
        {"params": list(tail.parameters()), "lr": recipe.rate},
        {"params": list(heads.parameters()), "lr": recipe.head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.decay)
    warm = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / recipe.steps))),
    )
    state_file, log, first = out / "state.pt", out / "log.jsonl", 0
    parts = {"tail": tail, "heads": heads, "optimizer": optimizer, "schedule": schedule}
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(
                f"{out} holds a run of another recipe. Choose another --out or delete {state_file.name} there."
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    cut_metrics(log, first)
    dtype = fast_dtype(torch.device("cpu"))
    per_copy, phantoms = len(plan.pictures), PER_PHANTOM * len(plan.phantoms)
    tail.train()
    began = time.time()
    for step in range(first, recipe.steps):
        rng = np.random.default_rng((recipe.seed, step))
        torch.manual_seed(int(rng.integers(2**31)))  # of dropout
        tile_rows, kinds = draw_tiles(targets, recipe.tiles_a_step, rng)
        slide_patches, slides = draw_slides(targets, recipe, rng)
        drawn = rng.integers(phantoms, size=recipe.phantoms_a_step)
        phantom_kinds = torch.from_numpy(drawn // PER_PHANTOM % len(phantom.KINDS))
        copies = rng.integers(recipe.copies, size=len(tile_rows) + len(slide_patches) + len(drawn))
        real = np.concatenate([tile_rows, slide_patches])
        wanted = np.concatenate(
            [
                real + per_copy * copies[: len(real)],
                drawn + recipe.copies * per_copy + phantoms * copies[len(real) :],
            ]
        )
        x = torch.from_numpy(rows[wanted]).float().to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, dtype != torch.float32):
            features = late(network, x, recipe.frozen).float()
        dropped = nn.functional.dropout(features, 0.2)
        a, b = len(tile_rows), len(real)
        pooled = nn.functional.dropout(
            features[a:b].view(recipe.slides_a_step, recipe.patches_a_slide, -1).mean(1), 0.2
        )
        losses = {
            "tile": nn.functional.cross_entropy(heads.tile(dropped[:a]), kinds, label_smoothing=0.1),
            "slide": slide_loss(heads, pooled, slides, targets),
            "phantom": nn.functional.cross_entropy(heads.phantom(dropped[b:]), phantom_kinds, label_smoothing=0.1),
        }
        loss = losses["tile"] + recipe.slide_weight * losses["slide"] + recipe.phantom_weight * losses["phantom"]
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of step {step} is {loss.item()}. Use a lower --rate, and another --out.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 2.0)
        optimizer.step()
        schedule.step()
        append_line(log, {"step": step, "seconds": time.time() - began, **{k: v.item() for k, v in losses.items()}})
        if step % 20 == 19:
            told = ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            print(f"step {step + 1} of {recipe.steps}: {told}, {time.time() - began:.0f} s", flush=True)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            with replacing(state_file) as partial:
                saved = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"step": step + 1, "recipe": asdict(recipe), **saved}, partial)
    tail.eval()


def save_weights(network: Any, path: Path, recipe: Recipe) -> None:
    """The network without its classifier, float16, as load_encoder reads it."""
    weights = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
        if not name.startswith("_fc.") and not name.endswith("num_batches_tracked")
    }
    with replacing(path) as partial:
        save_file(weights, partial, {"recipe": json.dumps(asdict(recipe))})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tiles", type=Path, required=True, help="folder with atlas/ and crc_tissue/")
    parser.add_argument("--slides", type=Path, required=True, help="folder with slides.csv and patches/")
    add_flag(parser, "--out", help="folder of the run; 0.3 GB for the default recipe")
    parser.add_argument("--threads", type=int, help="of torch")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})
    with hold(arguments.out):
        run(arguments.tiles, arguments.slides, recipe, arguments.out)


def run(tiles: Path, slides: Path, recipe: Recipe, out: Path) -> Path:
    """The whole training. Returns the file of the weights."""
    out.mkdir(parents=True, exist_ok=True)
    network = build_lite0(imagenet_weights())
    network.requires_grad_(False)
    plan = make_plan(tiles, slides, recipe)
    targets = make_targets(plan, slides)
    rows = compute_frozen(network, plan, recipe, out)
    for part in (*network._blocks[recipe.frozen :], network._conv_head, network._bn1):
        part.requires_grad_(True)
    train(network, plan, targets, rows, recipe, out)
    path = out / f"{HE}.safetensors"
    save_weights(network, path, recipe)
    print(path)
    return path


if __name__ == "__main__":
    run_command(main)
