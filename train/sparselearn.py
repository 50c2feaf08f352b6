"""SparseLearn: what stands between the scorer and the LLM during training, and is gone at inference.

z-score -> soft top-K -> noise gate -> denoiser (paper, sections 3.2 to 3.4).

Shapes: ... any leading axes, N patches of one slide (padded where a mask is given), D width of a token, K kept (a
budget, need not be whole while it is annealed), M the few largest scores that are treated in float64.
mask: bool (..., N), True = a real patch.

The soft top-K finds the threshold b of sum_i F((z_i - b) / tau) = K. Only the M largest scores can lie near b or above
it; of all others no more is needed than a sum (laplace) or a few power sums (logistic) of exp((z_i - z_M) / tau). So
the cost is a handful of passes over N plus a solve on M numbers in float64, without a wait for the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsewsi.model.selector import Block

KERNELS = ("laplace", "logistic")
GATES = ("vp", "scale")

# A token of rank r has alpha <= K / r, so beyond rank LOGISTIC_HEAD * K the odds v = alpha / (1 - alpha) are at most
# 1 / (LOGISTIC_HEAD - 1), and alpha = v - v^2 + v^3 - ... needs few terms: 15^-6 = 9e-8, 15^-13 = 5e-16.
LOGISTIC_HEAD = 16
LOGISTIC_TERMS = {torch.float32: 6, torch.float64: 13}
NEWTON_STEPS = 4  # the largest errors seen after each: 0.4, 9e-3, 6e-6, 3e-12 tau
VARIANCE_FLOOR = 1e-5  # in z-score; with 1e-12 the gradient of constant scores reaches 9e5
BLOCK_SEARCH_FROM = 32_768  # length of a row from which a search by blocks beats one torch.topk (measured)
BLOCK_WIDTH_MIN = 8
ROW_DOT_PART = 4_194_304  # elements of the tokens multiplied at a time
PART = 131_072  # scores worked on at a time where a temporary is needed: a larger, fresh one costs page faults


# --------------------------------------------------------------------------------------------------------------- scores


def zscore(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores with mean 0 and variance 1 over the valid tokens of the last axis, masked tokens 0.

    Float32, or float64 where the scores are. Biased variance. Adding a constant to all scores changes nothing; constant
    scores give zeros and a finite gradient.
    """
    scores = _full_precision(scores)
    if mask is None:
        centred = scores - scores.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
    else:
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        scores = scores.masked_fill(~mask, 0.0)
        centred = (scores - scores.sum(-1, keepdim=True) / count).masked_fill(~mask, 0.0)
        variance = centred.square().sum(-1, keepdim=True) / count
    return centred * (variance + VARIANCE_FLOOR).rsqrt()


def soft_topk(scores: Tensor, k: float, tau: float, mask: Tensor | None = None, kernel: str = "laplace") -> Tensor:
    """alpha_i = F((scores_i - b) / tau) with b such that alpha sums to k over the last axis (paper, eq. 4).

    scores: (..., N), finite (what is not to count is masked, not -inf), taken as they are (see zscore).
    k: tokens to keep, > 0, whole or not. tau: temperature, > 0.
    kernel: F is the distribution function of the "laplace" (LapSum; for k = 1 this is softmax as long as no alpha
            exceeds 1/2) or of the "logistic" law (sigmoid).
    Returns (..., N) in [0, 1], float32 (float64 for float64 scores) under autocast too. Masked tokens are exactly 0 and
    get no gradient; a row with at most k valid tokens is all ones with zero gradient; equal scores get equal alpha. As
    tau -> 0 alpha tends to the mask of the k largest scores. Differentiable once, by the implicit function theorem.
    Raises ValueError for k <= 0, tau <= 0, an unknown kernel, or a mask of another shape.
    """
    _check(scores, k, tau, mask, kernel)
    if not scores.shape[-1]:
        return _full_precision(scores)
    return _SoftTopK.apply(_full_precision(scores), mask, float(k), float(tau), kernel)


def hardness(alpha: Tensor, scores: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Share of alpha's mass on the k highest scores, shape (...,): 1 where training does what hard top-k does.

    alpha, scores, mask: (..., N). A row of at most k valid tokens gives 1. While K is annealed, the k of inference says
    how far training still is from it, the k of the step how soft the gate is.
    """
    scores = scores.detach() if mask is None else scores.detach().masked_fill(~mask, -math.inf)
    alpha = alpha.detach()
    kept = alpha.gather(-1, scores.topk(min(k, scores.shape[-1]), dim=-1).indices).sum(-1)
    return kept / alpha.sum(-1).clamp(min=torch.finfo(alpha.dtype).tiny)


def tau_at(step: int, total: int, start: float, end: float) -> float:
    """Temperature at a step: cosine from start (step 0) to end (step >= total)."""
    progress = min(max(step / total, 0.0), 1.0) if total > 0 else 1.0
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def k_at(step: int, total: int, k_start: float, k_end: float) -> float:
    """Budget K at a step, geometric from k_start (e.g. 3/4 N) to k_end, not whole in between.

    Ours: the paper keeps K fixed.
    """
    progress = min(max(step / total, 0.0), 1.0) if total > 0 else 1.0
    return k_end if progress == 1.0 else k_start * (k_end / k_start) ** progress


# ----------------------------------------------------------------------------------------------------------- noise gate


def vp_noise_gate(x: Tensor, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """sqrt(alpha) x + sqrt(1 - alpha) noise (paper, eq. 5), for callers that have alpha but not the scores behind it.

    x: (..., N, D) with unit variance per token, else the variance is not preserved. alpha: (..., N).
    generator: on x's device. The gradient towards alpha is infinite where alpha is 0 or 1; soft_topk_gate's never is.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    alpha = alpha.unsqueeze(-1)
    return (alpha.sqrt() * x + (1 - alpha).sqrt() * noise).to(x.dtype)


def soft_topk_gate(
    x: Tensor, scores: Tensor, k: float, tau: float, noise: Tensor, mask: Tensor | None = None, kernel: str = "laplace"
) -> Tensor:
    """vp_noise_gate(x, soft_topk(scores, ...)) in one step, with a finite and accurate gradient everywhere.

    x, noise: (..., N, D); scores, mask: (..., N), as for soft_topk. Masked tokens come out as zeros.
    Both coefficients and their derivatives are formed from the logit u = (z - b) / tau, so nothing is divided by an
    alpha that rounded to 0 or by a 1 - alpha that did. No gradient flows to the noise.
    """
    _check(scores, k, tau, mask, kernel)
    if x.shape[:-1] != scores.shape or noise.shape != x.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, noise {tuple(noise.shape)} and scores {tuple(scores.shape)} do not fit: "
            "x and noise must be (..., N, D) where scores are (..., N)."
        )
    if not scores.shape[-1]:
        return x
    return _Gate.apply(x, _full_precision(scores), noise, mask, float(k), float(tau), kernel)


# ------------------------------------------------------------------------------------------------------------- denoiser


class Denoiser(nn.Module):
    """One Transformer block after the gate (section 3.4); starts as the identity, since it is gone at inference.

    attention="local" lets each token see itself alone (softmax over one element is 1, so out(value(x)) is left);
    "global" is the paper's ablation, in which tokens see past the gate.
    """

    def __init__(self, dim: int, heads: int = 8, attention: str = "local"):
        super().__init__()
        self.attention = attention
        self.block = Block(dim, heads, attention)  # the last layer of both branches is zero

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., N, D) -> (..., N, D). No token sees a masked one; what masked ones come out as is left undefined."""
        if mask is None or self.attention == "local":
            return self.block(x)
        rows, kept = x.flatten(0, -3) if x.ndim > 2 else x[None], mask.reshape(-1, mask.shape[-1])
        valid = [self.block(row[keep]) for row, keep in zip(rows, kept, strict=True)]
        return x.masked_scatter(mask.unsqueeze(-1), torch.cat(valid).to(x.dtype))


class SparseLearn(nn.Module):
    """z-score, soft top-K, gate, denoiser; the training path of the paper (figure 2b). Not part of a released model.

    dim: width of the tokens. k: the budget K of inference. heads: of the denoiser.
    kernel: "laplace" | "logistic". gate: "vp" | "scale" (ablation: x alpha).
    denoiser: "local" | "global" (ablation) | "none".
    """

    def __init__(
        self, dim: int, k: int, heads: int = 8, kernel: str = "laplace", gate: str = "vp", denoiser: str = "local"
    ):
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {kernel!r}; choose one of {', '.join(KERNELS)}.")
        if gate not in GATES:
            raise ValueError(f"gate is {gate!r}; choose one of {', '.join(GATES)}.")
        if denoiser not in ("local", "global", "none"):
            raise ValueError(f"denoiser is {denoiser!r}; choose one of local, global, none.")
        self.k, self.kernel, self.gate = k, kernel, gate
        self.denoiser = None if denoiser == "none" else Denoiser(dim, heads, denoiser)

    def alpha(self, scores: Tensor, tau: float, mask: Tensor | None = None, k: float | None = None) -> Tensor:
        """The weights forward uses, (..., N); for logging: hardness(sparselearn.alpha(scores, tau), scores, 32)."""
        return soft_topk(zscore(scores, mask), self.k if k is None else k, tau, mask, self.kernel)

    def forward(
        self,
        x: Tensor,
        scores: Tensor,
        tau: float,
        mask: Tensor | None = None,
        k: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(..., N, D) tokens and (..., N) raw scores to (..., N, D) tokens, masked ones zero.

        k: another budget than self.k, while K is annealed.
        generator: source of the noise, on x's device, seeded by (seed, rank, step). Activation checkpointing around
        this call would draw other noise when it recomputes: leave it outside.
        """
        k = self.k if k is None else k
        if self.gate == "vp":
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = soft_topk_gate(x, zscore(scores, mask), k, tau, noise, mask, self.kernel)
        else:
            x = (x * self.alpha(scores, tau, mask, k).unsqueeze(-1)).to(x.dtype)
        if self.denoiser is not None:
            x = self.denoiser(x, mask)
        return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


# ---------------------------------------------------------------------------------------------- rivals of the soft gate


def ste_topk(scores: Tensor, k: int, tau: float, mask: Tensor | None = None, kernel: str = "laplace") -> Tensor:
    """Straight-through top-k: forward the hard 0/1 mask (ties to the lowest index), backward soft_topk's gradient.

    Arguments and shapes as for soft_topk; k is rounded down.
    """
    soft = soft_topk(scores, k, tau, mask, kernel)
    valid = scores.detach() if mask is None else scores.detach().masked_fill(~mask, -math.inf)
    order = valid.sort(dim=-1, descending=True, stable=True).indices[..., : math.floor(k)]
    hard = torch.zeros_like(soft).scatter_(-1, order, 1.0)
    hard = hard if mask is None else hard * mask
    return hard + (soft - soft.detach())


def gumbel_topk(
    scores: Tensor,
    k: int,
    tau: float,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    kernel: str = "laplace",
) -> Tensor:
    """Straight-through top-k of scores + tau * Gumbel noise, as ste_topk otherwise.

    Forward draws k tokens without replacement from softmax(scores / tau). generator: on the scores' device.
    """
    uniform = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    gumbel = -(-uniform.clamp(tiny, 1 - 1e-7).log()).log()
    return ste_topk(_full_precision(scores) + tau * gumbel, k, tau, mask, kernel)


# ------------------------------------------------------------------------------------------------------- the threshold


class _Largest(NamedTuple):
    values: Tensor  # (B, M), descending
    indices: Tensor  # (B, M)


class _Threshold(NamedTuple):
    """Where F((z - b) / tau) sums to k, for rows (B, N) whose masked scores are -inf."""

    indices: Tensor  # (B, M) of the M largest scores
    top: Tensor  # (B, M) float64, their logits (z - b) / tau
    rest: Tensor | None  # (B, N) exp((z - anchor) / tau), zero at `indices`; None if M = N
    anchor: Tensor  # (B, 1) float64, the smallest valid score among the M largest
    beta: Tensor  # (B, 1) float64, (b - anchor) / tau


def _largest(z: Tensor, m: int) -> _Largest:
    """The m largest of each row of z (B, N), descending.

    In long rows only the m blocks with the largest maxima are looked into: no score outside them exceeds any of these m
    maxima, so the m largest values are all found within.
    """
    rows, n = z.shape
    width = max(BLOCK_WIDTH_MIN, math.isqrt(n // max(m, 1)) // 2)
    blocks = n // width
    if n < BLOCK_SEARCH_FROM or blocks < m:
        return _Largest(*z.topk(m, dim=-1))
    whole = z[:, : blocks * width].unflatten(-1, (width, blocks))  # a column is a block: its maximum vectorises
    first = whole.amax(1).topk(m, dim=-1, sorted=False).indices.unsqueeze(1)  # (B, 1, m)
    found = whole.gather(2, first.expand(rows, width, m)).flatten(1)
    index = (first + torch.arange(0, blocks * width, blocks, device=z.device).unsqueeze(1)).flatten(1)
    left_over = torch.arange(blocks * width, n, device=z.device).expand(rows, -1)
    values, place = torch.cat([found, z[:, blocks * width :]], 1).topk(m, dim=-1)
    return _Largest(values, torch.cat([index, left_over], 1).gather(1, place))


def _find_threshold(z: Tensor, k: float, tau: float, kernel: str, masked: bool) -> _Threshold:
    """z: (B, N), N > k, masked scores -inf. Rows with at most k valid scores get values without meaning, even NaN."""
    n = z.shape[-1]
    head = 2 * k if kernel == "laplace" else LOGISTIC_HEAD * k
    largest = _largest(z, min(n, math.ceil(head) + 1))
    top = largest.values.double()  # (B, M)
    anchor = torch.where(top.isfinite(), top, math.inf).amin(-1, keepdim=True) if masked else top[:, -1:]
    if largest.indices.shape[-1] == n:
        rest = None
    else:
        # anchor is a float of z's precision, and close scores subtract exactly: no error of size z / tau arises
        rest = z.sub(anchor.to(z.dtype)).mul_(1 / tau).exp_().scatter_(-1, largest.indices, 0.0)
    x = (top - anchor) / tau  # (B, M) >= 0; -inf where masked
    beta = (_laplace_beta if kernel == "laplace" else _logistic_beta)(x, rest, k, n)
    return _Threshold(largest.indices, x - beta, rest, anchor, beta)


def _laplace_beta(x: Tensor, rest: Tensor | None, k: float, n: int) -> Tensor:
    """The threshold of the Laplace kernel, in closed form.

    With m scores above b, A = sum over them of e^-x and B = sum over the others of e^x, the alphas sum to
    m - e^b A / 2 + e^-b B / 2: quadratic in e^b. Each alpha above b exceeds 1/2, so m < 2k. All in logarithms, as x
    spans thousands at tau = 1e-3.
    """
    tail = x.new_full((x.shape[0], 1), -math.inf) if rest is None else rest.sum(-1, keepdim=True).double().log()
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    nothing = torch.full_like(tail, -math.inf)
    log_a = torch.cat([nothing, -x], -1).logcumsumexp(-1)  # (B, M + 1); at j over the j largest
    log_b = torch.cat([tail, x.flip(-1)], -1).logcumsumexp(-1).flip(-1)  # (B, M + 1); at j over all but the j largest
    # The sum of alpha, were b at the score of rank j = 1 .. M: below k for scores above b. NaN (masked) compares false.
    sum_there = rank - 0.5 * (log_a[:, 1:] + x).exp() + 0.5 * (log_b[:, 1:] - x).exp()
    above = (sum_there < k).sum(-1, keepdim=True)  # m
    log_a, log_b = log_a.gather(-1, above), log_b.gather(-1, above)
    surplus = above.double() - k
    log_surplus = surplus.abs().log()
    log_root = torch.logaddexp(log_surplus, 0.5 * torch.logaddexp(2 * log_surplus, log_a + log_b))
    return torch.where(surplus >= 0, log_root - log_a, log_b - log_root)


def _logistic_beta(x: Tensor, rest: Tensor | None, k: float, n: int) -> Tensor:
    """The threshold of the logistic kernel: Newton on log sum_rest sigmoid(u) = log sum_top sigmoid(-u), u = x - b.

    When k is not whole the score at the edge counts to both sides. Both sums are divided by their leading exponential,
    so that nothing underflows. The slope in b lies in [-2, -1]: no step ends further from the root than it began.
    """
    whole, edge = math.floor(k), math.ceil(k) - 1
    rank = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
    weight_top = (k - rank).clamp(0, 1)  # (M,): 1, .., 1, fraction, 0, ..
    x_top, x_rest = x[:, edge : edge + 1], x[:, whole : whole + 1]
    sides = torch.stack(
        [weight_top * (x_top - x).clamp(max=0).exp(), (1 - weight_top) * (x - x_rest).clamp(max=0).exp()], -1
    )  # (B, M, 2)
    sum_top, sum_below = sides.sum(1).split(1, -1)  # (B, 1)
    powers = _alternating_power_sums(rest, x) * (-x_rest).exp()  # (B, terms)
    exponents = torch.arange(powers.shape[-1], device=x.device, dtype=x.dtype)
    series = torch.stack([torch.ones_like(exponents), exponents + 1], -1)  # (terms, 2): of sigmoid, of its derivative
    lowest = x_rest - math.log(k / (whole + 1 - k))  # the score after the k largest has alpha <= k / (floor(k) + 1)
    highest = x[:, :1] + math.log(n / k)  # n alpha_1 >= k

    # Exact if b lies far below the top and far above the rest; if it lies above all, the top's sum is at most k.
    beta = x_rest + (sum_below + powers[:, :1]).log()
    beta = torch.maximum(0.5 * (beta + x_top - sum_top.log()), beta - math.log(k))
    for _ in range(NEWTON_STEPS):
        beta = beta.clamp(lowest, highest)
        a = (x - beta).sigmoid()
        sums = torch.stack([a, a * a], 1) @ sides  # (B, 2, 2)
        (top, head), (top_slope, head_square) = (part.split(1, -1) for part in sums.unbind(1))
        odds = (-beta).exp().clamp(max=1 / (LOGISTIC_HEAD - 1))  # of the anchor
        tail, tail_slope = ((powers * odds**exponents) @ series).split(1, -1)
        below = sum_below - head + tail
        below_slope = sum_below - 2 * head + head_square + tail_slope
        balance = x_rest + x_top - 2 * beta + (below / top).log()
        beta = beta + balance / (below_slope / below + top_slope / top)
    return beta


def _alternating_power_sums(rest: Tensor | None, x: Tensor) -> Tensor:
    """(B, terms) float64: sum v, -sum v^2, sum v^3, ... over all but the M largest, v in units of the anchor's."""
    if rest is None:
        return x.new_zeros(x.shape[0], 1)
    sums = x.new_zeros(x.shape[0], LOGISTIC_TERMS[rest.dtype])
    for part in rest.split(PART, -1):
        power, part_sums = part.clone(), [part.sum(-1)]
        for i in range(1, sums.shape[-1]):
            part_sums.append(power.mul_(part).sum(-1) * (-1) ** i)
        sums += torch.stack(part_sums, -1)
    return sums


# ------------------------------------------------------------------------------------------------------------ autograd


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, mask: Tensor | None, k: float, tau: float, kernel: str) -> Tensor:
        n = scores.shape[-1]
        ctx.tau, ctx.kernel, ctx.all_kept = tau, kernel, n <= k
        if n <= k:
            return torch.ones_like(scores) if mask is None else mask.to(scores.dtype)
        z, undecided = _rows(scores, mask, k)
        found = _find_threshold(z, k, tau, kernel, mask is not None)
        if kernel == "laplace":
            half = 0.5 * found.top.abs().neg().exp()
            top, slope = torch.where(found.top > 0, 1 - half, half), half
        else:
            top = found.top.sigmoid()
            slope = top * found.top.neg().sigmoid()
        if found.rest is None:
            alpha, rest_slope = torch.empty_like(z), 0.0
        elif kernel == "laplace":
            alpha = found.rest.mul_((0.5 * (-found.beta).exp()).to(z.dtype))
            rest_slope = alpha.sum(-1, keepdim=True)
        else:
            alpha = found.rest.mul_((-found.beta).exp().to(z.dtype))
            for part in alpha.split(PART, -1):
                part.div_(part + 1)
            rest_slope = alpha.sum(-1, keepdim=True) - torch.linalg.vector_norm(alpha, dim=-1, keepdim=True) ** 2
        total_slope = slope.sum(-1, keepdim=True) + rest_slope  # (B, 1) float64
        alpha.scatter_(-1, found.indices, top.to(z.dtype))
        if undecided is not None and mask is not None:
            alpha = torch.where(undecided, alpha, mask.reshape(alpha.shape).to(z.dtype))
        alpha = alpha.view(scores.shape)
        ctx.save_for_backward(alpha, found.indices, slope, total_slope, undecided)
        return alpha

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.all_kept:
            return torch.zeros_like(grad), None, None, None, None
        alpha, indices, slope, total_slope, undecided = ctx.saved_tensors
        alpha = alpha.reshape(-1, alpha.shape[-1])
        g = grad.reshape(alpha.shape)
        # Counted from the g of the token nearest the threshold: where that one holds nearly all of the slope, g - mean
        # would be a difference of equal numbers.
        g = g - g.gather(-1, indices.gather(-1, slope.argmax(-1, keepdim=True)))
        # The M largest apart, by the slope formed from their logits: alpha (1 - alpha) is 0 where alpha rounds to 1.
        g_top = g.gather(-1, indices)
        g.scatter_(-1, indices, 0.0).mul_(alpha)
        rest_sum = g.sum(-1, keepdim=True)
        if ctx.kernel == "logistic":
            for g_part, alpha_part in zip(g.split(PART, -1), alpha.split(PART, -1), strict=True):
                rest_sum = rest_sum - (g_part * alpha_part).sum(-1, keepdim=True)
        mean = ((slope * g_top).sum(-1, keepdim=True) + rest_sum) / total_slope.clamp(min=torch.finfo(slope.dtype).tiny)
        g.addcmul_(alpha, -mean.to(g.dtype))
        if ctx.kernel == "logistic":
            g.addcmul_(g, alpha, value=-1)
        g.scatter_(-1, indices, (slope * (g_top - mean)).to(g.dtype)).mul_(1 / ctx.tau)
        if undecided is not None:
            g.masked_fill_(~undecided, 0.0)
        return g.view(grad.shape), None, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, scores: Tensor, noise: Tensor, mask: Tensor | None, k: float, tau: float, kernel: str
    ) -> Tensor:
        n = scores.shape[-1]
        ctx.tau, ctx.kernel = tau, kernel
        if n <= k:
            logits, undecided = torch.full_like(scores, math.inf), None
        else:
            z, undecided = _rows(scores, mask, k)
            found = _find_threshold(z, k, tau, kernel, mask is not None)
            b = found.anchor + tau * found.beta  # float64, split so that a float32 difference z - b keeps its digits
            coarse = b.to(z.dtype)
            logits = z.sub(coarse).sub_((b - coarse).to(z.dtype)).div_(tau)
            if undecided is not None:
                logits = torch.where(undecided, logits, math.inf)
            logits = logits.view(scores.shape)
        keep, noise_share = _gate_coefficients(logits, kernel)
        if mask is not None:
            keep, noise_share = keep * mask, noise_share * mask
        out = noise * noise_share.unsqueeze(-1)
        out = out.addcmul_(x.to(out.dtype), keep.unsqueeze(-1)).to(x.dtype)
        if mask is not None:
            out = out.masked_fill_(~mask.unsqueeze(-1), 0.0)  # also where x is NaN in the padding
        ctx.save_for_backward(x, noise, logits, keep, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, noise, logits, keep, mask = ctx.saved_tensors
        grad_x = grad_scores = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * keep.unsqueeze(-1)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_scores = _gate_logit_gradient(logits, _row_dot(grad, x), _row_dot(grad, noise), ctx.kernel)
            if mask is not None:
                grad_scores = grad_scores.masked_fill(~mask, 0.0)
            weight = _threshold_weights(logits, ctx.kernel)
            grad_scores = _less_share_of_sum(grad_scores, weight) / ctx.tau
        return grad_x, grad_scores, None, None, None, None, None


def _gate_coefficients(u: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """sqrt(F(u)) and sqrt(1 - F(u))."""
    if kernel == "logistic":
        return (0.5 * nn.functional.logsigmoid(u)).exp(), (0.5 * nn.functional.logsigmoid(-u)).exp()
    small = (-0.5 * u.abs()).exp() * math.sqrt(0.5)
    large = (1 - small * small).sqrt()
    return torch.where(u > 0, large, small), torch.where(u > 0, small, large)


def _gate_logit_gradient(u: Tensor, along_x: Tensor, along_noise: Tensor, kernel: str) -> Tensor:
    """dL/du from <dL/dx~, x> and <dL/dx~, noise>, u taken as independent of the other tokens'."""
    keep, noise_share = _gate_coefficients(u, kernel)
    if kernel == "logistic":
        return 0.5 * keep * noise_share * (noise_share * along_x - keep * along_noise)
    small, large = torch.minimum(keep, noise_share), torch.maximum(keep, noise_share)
    ratio = small / large
    return 0.5 * small * torch.where(u > 0, ratio * along_x - along_noise, along_x - ratio * along_noise)


def _less_share_of_sum(values: Tensor, weight: Tensor) -> Tensor:
    """values - weight * sum(values), weights summing to 1; no cancellation where one token holds nearly all of them."""
    heaviest = weight.argmax(-1, keepdim=True)
    own, share = values.gather(-1, heaviest), weight.gather(-1, heaviest)
    others = values.scatter(-1, heaviest, 0.0).sum(-1, keepdim=True)
    others_share = weight.scatter(-1, heaviest, 0.0).sum(-1, keepdim=True)
    return (values - weight * (own + others)).scatter_(-1, heaviest, own * others_share - share * others)


def _threshold_weights(u: Tensor, kernel: str) -> Tensor:
    """db/dz_i: F'(u_i) over its sum, a softmax of log F', which never underflows in all tokens. 0 for infinite u."""
    log_slope = -u.abs() if kernel == "laplace" else nn.functional.logsigmoid(u) + nn.functional.logsigmoid(-u)
    peak = log_slope.amax(-1, keepdim=True).clamp(min=torch.finfo(u.dtype).min)
    weight = (log_slope - peak).exp()
    return weight / weight.sum(-1, keepdim=True).clamp(min=1.0)  # the largest is 1 unless all are 0


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product over the last axis, (..., N, D) -> (..., N); float32 at least, in parts of bounded size."""
    at_once = max(1, ROW_DOT_PART // a.shape[-1])
    parts = zip(a.flatten(0, -2).split(at_once), b.flatten(0, -2).split(at_once), strict=True)
    return torch.cat([(_full_precision(u) * _full_precision(v)).sum(-1) for u, v in parts]).view(a.shape[:-1])


def _rows(scores: Tensor, mask: Tensor | None, k: float) -> tuple[Tensor, Tensor | None]:
    """(B, N) scores, -inf where masked, and (B, 1) whether a row has more than k valid tokens; None if all have."""
    z = scores.reshape(-1, scores.shape[-1])
    if mask is None:
        return z, None
    mask = mask.reshape(z.shape)
    return z.masked_fill(~mask, -math.inf), mask.sum(-1, keepdim=True) > k


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check(scores: Tensor, k: float, tau: float, mask: Tensor | None, kernel: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; choose one of {', '.join(KERNELS)}.")
    if not k > 0:
        raise ValueError(f"k is {k}; the number of tokens to keep must be above 0.")
    if not tau > 0:
        raise ValueError(f"tau is {tau}; the temperature must be above 0. For the limit tau -> 0 use hard_topk.")
    if mask is not None and (mask.shape != scores.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; it must be bool of the scores' shape {tuple(scores.shape)}, "
            "True for a real patch."
        )
