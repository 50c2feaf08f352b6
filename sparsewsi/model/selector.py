"""Which patches to keep: the learned scorer, hard top-K, and selectors that need no training.

Shapes: ... any leading axes, N patches, D width of a token, K kept.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 8192  # patches handled at once where a whole slide in float32 would be too much
SPREAD = 0.1  # of tokens of unit variance, below which a slide's spread counts as this
DIVERSITY = 1.0  # weight of likeness where a model states none
WINDOW = 1024  # patches among which redundancy looks for likes: neighbours in raster order, later in what is left


class Block(nn.Module):
    """Pre-LN Transformer block that starts as the identity: the last layer of both branches is zero.

    attention="local":  each token attends to itself alone. Softmax over one element is 1, so what is left of attention
                        is out(value(x)): no dead query and key weights, cost O(N).
    attention="global": every token attends to all N.
    ffn: width of the feed-forward part as a multiple of dim.
    """

    def __init__(self, dim: int, heads: int, attention: str = "local", ffn: int = 4):
        super().__init__()
        assert attention in ("local", "global"), attention
        assert attention == "local" or dim % heads == 0, (dim, heads)
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.query_key = nn.Linear(dim, 2 * dim) if attention == "global" else None
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn * dim), nn.GELU(), nn.Linear(ffn * dim, dim))
        for last in (self.out, self.ffn[-1]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm1(x)))  # (..., N, D)
        return x + self.ffn(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, D), before the output projection."""
        value = self.value(x)
        if self.query_key is None:
            return value
        query, key = self.query_key(x).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(-3, -2).flatten(-2)


class Scorer(nn.Module):
    """How relevant each patch is: (..., N, D) tokens -> (..., N) raw scores in float32, under autocast too (eq. 3).

    hidden: width inside, default min(dim, 512), with a linear layer in front where it differs from dim.
    attention: "local", each patch alone (the paper's localized scorer), or "global".
    relative: beside each token its distance from the slide's mean token in standard deviations of the slide (ours), so
              that what is unusual for a slide can be told whatever its stain.
    """

    def __init__(
        self,
        dim: int,
        layers: int = 2,
        hidden: int | None = None,
        heads: int = 8,
        attention: str = "local",
        relative: bool = False,
    ):
        super().__init__()
        hidden = hidden or min(dim, 512)
        if attention not in ("local", "global"):
            raise ValueError(f"attention is {attention!r}; choose local or global.")
        if attention == "global" and hidden % heads:
            raise ValueError(f"the width must be a multiple of heads, got width {hidden} and {heads} heads.")
        self.attention, self.relative = attention, relative
        width = 2 * dim if relative else dim
        self.inlet = nn.Identity() if hidden == width else nn.Linear(width, hidden)
        self.blocks = nn.Sequential(*(Block(hidden, heads, attention) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, slide: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """slide: mean and spread (..., 1, D) of all tokens of the slide where x holds only some, see describe_slide."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 scores swap one of 32 patches at N = 100,000
            x = x.float()
            if self.relative:
                mean, spread = slide or describe_slide([x])
                x = torch.cat([x, (x - mean) / spread], dim=-1)
            return self.head(self.norm(self.blocks(self.inlet(x)))).squeeze(-1)


def describe_slide(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and spread, (..., 1, D) float32, of a slide's tokens given in parts (..., n, D)."""
    n, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        n += part.shape[-2]
        total = total + part.double().sum(-2, keepdim=True)
        squares = squares + part.double().square().sum(-2, keepdim=True)
    mean = total / max(1, n)
    variance = (squares / max(1, n) - mean.square()).clamp(min=0)
    return mean.float(), (variance + SPREAD**2).sqrt().float()


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, ascending (= raster order), (min(k, N),) int64 on the scores' device.

    scores: (N,). Of equal scores the lower index is kept. Raises ValueError for NaN, k < 1, more than one axis.
    """
    _check_scores(scores, k)
    return pick_highest(scores, k)


def _check_scores(scores: Tensor, k: int) -> None:
    if scores.ndim != 1:
        raise ValueError(f"scores must have one axis (N,), got {tuple(scores.shape)}.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if torch.isnan(scores).any():
        raise ValueError(f"{int(torch.isnan(scores).sum())} of {len(scores)} scores are NaN. Check the features.")


def pick_highest(scores: Tensor, k: int) -> Tensor:
    """hard_topk of scores that nobody has looked at: training must not wait for a GPU to tell whether one is NaN."""
    # torch.topk promises nothing about ties; a stable sort does.
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def mmr(scores: Tensor, features: Tensor, k: int, weight: float) -> Tensor:
    """k patches by maximal marginal relevance: high scores, but no two alike (ours; the paper keeps the top K).

    One after another: the patch with the highest z-scored score less `weight` times its largest cosine to what is kept
    (Carbonell and Goldstein, SIGIR 1998), of features (N, D) less their mean over the slide. weight 0 is hard_topk.
    Cost O(N K D). Returns (min(k, N),) ascending; ties go to the lower index.
    """
    _check_scores(scores, k)
    return pick_diverse(scores, features, k, weight)


def pick_diverse(scores: Tensor, features: Tensor, k: int, weight: float) -> Tensor:
    """mmr of scores that nobody has looked at, on the device of scores and features; see pick_highest."""
    if weight == 0 or k >= len(scores):
        return pick_highest(scores, k)
    z = (scores.double() - scores.double().mean()) / scores.double().std().clamp(min=1e-9)
    mean, _ = describe_slide(features.split(ROWS))  # (1, D)
    closest = torch.full_like(z, -1.0)  # largest cosine to a kept patch
    place = torch.arange(len(z), device=z.device)
    kept: list[Tensor] = []
    for _ in range(k):
        value = z - weight * closest
        if kept:
            value.index_fill_(0, torch.cat(kept), -torch.inf)
        # Of equal ones the first, which argmax does not promise.
        kept.append(torch.where(value == value.max(), place, len(z) - 1).amin(0, keepdim=True))
        centre = F.normalize(features.index_select(0, kept[-1])[0].float() - mean[0], dim=0)
        cosine = [F.normalize(part.float() - mean, dim=1) @ centre for part in features.split(ROWS)]
        closest = torch.maximum(closest, torch.cat(cosine).double())
    return torch.cat(kept).sort().values


def random(features: Tensor, coords: Tensor, k: int, seed: int = 0) -> Tensor:
    """k patches drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(features), generator=generator)[:k].sort().values


def uniform(features: Tensor, coords: Tensor, k: int, seed: int = 0) -> Tensor:
    """k patches spread evenly over the tissue: horizontal bands of equal patch count, equal steps along x in each.

    The seed changes nothing.
    """
    n = len(features)
    if k >= n:
        return torch.arange(n)
    coords = coords.long()
    width, height = (coords.amax(0) - coords.amin(0)).clamp(min=1).tolist()
    bands = max(1, min(k, round((k * height / width) ** 0.5)))  # so that the grid's cells are about square
    by_row = coords[:, 1].sort(stable=True).indices
    shares = [k * number // bands for number in range(bands + 1)]  # how many are kept above the band's lower edge
    kept = []
    for above, below in itertools.pairwise(shares):
        band = by_row[n * above // k : n * below // k]
        band = band[coords[band, 0].sort(stable=True).indices]
        places = (torch.arange(below - above, dtype=torch.float64) + 0.5) * len(band) / (below - above)
        kept.append(band[places.long()])
    return torch.cat(kept).sort().values


def evenly(n: int, k: int) -> Tensor:
    """k of n patches evenly spaced in their order, first and last among them (as SlideChat)."""
    return torch.arange(n) if k >= n else torch.linspace(0, n - 1, k, dtype=torch.float64).long()


def norm(features: Tensor, coords: Tensor, k: int, seed: int = 0) -> Tensor:
    """The k patches whose features are longest. The seed changes nothing."""
    return hard_topk(torch.cat([part.float().norm(dim=-1) for part in features.split(ROWS)]), k)


def farthest(features: Tensor, coords: Tensor, k: int, seed: int = 0) -> Tensor:
    """Farthest point sampling in feature space, from a patch drawn with the seed; cost O(N K)."""
    n = len(features)
    if k >= n:
        return torch.arange(n)
    chosen = int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(seed)))
    nearest = torch.full((n,), torch.inf)  # squared distance to the nearest patch chosen so far
    kept = []
    for _ in range(k):
        kept.append(chosen)
        centre = features[chosen].float()
        distance = torch.cat([(part.float() - centre).square().sum(-1) for part in features.split(ROWS)])
        nearest = torch.minimum(nearest, distance)
        nearest[kept] = -1.0  # so that duplicates of a chosen patch come before the patch itself
        chosen = int(nearest.argmax())
    return torch.tensor(kept).sort().values


def kmeans(features: Tensor, coords: Tensor, k: int, seed: int = 0) -> Tensor:
    """The patch nearest to the centre of each of k clusters in feature space.

    Of a larger slide the centres are found on ROWS patches drawn with the seed; every patch may be kept.
    """
    n = len(features)
    if k >= n:
        return torch.arange(n)
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    part = random(features, coords, max(ROWS, k), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different patches than clusters
        found = KMeans(k, random_state=seed).fit(features[part].float().numpy()).cluster_centers_
    centres = torch.from_numpy(found).float()
    distance = torch.cat([torch.cdist(part.float(), centres) for part in features.split(ROWS)])  # (N, k)
    kept = []
    for column in distance.T:
        column[kept] = torch.inf  # two centres may lie nearest to the same patch
        kept.append(int(column.argmin()))
    return torch.tensor(kept).sort().values


def redundancy(features: Tensor, coords: Tensor, k: int, seed: int = 0) -> Tensor:
    """Merge the most alike patches until k are left and keep one patch of each group. The seed changes nothing.

    As in token merging (Bolya et al., ICLR 2023): for every second token the likest of the others is found by the
    cosine of their means, and the likest pairs are merged, a quarter of the tokens a round. Tokens are compared within
    windows of WINDOW, so that the cost is O(N WINDOW D) and the memory that of the features.
    """
    index, size = torch.arange(len(features)), torch.ones(len(features))
    means = features
    while len(index) > k:
        even = torch.arange(0, len(index) - len(index) % 2, 2)
        best = [_likest(part) for part in means[: 2 * len(even)].split(WINDOW)]
        likeness = torch.cat([found for found, _ in best])  # (A,) of each even token
        partner = torch.cat([2 * place + 1 + number * WINDOW for number, (_, place) in enumerate(best)])
        # Half of the even tokens stay: were all of them merged, so would be those that nothing resembles.
        most = min(len(index) - k, -(-len(even) // 2))
        merged = likeness.sort(descending=True, stable=True).indices[:most]
        gone, into = even[merged], partner[merged]
        total = size.index_add(0, into, size[gone])
        means = means.clone()
        for start in range(0, len(index), ROWS):  # merged in parts, as float32 takes twice the features' memory
            rows = slice(start, start + ROWS)
            here = (into >= start) & (into < start + ROWS)
            sums = means[rows].float() * size[rows, None]
            sums.index_add_(0, into[here] - start, means[gone[here]].float() * size[gone[here], None])
            means[rows] = (sums / total[rows, None]).to(means.dtype)
        left = torch.ones(len(index), dtype=torch.bool)
        left[gone] = False
        index, size, means = index[left], total[left], means[left]
    return index


def _likest(window: Tensor) -> tuple[Tensor, Tensor]:
    """For each even token of a window (W, D), the highest cosine with an odd one, and that one's number among these."""
    unit = F.normalize(window.float(), dim=-1)
    found = (unit[0::2] @ unit[1::2].T).max(1)
    return found.values, found.indices


def weigh_by_question(scores: Tensor, likeness: Tensor) -> Tensor:
    """Values (N,) float64 of patches for a question (ours; the idea is HistoSelect's, CVPR 2026): score times likeness.

    scores: (N,) the model's. likeness: (N,) of each patch and the words of the question. Both are z-scored and put into
    (0, 1) by a sigmoid before they are multiplied, so that a patch has to be high in both. Nothing is trained.
    """
    both = torch.stack([scores.double(), likeness.double()])
    z = (both - both.mean(1, keepdim=True)) / both.std(1, keepdim=True, correction=0).clamp(min=1e-9)
    return z.sigmoid().prod(0)


QUESTION = "question"  # the selector that also takes the question, see SparseWSI.select
LEARNED = ("learned", "topk", "mmr")  # selectors that take the model's scores, see SparseWSI.select
# name -> f(features (N, D) or tokens, coords (N, 2), k, seed) -> (min(k, N),) ascending indices
SELECTORS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "random": random,
    "uniform": uniform,
    "norm": norm,
    "farthest": farthest,
    "kmeans": kmeans,
    "redundancy": redundancy,
}


def check_selector(name: str) -> None:
    """Raise ValueError unless the name is one of LEARNED or a key of SELECTORS."""
    if name not in LEARNED and name not in SELECTORS:
        raise ValueError(f"the selector is {name!r}; choose one of {', '.join((*LEARNED, *SELECTORS))}.")


def select_learned(name: str, scores: Tensor, features: Tensor, k: int, diversity: float) -> Tensor:
    """The k patches that one of LEARNED keeps, given the model's scores (N,) and its diversity (see SparseWSIConfig).

    "learned": the model's own way; "topk": the highest scores, as the paper has it; "mmr": high ones, no two alike.
    """
    weights = {"learned": diversity, "topk": 0.0, "mmr": diversity or DIVERSITY}
    return mmr(scores, features, k, weights[name])
