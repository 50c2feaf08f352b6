"""Hard top-K, the scorer, and the selectors that need no training."""

from typing import Any

import pytest
import torch

from sparsewsi.model.selector import SELECTORS, Block, Scorer, describe_slide, hard_topk, mmr, weigh_by_question


def bag_like(n: int, dim: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = max(1, round(n**0.5))
    place = torch.arange(n)
    coords = torch.stack([place % side, place // side], 1).int() * 224
    return torch.randn(n, dim, generator=generator).half(), coords


def trained(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with every weight drawn anew, so that nothing is zero or the identity by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


# ---- hard top-K


def test_the_largest_scores_are_kept_in_raster_order() -> None:
    scores = torch.tensor([0.1, 5.0, -1.0, 3.0, 4.0])
    assert hard_topk(scores, 3).tolist() == [1, 3, 4]


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 50_000])
def test_of_equal_scores_the_lower_index_is_kept(n: int) -> None:
    scores = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(n)).float()
    expected = sorted(sorted(range(n), key=lambda i: (-scores[i].item(), i))[:32])
    assert hard_topk(scores, 32).tolist() == expected


def test_k_beyond_n_keeps_all_and_no_patch_keeps_none() -> None:
    assert hard_topk(torch.tensor([2.0, 1.0]), 32).tolist() == [0, 1]
    assert hard_topk(torch.empty(0), 32).tolist() == []


def test_infinite_scores_are_ordered() -> None:
    assert hard_topk(torch.tensor([0.0, -torch.inf, torch.inf, 1.0]), 2).tolist() == [2, 3]


def test_scores_that_cannot_be_ordered_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        hard_topk(torch.tensor([1.0, torch.nan, 2.0]), 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        hard_topk(torch.ones(3), 0)
    with pytest.raises(ValueError, match="one axis"):
        hard_topk(torch.ones(3, 2), 1)


# ---- block and scorer


@pytest.mark.parametrize("attention", ["local", "global"])
def test_a_new_block_is_the_identity_and_can_learn(attention: str) -> None:
    block, x = Block(16, 4, attention), torch.randn(2, 5, 16)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.out.weight.grad is not None
    assert block.out.weight.grad.abs().sum() > 0


def test_locally_no_token_sees_another_globally_all_do() -> None:
    x = torch.randn(6, 16)
    changed = x.clone()
    changed[2] += torch.randn(16)
    others = [0, 1, 3, 4, 5]
    local, everywhere = trained(Block(16, 4)), trained(Block(16, 4, "global"))
    assert torch.equal(local(x)[others], local(changed)[others])
    assert not torch.allclose(local(x)[2], local(changed)[2])
    assert ((everywhere(x) - everywhere(changed)).abs().amax(-1) > 1e-6).all()


def test_local_attention_is_global_attention_over_one_token() -> None:
    everywhere, local = trained(Block(16, 4, "global")), Block(16, 4)
    local.load_state_dict({n: v for n, v in everywhere.state_dict().items() if not n.startswith("query_key")})
    x = torch.randn(7, 16)
    assert torch.allclose(local(x), everywhere(x[:, None])[:, 0], atol=1e-6)


def test_global_attention_is_softmax_attention() -> None:
    block: Any = trained(Block(16, 4, "global")).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    query, key = block.query_key(x).chunk(2, -1)
    value = block.value(x)
    heads = [slice(4 * h, 4 * h + 4) for h in range(4)]
    plain = [torch.softmax(query[:, h] @ key[:, h].T / 2.0, -1) @ value[:, h] for h in heads]
    assert torch.allclose(block.attend(x), torch.cat(plain, -1))


def test_scorers_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        Scorer(16, heads=5, attention="global")
    assert Block(12, 8)(torch.zeros(3, 12)).shape == (3, 12), "a token that sees itself alone has no heads"
    with pytest.raises(ValueError, match="local or global"):
        Scorer(16, attention="sparse")


@pytest.mark.parametrize("attention", ["local", "global"])
def test_scores_have_one_value_a_patch_in_float32_under_autocast_too(attention: str) -> None:
    scorer, x = trained(Scorer(32, hidden=16, heads=4, attention=attention)), torch.randn(2, 3, 9, 32)
    plain = scorer(x)
    assert plain.shape == (2, 3, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer(x), plain)
    assert plain.dtype == torch.float32


def test_a_local_score_depends_on_its_patch_alone() -> None:
    scorer, x = trained(Scorer(16, heads=4)), torch.randn(50, 16)
    order = torch.randperm(50)
    assert torch.allclose(scorer(x)[order], scorer(x[order]), atol=1e-6)
    assert torch.allclose(scorer(x)[7], scorer(x[7:8])[0], atol=1e-6)


# ---- selectors without training


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("n", [1, 20, 32, 33, 40, 63, 500])
def test_selectors_keep_k_different_patches_in_raster_order_and_repeat(name: str, n: int) -> None:
    features, coords = bag_like(n)
    kept = SELECTORS[name](features, coords, 32, 3)
    assert kept.dtype == torch.int64
    assert len(kept) == min(32, n)
    assert (kept.diff() > 0).all()
    assert 0 <= kept[0] <= kept[-1] < n
    assert torch.equal(kept, SELECTORS[name](features, coords, 32, 3))


@pytest.mark.parametrize("name", ["random", "farthest", "kmeans"])
def test_the_seed_matters_where_something_is_drawn(name: str) -> None:
    features, coords = bag_like(500)
    assert not torch.equal(SELECTORS[name](features, coords, 32, 0), SELECTORS[name](features, coords, 32, 1))


@pytest.mark.parametrize("name", SELECTORS)
def test_a_large_slide_needs_no_n_by_n_matrix(name: str) -> None:
    features, coords = bag_like(60_000)  # the matrix would take 14 GB
    assert len(SELECTORS[name](features, coords, 32, 0)) == 32


def test_uniform_covers_the_tissue_evenly() -> None:
    features, coords = bag_like(1600)  # 40 x 40
    kept = coords[SELECTORS["uniform"](features, coords, 64, 0)].float() / 224
    cells = (kept / 10).long()  # 4 x 4 cells of 10 x 10 patches
    counts = torch.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert counts.min() >= 2
    assert counts.max() <= 6


def test_uniform_needs_no_positions() -> None:
    features, _ = bag_like(100)
    assert len(SELECTORS["uniform"](features, torch.zeros(100, 2, dtype=torch.int32), 10, 0).unique()) == 10


def test_norm_keeps_the_longest_features() -> None:
    features = torch.arange(10)[:, None] * torch.ones(10, 4)
    assert SELECTORS["norm"](features.half(), torch.zeros(10, 2), 3, 0).tolist() == [7, 8, 9]


def test_farthest_finds_every_cluster() -> None:
    centres = torch.eye(16) * 50
    features = (centres.repeat(1, 20).reshape(-1, 16) + torch.randn(320, 16) * 0.1).half()
    kept = SELECTORS["farthest"](features, torch.zeros(320, 2), 16, 0)
    assert sorted((kept // 20).tolist()) == list(range(16))


def test_farthest_copes_with_patches_that_are_all_alike() -> None:
    assert len(SELECTORS["farthest"](torch.ones(100, 4).half(), torch.zeros(100, 2), 32, 0).unique()) == 32


def test_kmeans_keeps_a_patch_of_every_cluster_and_the_one_in_its_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(20, 16, generator=generator)
    offsets[7] = offsets[torch.arange(20) != 7].mean(0)
    features = (torch.eye(16)[:, None] * 60 + offsets).reshape(-1, 16).half()
    kept = SELECTORS["kmeans"](features, torch.zeros(320, 2), 16, 0)
    assert kept.tolist() == [20 * cluster + 7 for cluster in range(16)]


@pytest.mark.parametrize("name", ["kmeans", "redundancy"])
def test_patches_that_are_all_alike_are_still_k_different_ones(name: str) -> None:
    assert len(SELECTORS[name](torch.ones(100, 4).half(), torch.zeros(100, 2), 32, 0).unique()) == 32


def test_redundancy_keeps_what_is_rare() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.nn.functional.one_hot(torch.arange(3000) // 1000, 40) * 10.0
    features = common + torch.randn(3000, 40, generator=generator) * 0.05
    rare = torch.tensor([11, 1500, 1501, 2222, 2999])
    features[rare] = torch.eye(40)[10:15] * 10
    kept = SELECTORS["redundancy"](features.half(), torch.zeros(3000, 2), 16, 0)
    assert set(rare.tolist()) <= set(kept.tolist())
    assert sorted({int(i) // 1000 for i in set(kept.tolist()) - set(rare.tolist())}) == [0, 1, 2]


def test_redundancy_is_plain_bipartite_merging_where_one_window_holds_all() -> None:
    features, coords = bag_like(40)
    tokens: list[Any] = [(i, 1, features[i].double()) for i in range(40)]
    while len(tokens) > 7:
        even, odd = tokens[0::2][: len(tokens) // 2], tokens[1::2]
        cosine = torch.stack([torch.stack([torch.cosine_similarity(a[2], b[2], dim=0) for b in odd]) for a in even])
        merged = cosine.amax(1).argsort(descending=True)[: min(len(tokens) - 7, -(-len(even) // 2))].tolist()
        groups = {b[0]: [b] for b in odd}
        for a in merged:
            groups[odd[int(cosine[a].argmax())][0]].append(even[a])
        gone = {even[a][0] for a in merged}
        weights = {i: sum(part[1] for part in parts) for i, parts in groups.items()}
        means = {i: sum(part[1] * part[2] for part in parts) / weights[i] for i, parts in groups.items()}
        tokens = [(t[0], weights.get(t[0], t[1]), means.get(t[0], t[2])) for t in tokens if t[0] not in gone]
    assert SELECTORS["redundancy"](features.double(), coords, 7, 0).tolist() == [t[0] for t in tokens]


# ---- ours: relevance without repetition, and scores against the slide


def test_mmr_is_the_top_k_where_likeness_does_not_count() -> None:
    features, _ = bag_like(300)
    scores = torch.randn(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mmr(scores, features, 32, 0.0), hard_topk(scores, 32))
    assert mmr(scores, features, 400, 2.0).tolist() == list(range(300))


def test_mmr_keeps_one_of_what_is_alike_before_a_second() -> None:
    features = torch.eye(6).repeat_interleave(10, 0)
    scores = torch.arange(6.0).repeat_interleave(10)
    kept = mmr(scores, features, 6, 5.0)
    assert sorted((kept // 10).tolist()) == list(range(6))
    assert set((hard_topk(scores, 6) // 10).tolist()) == {5}


def test_a_relative_scorer_scores_a_slide_in_parts_as_in_one() -> None:
    scorer = trained(Scorer(8, relative=True))
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    whole = scorer(x)
    slide = describe_slide(x.split(20))
    parts = torch.cat([scorer(part, slide) for part in x.split(20)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole[:20], scorer(x[:20]), atol=1e-3)


def test_a_patch_is_kept_for_a_question_only_if_score_and_likeness_are_high():
    scores = torch.tensor([3.0, 3.0, -3.0, -3.0, 0.0])
    likeness = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.5])
    values = weigh_by_question(scores, likeness)
    assert values.argmax() == 0
    assert values.argmin() == 3
    assert torch.equal(weigh_by_question(scores, torch.zeros(5)).argsort(stable=True), scores.argsort(stable=True))
    assert torch.allclose(weigh_by_question(7 * scores + 2, likeness / 9), values)
