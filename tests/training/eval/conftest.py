"""A model on the tiny LLM for made-up features."""

from pathlib import Path

import pytest
import torch

from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import load_llm
from sparsewsi.model.sparse_wsi import SparseWSI


@pytest.fixture(scope="module")
def model(tiny_llm: Path) -> SparseWSI:
    torch.manual_seed(0)
    llm, tokenizer = load_llm(str(tiny_llm), dtype=torch.float32)
    config = SparseWSIConfig(llm=str(tiny_llm), encoder="made-up", feature_dim=12, dim=16, num_tokens=4, heads=4)
    return SparseWSI(config, llm, tokenizer).eval()
