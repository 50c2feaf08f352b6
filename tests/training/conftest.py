"""A bank of made-up kinds, and settings of a stage small enough for a test."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from train.config import TrainConfig
from train.data.kinds import BACKGROUNDS, NEEDLES


@pytest.fixture(scope="session")
def bank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature bank of well separated made-up kinds, in the format of `train.data.mosaic bank`."""
    kinds = np.repeat([*BACKGROUNDS["phantom"], *NEEDLES["phantom"]], 24)
    centres = np.random.default_rng(0).normal(0, 1, (len(set(kinds)), 24))
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    noise = np.random.default_rng(1).normal(0, 0.3, (len(kinds), 24))
    features = torch.tensor(np.stack([centres[order[kind]] for kind in kinds]) + noise).half()
    path = tmp_path_factory.mktemp("bank") / "phantom.safetensors"
    metadata = {
        "kinds": json.dumps(kinds.tolist()),
        "sources": json.dumps([f"phantom-{i % 3}" for i in range(len(kinds))]),
        "splits": json.dumps(["test" if i % 2 else "train" for i in range(len(kinds))]),
        "encoder": "made-up",
        "origin": "phantom",
    }
    save_file({"features": features}, path, metadata)
    return path


@pytest.fixture
def settings(bank_file: Path, tiny_llm: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        stage=1, out=str(tmp_path / "stage1"), banks=[str(bank_file)], llm=str(tiny_llm), steps=4, accumulation=2,
        dim=16, patches=20, num_tokens=6, dense=0.25, anneal=0.5, k_start=0.75, lora_rank=2, lora_alpha=4,
        questions_per_bag=3, checkpoint_every=2,
    )  # fmt: skip
