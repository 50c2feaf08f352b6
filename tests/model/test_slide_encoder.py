"""Slide encoders: what each patch may see, unit variance, and dilated attention against its definition."""

import pytest
import torch
from torch import Tensor

from sparsewsi.model.slide_encoder import LongNetBlock, SlideEncoder, dilated_attention


def plain_dilated_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[int, ...], dilations: tuple[int, ...]
) -> Tensor:
    """The definition, token by token: exponentials summed over every pair, divided by all denominators together."""
    heads, n, width = query.shape
    result = torch.zeros_like(query)
    for h in range(heads):
        for i in range(n):
            numerator, denominator = torch.zeros(width, dtype=query.dtype), torch.zeros((), dtype=query.dtype)
            for w, r in zip(segments, dilations):
                if i % w % r != h % r:
                    continue
                start = i // w * w
                seen = [j for j in range(start, min(start + w, n)) if (j - start) % r == h % r]
                weights = (key[h, seen] @ query[h, i] * width**-0.5).exp()
                numerator += weights @ value[h, seen]
                denominator += weights.sum()
            result[h, i] = numerator / denominator
    return result


@pytest.mark.parametrize("n", [1, 3, 8, 13, 37])
def test_dilated_attention_is_what_its_definition_says(n: int) -> None:
    segments, dilations = (4, 8, 16), (1, 2, 4)
    generator = torch.Generator().manual_seed(n)
    query, key, value = torch.randn(3, 2, 5, n, 6, dtype=torch.float64, generator=generator)
    found = dilated_attention(query, key, value, segments, dilations)
    for batch in range(2):
        plain = plain_dilated_attention(query[batch], key[batch], value[batch], segments, dilations)
        assert torch.allclose(found[batch], plain, atol=1e-5)  # the softmax inside is float32


def test_one_segment_without_gaps_is_plain_attention() -> None:
    query, key, value = torch.randn(3, 1, 2, 50, 8)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(dilated_attention(query, key, value, (1024,), (1,)), plain, atol=1e-5)


def test_gradients_flow_through_the_recomputed_parts() -> None:
    torch.manual_seed(0)
    block, x = LongNetBlock(16, 4), torch.randn(40, 16)
    x.requires_grad_(True)
    block(x).square().sum().backward()
    assert x.grad is not None
    analytic = x.grad[3, 5].item()
    step = torch.zeros_like(x)
    step[3, 5] = 1e-2
    with torch.no_grad():
        numeric = (block(x + step).square().sum() - block(x - step).square().sum()).item() / 2e-2
    assert analytic == pytest.approx(numeric, rel=2e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("kind", ["pointwise", "longnet", "none"])
def test_tokens_have_unit_variance_and_leading_axes_stay(kind: str) -> None:
    encoder = SlideEncoder(24, 16, 2, kind, heads=4)
    x = encoder(torch.randn(2, 3, 11, 24) * 7 + 3)
    assert x.shape == (2, 3, 11, 16)
    assert torch.allclose(x.var(-1, unbiased=False), torch.ones(2, 3, 11), atol=1e-2)


@pytest.mark.parametrize(("kind", "sees"), [("pointwise", False), ("none", False), ("longnet", True)])
def test_only_longnet_lets_patches_see_each_other(kind: str, sees: bool) -> None:
    torch.manual_seed(0)
    encoder, features = SlideEncoder(24, 16, 2, kind, heads=4), torch.randn(30, 24)
    changed = features.clone()
    changed[0] += torch.randn(24)
    difference = (encoder(features) - encoder(changed))[1:].abs().amax()
    assert (difference > 1e-6) == sees
    assert encoder.pointwise != sees


def test_longnet_takes_a_slide_longer_than_its_longest_segment() -> None:
    encoder = SlideEncoder(8, 16, 1, "longnet", heads=1)
    with torch.no_grad():
        x = encoder(torch.randn(17_000, 8))
    assert x.shape == (17_000, 16)
    assert x.isfinite().all()
