"""From patch features to visual tokens of unit variance, each patch alone or with LongNet's dilated attention.

N patches, D width of a token, H heads, S segments, M tokens that one head sees of a segment.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SEGMENTS = (1024, 2048, 4096, 8192, 16384)
DILATIONS = (1, 2, 4, 8, 16)
GROUP = 64  # attention matrices of 1024 x 1024 float32 held at once: 256 MB


class SlideEncoder(nn.Module):
    """(..., N, feature_dim) float -> (..., N, dim), ending in LayerNorm: the noise gate assumes unit-variance tokens.

    kind: "pointwise" residual MLP blocks, each patch alone; "longnet" dilated attention, in which patches see each
          other at a cost linear in N; "none" a linear layer; "slidechat" SlideChat's, each patch alone, without a
          layer in front: feature_dim is dim.
    """

    def __init__(self, feature_dim: int, dim: int, layers: int = 2, kind: str = "pointwise", heads: int = 8):
        super().__init__()
        assert kind in ("pointwise", "longnet", "none", "slidechat"), kind
        self.kind = kind
        self.inlet = nn.Identity() if kind == "slidechat" else nn.Linear(feature_dim, dim)
        if kind == "pointwise":
            blocks = [ResidualMLP(dim) for _ in range(layers)]
        elif kind == "longnet":
            blocks = [LongNetBlock(dim, heads) for _ in range(layers)]
        elif kind == "slidechat":
            blocks = [SubLNBlock(dim) for _ in range(layers)]
        else:
            blocks = []
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)

    @property
    def pointwise(self) -> bool:
        """True if no patch sees another, so that a slide may be encoded in parts."""
        return self.kind != "longnet"

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.blocks(self.inlet(features)))


class ResidualMLP(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, dim: int, ffn: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, ffn * dim), nn.GELU(), nn.Linear(ffn * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class LongNetBlock(nn.Module):
    """Pre-LN Transformer block with dilated attention (LongNet, arXiv 2307.02486); FFN of twice the width."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        assert dim % heads == 0, (dim, heads)
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-4, -2)  # (..., 3, H, N, D/H)
        flat = qkv.reshape(-1, *qkv.shape[-4:])
        mixed = dilated_attention(flat[:, 0], flat[:, 1], flat[:, 2])  # (B, H, N, D/H)
        mixed = mixed.transpose(1, 2).flatten(-2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.ffn(self.norm2(x))


class SubLNBlock(nn.Module):
    """A block of SlideChat's LongNet as it was released: pre-LN with a LayerNorm in front of both output layers.

    (Sub-LN: Foundation Transformers, arXiv 2210.06423.) Released code gives it the N patches of a slide as N sequences
    of one patch. Softmax over one key is 1, so attention is the value alone, its query and key weights have no effect,
    and no patch sees another. FFN of twice the width.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.value = nn.Linear(dim, dim)
        self.inner_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.ffn_norm = nn.LayerNorm(2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.inner_norm(self.value(self.norm1(x))))
        return x + self.down(self.ffn_norm(nn.functional.gelu(self.up(self.norm2(x)))))


def build_projector(kind: str, dim: int, width: int) -> nn.Sequential:
    """From visual tokens (..., dim) to the width of the LLM's embeddings; "scaled" ends in a LayerNorm."""
    layers = [nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, *([nn.LayerNorm(width)] if kind == "scaled" else []))


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...] = SEGMENTS,
    dilations: tuple[int, ...] = DILATIONS,
) -> Tensor:
    """Mix of attentions over segments of w tokens of which head h sees every r-th, from offset h mod r.

    query, key, value: (B, H, N, d). Each (w, r) pair gives outputs and their softmax denominators; the result is their
    mean weighted by the denominators (LongNet, eq. 10), a token that a pair leaves out having weight 0 there.
    Returns (B, H, N, d). Cost and memory are linear in N.
    """
    top = query.new_full(query.shape[:3], -torch.inf)  # running maximum of the log denominators
    weight = torch.zeros_like(top)
    total = torch.zeros_like(query)
    for segment, dilation in zip(segments, dilations):
        out, log_denominator = _one_dilation(query, key, value, segment, dilation)
        new_top = torch.maximum(top, log_denominator.detach())
        old, new = (top - new_top).exp(), (log_denominator - new_top).exp()
        total = total * old[..., None] + out * new[..., None]
        weight = weight * old + new
        top = new_top
    return total / weight[..., None]


def _one_dilation(query: Tensor, key: Tensor, value: Tensor, segment: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, d) and log of the softmax denominator (B, H, N), -inf where a head skips a token."""
    batch, heads, n, width = query.shape
    segment = min(segment, -(-n // dilation) * dilation)
    padded = -(-n // segment) * segment
    head = torch.arange(heads, device=query.device)
    offset = head % dilation

    def pick(x: Tensor) -> Tensor:  # (B, H, N, d) -> (B, H, S, M, d)
        x = nn.functional.pad(x, (0, 0, 0, padded - n))
        x = x.reshape(batch, heads, padded // segment, segment // dilation, dilation, width)
        return x[:, head, :, :, offset].movedim(0, 1)  # advanced indices come first: (H, B, S, M, d)

    place = torch.arange(padded, device=query.device).reshape(1, padded // segment, segment // dilation, dilation)
    real = (place < n).expand(heads, -1, -1, -1)[head, :, :, offset]  # (H, S, M)
    real = real[None].expand(batch, -1, -1, -1)
    parts = [x.flatten(0, 2) for x in (pick(query), pick(key), pick(value))] + [real.flatten(0, 2)]
    outs, logs = [], []
    for q, k, v, keys in zip(*(part.split(GROUP) for part in parts)):
        if torch.is_grad_enabled() and q.requires_grad:  # else the M x M matrices of all segments are kept
            out, log = checkpoint(_attend, q, k, v, keys, use_reentrant=False)  # type: ignore[misc]
        else:
            out, log = _attend(q, k, v, keys)
        outs.append(out)
        logs.append(log)
    shape = (batch, heads, padded // segment, segment // dilation)
    out = torch.cat(outs).reshape(*shape, width)
    log = torch.cat(logs).reshape(shape)
    full_out = query.new_zeros(*shape, dilation, width)
    full_out[:, head, :, :, offset] = out.movedim(1, 0).to(query.dtype)
    full_log = query.new_full((*shape, dilation), -torch.inf)
    full_log[:, head, :, :, offset] = log.movedim(1, 0).to(query.dtype)
    return full_out.reshape(batch, heads, padded, width)[:, :, :n], full_log.reshape(batch, heads, padded)[:, :, :n]


def _attend(query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the real keys: (G, M, d) and real (G, M) -> (G, M, d) and the log denominators (G, M)."""
    logits = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5  # (G, M, M)
    logits = logits.masked_fill(~real[:, None, :], -1e30)  # finite: a group of padding alone must not give NaN
    log_denominator = logits.logsumexp(-1)
    return (logits - log_denominator[..., None]).exp().to(value.dtype) @ value, log_denominator
