"""Made-up banks and classes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import kinds
from train.data.bank import Bank
from train.data.kinds import BACKGROUNDS, NEEDLES


@pytest.fixture(scope="module")
def bank() -> Bank:
    """Twenty patches of each real kind, from two slides; the features are the number of the row."""
    every = np.repeat([*BACKGROUNDS["real"], *NEEDLES["real"]], 20)
    features = torch.arange(len(every), dtype=torch.float16)[:, None].repeat(1, 4)
    sources = np.array([f"slide-{i % 2}" for i in range(len(every))])
    return Bank(features, every, sources, "real", "made-up")


COLOURS = {  # of classes that no file names' order gives away; stained as H&E is, so that tissue is found
    "ADI": (225, 150, 190), "BACK": (243, 243, 243), "DEB": (190, 120, 160), "LYM": (90, 60, 150),
    "MUC": (170, 130, 200), "MUS": (220, 110, 140), "NORM": (150, 80, 170), "STR": (235, 130, 170),
    "TUM": (110, 40, 120),
}  # fmt: skip


@pytest.fixture
def class_colours() -> dict[str, tuple[int, int, int]]:
    """The colour of each class folder of `classes`."""
    return COLOURS


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    tables = (kinds.NEEDLES, kinds.BACKGROUNDS, kinds.WORDS)
    copies = [table.copy() for table in tables]
    needles = kinds.NEEDLE_KINDS.copy()
    yield
    for table, copy in zip(tables, copies):
        table.clear()
        table.update(copy)
    kinds.NEEDLE_KINDS[:] = needles


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as NCT-CRC-HE-100K is, of even colours; some tiles are as small as those of Kather 2016."""
    folder = tmp_path_factory.mktemp("data") / "made-up-classes"
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(30):
            side = 150 if number % 5 == 0 else 224
            Image.new("RGB", (side, side), colour).save(folder / name / f"{name}-{number}.png")
    return folder
