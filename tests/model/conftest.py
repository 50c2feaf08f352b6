"""A model whose every part has drawn weights, nothing zero or the identity."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import load_llm
from sparsewsi.model.sparse_wsi import SparseWSI

CONFIG = SparseWSIConfig(feature_dim=24, dim=32, num_tokens=8, heads=4)


@pytest.fixture(scope="session")
def make_model(tiny_llm: Path) -> Callable[..., SparseWSI]:
    """config: SparseWSIConfig, lora: bool -> a model in float32 on the tiny LLM."""

    def make(config: SparseWSIConfig = CONFIG, lora: bool = False) -> SparseWSI:
        llm, tokenizer = load_llm(str(tiny_llm), device="cpu", dtype=torch.float32)
        torch.manual_seed(0)
        if lora:
            llm = get_peft_model(llm, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        model = SparseWSI(dataclasses.replace(config, llm=str(tiny_llm)), llm, tokenizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("llm.") or "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make
