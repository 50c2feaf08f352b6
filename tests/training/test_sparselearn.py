"""SparseLearn against an independent float64 reference, and the properties the method rests on."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_expit, logsumexp
from torch._subclasses.fake_tensor import FakeTensorMode

from train.sparselearn import (
    KERNELS,
    Denoiser,
    SparseLearn,
    gumbel_topk,
    hardness,
    k_at,
    soft_topk,
    soft_topk_gate,
    ste_topk,
    tau_at,
    vp_noise_gate,
    zscore,
)

SIZES = (1, 2, 5, 33, 64, 1_000, 10_000, 100_000)
TAUS = (1e-3, 0.05, 0.5, 2.0)


# ------------------------------------------------------------------------------- the reference: numpy and a root finder


def log_cdf(u: np.ndarray, kernel: str) -> np.ndarray:
    if kernel == "logistic":
        return log_expit(u)
    return np.where(u <= 0, math.log(0.5) + np.minimum(u, 0), np.log1p(-0.5 * np.exp(-np.maximum(u, 0))))


def log_density(u: np.ndarray, kernel: str) -> np.ndarray:
    return log_expit(u) + log_expit(-u) if kernel == "logistic" else math.log(0.5) - np.abs(u)


def reference_logits(z: np.ndarray, k: float, tau: float, kernel: str) -> np.ndarray:
    """(z - b) / tau by brentq.

    The root sought is that of: log(what the scores below get) = log(what the k largest lack). It is the root of
    sum(alpha) = k, but stays well conditioned when all alphas are 0 or 1 to float64, where the sum is flat in b.
    """
    target = np.zeros(len(z))
    target[np.argsort(-z, kind="stable")] = np.clip(k - np.arange(len(z)), 0, 1)
    kept, dropped = target > 0, target < 1

    def balance(b: float) -> float:
        u = (z - b) / tau
        gained = logsumexp(log_cdf(u[dropped], kernel), b=1 - target[dropped])
        return gained - logsumexp(log_cdf(-u[kept], kernel), b=target[kept])

    b = brentq(balance, z.min() - 40 * tau, z.max() + 40 * tau, xtol=1e-15, maxiter=300)
    return (z - b) / tau


@functools.cache
def reference_case(n: int, name: str, k: float, tau: float, kernel: str) -> np.ndarray:
    return reference_logits(score_sets(n)[name], k, tau, kernel)


def centred_by_slope(g: np.ndarray, u: np.ndarray, kernel: str) -> np.ndarray:
    """g - sum(w g), w the normalised density at u; counted from g of the heaviest token, else this would cancel."""
    weight = log_density(u, kernel)
    g = g - g[weight.argmax()]
    weight = np.exp(weight - weight.max())
    return g - (weight * g).sum() / weight.sum()


def reference_gradient(u: np.ndarray, g: np.ndarray, tau: float, kernel: str) -> np.ndarray:
    """Of sum(g alpha) towards z, by the implicit function theorem."""
    return np.exp(log_density(u, kernel)) / tau * centred_by_slope(g, u, kernel)


def reference_gate_gradient(u: np.ndarray, along_x: np.ndarray, along_noise: np.ndarray, tau: float, kernel: str):
    """Of sum(sqrt(alpha) along_x + sqrt(1 - alpha) along_noise) towards z."""
    log_keep, log_drop, density = 0.5 * log_cdf(u, kernel), 0.5 * log_cdf(-u, kernel), log_density(u, kernel)
    to_logit = 0.5 * (np.exp(density - log_keep) * along_x - np.exp(density - log_drop) * along_noise)
    weight = np.exp(density - density.max())
    weight /= weight.sum()
    if len(u) <= 1_000:  # pair by pair, so that a token with all the weight is not a difference of equal numbers
        return (np.outer(to_logit, weight) - np.outer(weight, to_logit)).sum(1) / tau
    return (to_logit - weight * to_logit.sum()) / tau


@functools.cache
def score_sets(n: int) -> dict[str, np.ndarray]:
    """Scores that float32 holds exactly, so that one reference serves both precisions."""
    rng = np.random.default_rng(n)
    sets = {"normal": rng.normal(size=n), "ties": np.round(rng.normal(size=n) * 2) / 2, "constant": np.full(n, 0.3)}
    if n <= 64:
        sets |= {"heavy": rng.standard_t(2, size=n), "two groups": (rng.random(n) < 0.1) * 4 + 0.1 * rng.normal(size=n)}
    return {name: z.astype(np.float32).astype(np.float64) for name, z in sets.items()}


def budgets(n: int) -> list[float]:
    candidates = (0.5, 1, 3.3, 32, n - 1, 0.75 * n) if n <= 1_000 else (32, 40.7)
    return [k for k in candidates if 0 < k < n]


def relative_error(got: torch.Tensor, want: np.ndarray) -> float:
    return float(np.abs(got.double().numpy() - want).max() / max(np.abs(want).max(), 1e-30))


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def normalised(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------- against reference


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", SIZES)
def test_alpha_and_gradient_equal_the_reference(kernel, n):
    rng = np.random.default_rng(1)
    for name, z in score_sets(n).items():
        for tau in TAUS:
            for k in budgets(n):
                u = reference_case(n, name, k, tau, kernel)
                g = rng.normal(size=n).astype(np.float32).astype(np.float64)
                for dtype, alpha_error, gradient_error in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-6, 1e-5)):
                    scores = torch.tensor(z, dtype=dtype, requires_grad=True)
                    alpha = soft_topk(scores, k, tau, kernel=kernel)
                    alpha.backward(torch.tensor(g, dtype=dtype))
                    case = f"{name}, n {n}, k {k}, tau {tau}, {dtype}"
                    assert np.abs(alpha.detach().double().numpy() - np.exp(log_cdf(u, kernel))).max() < alpha_error, (
                        case
                    )
                    assert abs(alpha.detach().double().sum().item() - k) < alpha_error * k, case
                    assert relative_error(grad_of(scores), reference_gradient(u, g, tau, kernel)) < gradient_error, case


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_reference_gradient_equals_finite_differences_of_the_reference(kernel):
    z, g, k, tau, step = normalised(9).numpy(), normalised(9, 1).numpy(), 2.5, 0.4, 1e-5

    def loss(z: np.ndarray) -> float:
        return float((g * np.exp(log_cdf(reference_logits(z, k, tau, kernel), kernel))).sum())

    numeric = np.array([(loss(z + step * e) - loss(z - step * e)) / (2 * step) for e in np.eye(9)])
    exact = reference_gradient(reference_logits(z, k, tau, kernel), g, tau, kernel)
    assert np.abs(numeric - exact).max() < 1e-7
    scores = torch.tensor(z, requires_grad=True)
    soft_topk(scores, k, tau, kernel=kernel).backward(torch.tensor(g))
    assert np.abs(grad_of(scores).numpy() - numeric).max() < 1e-7


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck_of_soft_topk_and_gate(kernel):
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2, [True] * 2 + [False] * 5])
    scores = normalised(21).view(3, 7).requires_grad_()
    x, noise = normalised(42, 1).view(3, 7, 2).requires_grad_(), normalised(42, 2).view(3, 7, 2)
    for k, tau in ((1, 1.0), (2, 0.3), (3.4, 0.5)):
        assert torch.autograd.gradcheck(lambda z, k=k, tau=tau: soft_topk(z, k, tau, mask, kernel), scores)
        assert torch.autograd.gradcheck(
            lambda x, z, k=k, tau=tau: soft_topk_gate(x, zscore(z, mask), k, tau, noise, mask, kernel), (x, scores)
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", SIZES)
def test_gate_gradient_is_finite_and_right_where_the_plain_formula_is_not(kernel, n):
    x, noise, g = (normalised(n * 4, seed).view(n, 4) for seed in (1, 2, 3))
    plain_finite = plain_infinite = 0
    for name, z in score_sets(n).items():
        for tau in TAUS:
            for k in budgets(n):
                case = f"{name}, n {n}, k {k}, tau {tau}"
                u = reference_case(n, name, k, tau, kernel)
                want = reference_gate_gradient(u, (g * x).sum(1).numpy(), (g * noise).sum(1).numpy(), tau, kernel)
                for dtype, error in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
                    scores = torch.tensor(z, dtype=dtype, requires_grad=True)
                    tokens = x.to(dtype, copy=True).requires_grad_()
                    out = soft_topk_gate(tokens, scores, k, tau, noise.to(dtype), kernel=kernel)
                    out.backward(g.to(dtype))
                    assert grad_of(scores).isfinite().all(), case
                    assert grad_of(tokens).isfinite().all(), case
                    if n > 1:
                        assert relative_error(grad_of(scores), want) < error, (case, dtype)
                scores = torch.tensor(z, requires_grad=True)
                alpha = soft_topk(scores, k, tau, kernel=kernel)[:, None]
                plain = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
                plain.backward(g)
                if grad_of(scores).isfinite().all():
                    plain_finite += 1
                    assert relative_error(grad_of(scores), want) < 1e-5, case
                    assert (out.double() - plain).abs().max() < 1e-5, case
                else:
                    plain_infinite += 1
    if n >= 1_000:
        assert plain_finite > 0
        assert plain_infinite > 0


# ------------------------------------------------------------------------------------------------ masks, ties, extremes


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "valid"), [(40, 35), (40, 5), (3_000, 700), (3_000, 40), (50_000, 49_000)])
def test_padding_changes_nothing(kernel, n, valid):
    scores = normalised(n)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:valid]] = True
    g = normalised(n, 1)
    padded = scores.masked_fill(~mask, 1e4).requires_grad_()
    short = scores[mask].requires_grad_()
    alpha, want = soft_topk(padded, 3, 0.3, mask, kernel), soft_topk(short, 3, 0.3, kernel=kernel)
    alpha.backward(g)
    want.backward(g[mask])
    torch.testing.assert_close(alpha[mask], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad_of(padded)[mask], grad_of(short), rtol=1e-8, atol=1e-12)
    assert (alpha[~mask] == 0).all()
    assert (grad_of(padded)[~mask] == 0).all()
    torch.testing.assert_close(zscore(padded, mask)[mask], zscore(short))

    x, noise = normalised(n * 2, 2).view(n, 2), normalised(n * 2, 3).view(n, 2)
    x[~mask] = math.nan
    padded.grad = short.grad = None
    gated = soft_topk_gate(x, padded, 3, 0.3, noise, mask, kernel)
    want = soft_topk_gate(x[mask], short, 3, 0.3, noise[mask], kernel=kernel)
    gated.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(gated[mask], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad_of(padded)[mask], grad_of(short), rtol=1e-8, atol=1e-12)
    assert (gated[~mask] == 0).all()
    assert (grad_of(padded)[~mask] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_a_batch_do_not_meet(kernel):
    scores, mask = normalised(4 * 200, dtype=torch.float32).view(4, 200), torch.ones(4, 200, dtype=torch.bool)
    mask[1, 150:] = False
    mask[2, 3:] = False
    mask[3] = False
    together = soft_topk(scores, 4, 0.1, mask, kernel)
    for row in range(4):
        torch.testing.assert_close(together[row], soft_topk(scores[row], 4, 0.1, mask[row], kernel))
    assert soft_topk(scores.view(2, 2, 200), 4, 0.1, mask.view(2, 2, 200), kernel).equal(together.view(2, 2, 200))
    assert together[2].equal(mask[2].float())
    assert (together[3] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", [5, 5.5, 8])
def test_with_at_most_k_tokens_all_are_kept_and_nothing_is_learnt(kernel, k):
    for mask in (None, torch.ones(5, dtype=torch.bool), torch.tensor([True] * 3 + [False] * 2)):
        scores = normalised(5, dtype=torch.float32).requires_grad_()
        alpha = soft_topk(scores, k, 0.1, mask, kernel)
        assert alpha.equal(torch.ones(5) if mask is None else mask.float())
        alpha.square().sum().backward()
        assert (grad_of(scores) == 0).all()
        x = torch.randn(5, 4, requires_grad=True)
        scores.grad = None
        gated = soft_topk_gate(x, scores, k, 0.1, torch.randn(5, 4), mask, kernel)
        assert gated.equal(x if mask is None else x * mask[:, None])
        gated.square().sum().backward()
        assert (grad_of(scores) == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_share_and_order_is_kept(kernel):
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, -1.0, 0.0])
    for tau in (1e-3, 0.1, 1.0):
        alpha = soft_topk(scores, 2, tau, kernel=kernel)
        assert alpha[1] == alpha[2] == alpha[3]
        assert (alpha[scores.argsort()].diff() >= 0).all()
    assert soft_topk(scores, 2, 1e-3, kernel=kernel)[1].item() == pytest.approx(2 / 3)
    assert soft_topk(torch.full((64,), 3.0), 32, 1e-3, kernel=kernel).allclose(torch.tensor(0.5))


@pytest.mark.parametrize("kernel", KERNELS)
def test_alpha_tends_to_the_hard_mask(kernel):
    scores = normalised(1_000, dtype=torch.float32)
    hard = torch.zeros(1_000).index_fill(0, scores.topk(32).indices, 1.0)
    taus = (1, 0.1, 1e-2, 1e-3, 1e-5)
    distance = [float((soft_topk(scores, 32, tau, kernel=kernel) - hard).abs().sum()) for tau in taus]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_adding_a_constant_changes_nothing_and_the_jacobian_rows_sum_to_zero(kernel):
    scores = normalised(50)
    torch.testing.assert_close(soft_topk(scores, 7, 0.3, kernel=kernel), soft_topk(scores + 5, 7, 0.3, kernel=kernel))
    jacobian = torch.autograd.functional.jacobian(lambda z: soft_topk(z, 7, 0.3, kernel=kernel), scores)
    assert jacobian.sum(0).abs().max() < 1e-12  # the sum of alpha is k whatever the scores
    assert jacobian.sum(1).abs().max() < 1e-12
    torch.testing.assert_close(jacobian, jacobian.T)
    torch.testing.assert_close(zscore(scores), zscore(scores + 5))


def test_one_token_by_the_laplace_kernel_is_softmax_while_no_alpha_exceeds_a_half():
    scores = normalised(100, dtype=torch.float32)
    torch.testing.assert_close(soft_topk(scores, 1, 1.0), scores.softmax(0))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_million_scores(kernel):
    scores = normalised(1_000_000, dtype=torch.float32).requires_grad_()
    alpha = soft_topk(scores, 32, 0.1, kernel=kernel)
    alpha.backward(normalised(1_000_000, 1, torch.float32))
    assert alpha.double().sum().item() == pytest.approx(32, abs=1e-4)
    assert grad_of(scores).isfinite().all()
    want = scores.detach().topk(100)
    assert alpha.topk(100).indices.equal(want.indices)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arrange", ["ascending", "descending", "one block", "few values"])
def test_the_search_for_the_largest_does_not_depend_on_their_places(kernel, arrange):
    values = normalised(60_000, dtype=torch.float32)
    values = (values * 2).round() if arrange == "few values" else values.sort(descending=arrange == "descending").values
    if arrange == "one block":  # all large ones in one column of the search's blocks
        values = values.view(-1, 300).flip(1).T.reshape(-1)
    shuffled = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    alpha = soft_topk(values, 32, 0.05, kernel=kernel)
    torch.testing.assert_close(alpha[shuffled], soft_topk(values[shuffled], 32, 0.05, kernel=kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_and_alpha_stay_float32_under_autocast(kernel):
    scores, x = normalised(500, dtype=torch.float32).requires_grad_(), torch.randn(500, 8)
    with torch.autocast("cpu", torch.bfloat16):
        alpha = soft_topk(zscore(scores), 32, 0.2, kernel=kernel)
        gated = soft_topk_gate(x, zscore(scores), 32, 0.2, x, kernel=kernel)
        (alpha.square().sum() + gated.square().sum()).backward()
    assert alpha.dtype == gated.dtype == zscore(scores.bfloat16()).dtype == torch.float32
    inside, scores.grad = grad_of(scores), None
    want = soft_topk(zscore(scores), 32, 0.2, kernel=kernel)
    (want.square().sum() + soft_topk_gate(x, zscore(scores), 32, 0.2, x, kernel=kernel).square().sum()).backward()
    assert alpha.equal(want)
    torch.testing.assert_close(inside, grad_of(scores))
    half = soft_topk_gate(x.bfloat16(), scores, 32, 0.2, x.bfloat16(), kernel=kernel)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_waits_for_the_device(kernel):
    """A fake tensor has no values: each read of one on the host (item, nonzero, an if) raises."""
    with FakeTensorMode():
        scores, x = torch.randn(2, 50_000, requires_grad=True), torch.randn(2, 50_000, 4, requires_grad=True)
        for mask in (None, torch.ones(2, 50_000, dtype=torch.bool)):
            soft_topk(zscore(scores, mask), 32, 0.1, mask, kernel).sum().backward()
            SparseLearn(4, 32, heads=2, kernel=kernel)(x, scores, 0.1, mask).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"k": 0}, "k is 0"),
        ({"tau": 0.0}, "tau is 0"),
        ({"kernel": "gauss"}, "kernel"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(5)}, "mask"),
    ],
)
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        soft_topk(torch.randn(5), **({"k": 2, "tau": 0.1} | arguments))


# --------------------------------------------------------------------------------------------------------------- gating


def test_a_slide_without_patches_passes():
    stage, x = SparseLearn(16, 4), torch.zeros(0, 16, requires_grad=True)
    scores = torch.zeros(0, requires_grad=True)
    out = stage(x, scores, 0.5)
    (out.sum() + soft_topk(scores, 4, 0.5).sum()).backward()
    assert out.shape == (0, 16)


def test_the_plain_gate_keeps_variance_and_ends():
    x = torch.randn(2_000, 64, generator=torch.Generator().manual_seed(0))
    for alpha in (0.0, 0.3, 0.9):
        gated = vp_noise_gate(x, torch.full((2_000,), alpha), torch.Generator().manual_seed(1))
        assert gated.var().item() == pytest.approx(1, abs=0.02)
        assert (gated * x).mean().item() == pytest.approx(math.sqrt(alpha), abs=0.02)
    assert vp_noise_gate(x, torch.ones(2_000)).equal(x)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sparselearn_is_the_plain_path_with_the_same_noise(kernel):
    x, scores = normalised(300 * 16, dtype=torch.float32).view(300, 16), normalised(300, 1, torch.float32)
    sparselearn = SparseLearn(16, 32, heads=2, kernel=kernel)
    tokens = sparselearn(x, scores, 0.5, generator=torch.Generator().manual_seed(3))
    alpha = soft_topk(zscore(scores), 32, 0.5, kernel=kernel)
    torch.testing.assert_close(tokens, vp_noise_gate(x, alpha, torch.Generator().manual_seed(3)))
    assert tokens.equal(sparselearn(x, scores, 0.5, generator=torch.Generator().manual_seed(3)))
    assert not tokens.equal(sparselearn(x, scores, 0.5, generator=torch.Generator().manual_seed(4)))
    assert sparselearn.alpha(scores, 0.5).equal(alpha)
    assert sparselearn(x, scores, 0.5, k=300).equal(x)  # a dense warm-up is k = N
    scaled = SparseLearn(16, 32, heads=2, kernel=kernel, gate="scale", denoiser="none")
    torch.testing.assert_close(scaled(x, scores, 0.5), x * alpha[:, None])
    assert not list(scaled.parameters())


@pytest.mark.parametrize("gate", ["vp", "scale"])
@pytest.mark.parametrize("denoiser", ["local", "global", "none"])
def test_sparselearn_learns_from_any_temperature_and_leaves_padding_zero(gate, denoiser):
    x, scores = torch.randn(2, 90, 16), torch.randn(2, 90, requires_grad=True)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, 40:] = False
    sparselearn = SparseLearn(16, 8, heads=2, gate=gate, denoiser=denoiser)
    for tau in (2.0, 0.1, 1e-3):
        out = sparselearn(x, scores, tau, mask)
        assert out.shape == x.shape
        assert (out[~mask] == 0).all()
        out.square().sum().backward()
        assert all(grad_of(parameter).isfinite().all() for parameter in sparselearn.parameters())
        assert grad_of(scores).isfinite().all()
        assert (grad_of(scores)[~mask] == 0).all()


def test_wrong_parts_of_sparselearn_are_named():
    for name in ("kernel", "gate", "denoiser"):
        with pytest.raises(ValueError, match=name):
            SparseLearn(16, 8, **{name: "other"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="do not fit"):
        soft_topk_gate(torch.randn(5, 3), torch.randn(4), 2, 0.1, torch.randn(5, 3))


# ------------------------------------------------------------------------------------------------------------- denoiser


def trained_like(denoiser: Denoiser) -> Denoiser:
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return denoiser


def test_the_denoiser_starts_as_the_identity():
    x = torch.randn(2, 7, 16)
    assert Denoiser(16, 4)(x).equal(x)
    assert Denoiser(16, 4, "global")(x).equal(x)


def test_a_token_never_sees_another():
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[4, ::2] += 10  # not all of them, which LayerNorm would take back
    seen = trained_like(Denoiser(16, 4))(changed) - trained_like(Denoiser(16, 4))(x)
    assert (seen.abs().sum(1) > 0).tolist() == [i == 4 for i in range(9)]
    leaked = trained_like(Denoiser(16, 4, "global"))(changed) - trained_like(Denoiser(16, 4, "global"))(x)
    assert (leaked.abs().sum(1) > 1e-3).all()


def test_the_global_denoiser_sees_no_padding():
    denoiser, x = trained_like(Denoiser(16, 4, "global")), torch.randn(2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    out = denoiser(x, mask)
    torch.testing.assert_close(out[0], denoiser(x[0]))
    torch.testing.assert_close(out[1, :5], denoiser(x[1, :5]))


# ------------------------------------------------------------------------------------------------- schedules and rivals


def test_schedules():
    assert tau_at(0, 100, 2.0, 0.1) == 2.0
    assert tau_at(50, 100, 2.0, 0.1) == pytest.approx(1.05)
    assert tau_at(100, 100, 2.0, 0.1) == tau_at(140, 100, 2.0, 0.1) == tau_at(0, 0, 2.0, 0.1) == pytest.approx(0.1)
    assert k_at(0, 100, 768.0, 32) == 768
    assert k_at(50, 100, 512.0, 32) == pytest.approx(128)
    assert k_at(100, 100, 768.0, 32) == k_at(1, 0, 768.0, 32) == 32


def test_hardness_is_the_share_the_method_notes_state():
    for n, tau, share in (
        (256, 2.0, 0.26),
        (256, 0.1, 0.91),
        (1_000, 0.5, 0.46),
        (10_000, 0.5, 0.2),
        (10_000, 0.1, 0.83),
    ):
        scores = zscore(normalised(20 * n, dtype=torch.float32).view(20, n))
        assert hardness(soft_topk(scores, 32, tau), scores, 32).mean().item() == pytest.approx(share, abs=0.03)
    scores, mask = normalised(20).view(2, 10), torch.tensor([[True] * 10, [True] * 3 + [False] * 7])
    alpha = soft_topk(scores, 4, 1e-4, mask)
    assert hardness(alpha, scores, 4, mask).tolist() == pytest.approx([1, 1])
    assert hardness(torch.full((10,), 0.4), scores[0], 4).item() == pytest.approx(0.4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_straight_through_is_hard_forward_and_soft_backward(kernel):
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 3.0], requires_grad=True)
    g = torch.arange(5.0)
    hard = ste_topk(scores, 3, 0.5, kernel=kernel)
    assert hard.tolist() == [0, 1, 1, 0, 1]
    hard.backward(g)
    gradient, scores.grad = grad_of(scores), None
    soft_topk(scores, 3, 0.5, kernel=kernel).backward(g)
    assert gradient.equal(grad_of(scores))
    masked = ste_topk(scores, 3, 0.5, torch.tensor([True, True, False, False, False]), kernel)
    assert masked.tolist() == [1, 1, 0, 0, 0]


def test_gumbel_draws_k_tokens_and_the_likely_ones_more_often():
    scores = torch.tensor([0.0, 0.0, 2.0, 2.0, -6.0], requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    draws = gumbel_topk(scores.expand(4_000, 5), 1, 1.0, generator=generator)
    assert (draws.sum(-1) == 1).all()
    torch.testing.assert_close(draws.mean(0), scores.softmax(0), rtol=0, atol=0.03)
    draws[:, 2].sum().backward()
    assert grad_of(scores).isfinite().all()
    assert grad_of(scores)[2] > 0
