"""Training material from labelled tiles and from phantoms: feature banks, and mosaics as slides.

    python -m train.data.mosaic bank --tiles tiles --out runs/bank.safetensors
    python -m train.data.mosaic bank --classes NCT-CRC-HE-100K --out runs/nct.safetensors
    python -m train.data.mosaic slides --tiles tiles --slides 4 --n 4096 --out mosaics

`--tiles` is a folder with atlas/ and crc_tissue/, split by slide as train/data/mosaic_split.json says; without tiles,
a bank is made of phantoms. `--classes` takes any folder that has a folder of images for each class, as Kather 2016 and
NCT-CRC-HE-100K do. These do not tell from which slide or patient an image is, so they are split by file: patches of one
patient lie in train and test alike, and accuracies come out too high.

`slides` writes mosaics as pyramidal TIFF slides (train/data/mosaic_slides.py).
"""

import json
from pathlib import Path

from sparsewsi.bags.efficientnet import HE
from train.data.bank import cut_tiles, draw_phantom_patches, write_bank
from train.data.mosaic_slides import write_slides
from train.data.tiles import find_class_tiles, find_tiles
from train.flags import add_flag, make_parser, run_command


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=["bank", "slides"])
    parser.add_argument("--tiles", type=Path, help="folder with atlas/ and crc_tissue/; without it, phantoms")
    parser.add_argument("--classes", type=Path, help="folder with a folder of images for each class")
    parser.add_argument("--labels", type=Path, help="JSON: what each class folder is; default those of Kather, NCT-CRC")
    parser.add_argument("--per-class", type=int, help="images of a class at most")
    parser.add_argument("--phantoms", type=int, default=60, help="number of training phantoms")
    parser.add_argument("--copies", type=int, default=6, help="augmented copies of a real training tile")
    parser.add_argument("--encoder", default=HE)
    parser.add_argument("--slides", type=int, default=1, help="slides: how many")
    add_flag(parser, "--n", default=4096, help="slides: patches of each")
    add_flag(parser, "--split", help="slides: whose tiles to use")
    add_flag(parser, "--seed", help="slides: of the first one; the next ones count on")
    parser.add_argument("--split-seed", type=int, default=0, help="of the split of --classes")
    add_flag(parser, "--out", help="bank: a file; slides: a folder")
    arguments = parser.parse_args()
    vocabulary, origin, tiles = None, "phantom", []
    if arguments.classes:
        labels = json.loads(arguments.labels.read_text()) if arguments.labels else None
        tiles, vocabulary = find_class_tiles(arguments.classes, labels, arguments.per_class, arguments.split_seed)
        vocabulary.register()
        origin = vocabulary.origin
    elif arguments.tiles:
        tiles, origin = find_tiles(arguments.tiles), "real"
    if arguments.command == "slides":
        if not tiles:
            parser.error("slides needs --tiles or --classes; for phantom slides see python -m sparsewsi phantom")
        write_slides(arguments.out, tiles, origin, arguments.split, arguments.slides, arguments.n, arguments.seed)
        return
    from sparsewsi.bags.encoders import load_encoder

    encoder = load_encoder(arguments.encoder)
    patches = cut_tiles(tiles, arguments.copies) if tiles else draw_phantom_patches(arguments.phantoms, 12)
    write_bank(arguments.out, patches, encoder, encoder.name, origin, vocabulary)


if __name__ == "__main__":
    run_command(main)
