"""Several questions behind one prefix on a GPU: FlexAttention with a BlockMask in place of a dense mask.

With a dense mask SDPA cannot take its flash kernel, and the mask has L x L entries. A BlockMask tells which blocks of
keys a block of queries sees, so that what no question sees of another is not computed. Without gaps between what is
seen (one question, one bag) SDPA needs no mask and stays the faster one; `causal` says so without a look at the GPU.

L = length of the packed sequence.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sdpa_or_flex"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention where the mask is a BlockMask, SDPA's own causal mask where it is `causal`, else SDPA with it."""
    # Not yet run on a GPU: the CPU is given a dense mask, but for the test of equal logits.
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **given)
    if attention_mask is not None and not attention_mask.numel():
        attention_mask = None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


def causal(device: torch.device) -> Tensor:
    """The mask that says to `attend`: all see what lies before them. Nothing is in it.

    Of a mask of ones transformers asks whether it is one, and waits for the GPU; one with four axes it hands on.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def take_blocks(llm: nn.Module) -> bool:
    """Let an LLM of transformers take a BlockMask as its mask; returns whether it can.

    All other masks mean to it what they meant. Not where torch cannot compile for the GPU (no Triton), and not for an
    LLM whose attention is its own.
    """
    if not getattr(llm, "_supports_flex_attn", False) or importlib.util.find_spec("triton") is None:
        return False
    return set_attention(llm)


def set_attention(llm: nn.Module) -> bool:
    """Put `attend` in the place of an LLM's attention; returns whether it had SDPA, the one that is replaced."""
    if llm.config._attn_implementation != "sdpa":  # type: ignore[union-attr]
        return takes_blocks(llm)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    llm.set_attn_implementation(NAME)  # type: ignore[operator]
    return True


def takes_blocks(llm: nn.Module) -> bool:
    """Whether `take_blocks` has prepared this LLM."""
    return getattr(llm.config, "_attn_implementation", "") == NAME  # type: ignore[arg-type]


def block_mask(bag: Tensor, question: Tensor) -> BlockMask:
    """What train.data.packing.visible tells of bag (L,) and question (L,), as a BlockMask on their device."""

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mine = (question[key] == 0) | (question[key] == question[query])
        return (key <= query) & mine & (bag[key] == bag[query])

    length, device = len(bag), bag.device
    # Not compiled, all L x L entries would be held for a moment (not yet run on a GPU).
    compiled = device.type == "cuda"
    return create_block_mask(sees, None, None, length, length, device=str(device), _compile=compiled)
