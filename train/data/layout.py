"""Layouts of mosaics: which kind of tissue lies at each place, and which labelled patch is put there.

A mosaic is a slide put together from labelled patches: contiguous regions of background tissue, and a few compact foci
("needles") of other kinds. Which patch is which is known, so needle recall, evidence and answers can be checked.

N patches of the mosaic, M labelled patches to choose from.
"""

from collections.abc import Sequence

import numpy as np

from train.data.kinds import BACKGROUNDS, Facts

LEAST_PATCHES = 64  # of a mosaic that is asked about: in smaller ones foci can outgrow the tissue that should dominate


def lay_out(facts: Facts, n: int, per_needle: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Kinds of n patches on a near-square raster: regions of background tissue, then one compact focus per needle kind.

    The dominant kind is the commonest from LEAST_PATCHES on (in 4,000 of 4,000), and covers more than half of 225
    patches or more. per_needle: least and most patches of a focus, of 12 at most for that. Returns (n,) str in raster
    order.
    """
    side = int(np.ceil(np.sqrt(n)))
    yx = np.stack(np.divmod(np.arange(n), side), 1).astype(np.float32)  # (n, 2)
    others = [kind for kind in BACKGROUNDS[facts.origin] if kind != facts.dominant]
    width = max(24, *map(len, (*others, *facts.present, facts.dominant)))
    kinds = np.full(n, facts.dominant, dtype=f"<U{width}")
    left = int(n * rng.uniform(0.1, 0.45))  # what other background kinds may cover together
    for kind in rng.permutation(others)[: rng.integers(1, 3)]:
        cover = left // 2 if left > 4 else left
        wobble = rng.normal(0, 0.15 * side, n)  # a ragged border
        near = np.argsort(np.hypot(*(yx - rng.uniform(0, side, 2)).T) + wobble)[:cover]
        kinds[near] = kind
        left -= cover
    free = np.ones(n, bool)
    for kind in facts.present:
        size = int(rng.integers(per_needle[0], per_needle[1] + 1))
        far = np.hypot(*(yx - yx[rng.choice(np.flatnonzero(free))]).T) + np.where(free, rng.uniform(0, 1, n), 1e6)
        focus = np.argsort(far)[:size]
        kinds[focus], free[focus] = kind, False
    return kinds


def add_other_tissue(
    origin: str, kinds: np.ndarray, added: Sequence[str], size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """The layout (n,) with a ragged region of each added kind in place of background, of size[0] to size[1] patches."""
    side = int(np.ceil(np.sqrt(len(kinds))))
    yx = np.stack(np.divmod(np.arange(len(kinds)), side), 1)  # (n, 2)
    kinds = kinds.astype(f"<U{max(map(len, (*added, *map(str, np.unique(kinds)))))}")
    for kind in added:
        distance = np.hypot(*(yx - rng.uniform(0, side, 2)).T) + rng.normal(0, 0.1 * side, len(kinds))
        free = np.flatnonzero(np.isin(kinds, BACKGROUNDS[origin]))
        kinds[free[distance[free].argsort()][: rng.integers(size[0], size[1] + 1)]] = kind
    return kinds


def draw_rows(kinds: np.ndarray, held: np.ndarray, sources: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows (n,) of held (M,) for a layout (n,): each kind's from one source where that source has it.

    Raises ValueError for a kind that nothing held is of.
    """
    rows = np.empty(len(kinds), np.int64)
    for kind in np.unique(kinds):
        pool = np.flatnonzero(held == kind)
        if len(pool) == 0:
            raise ValueError(f"there is no patch of kind {str(kind)!r}; leave the kind out or add such tiles")
        source = rng.choice(np.unique(sources[pool]))
        pool = pool[sources[pool] == source]
        want = int((kinds == kind).sum())
        rows[kinds == kind] = rng.choice(pool, want, replace=want > len(pool))
    return rows


def lay_out_regions(background: Sequence[str], n: int, rng: np.random.Generator) -> np.ndarray:
    """Kinds (n,) of a near-square raster in contiguous, ragged regions of any size, one for each kind of background."""
    side = int(np.ceil(np.sqrt(n)))
    yx = np.stack(np.divmod(np.arange(n), side), 1)[:, None]  # (n, 1, 2)
    centres = rng.uniform(0, side, (len(background), 2))
    reach = rng.uniform(0.5, 2, len(background))  # so that regions differ in size
    distance = np.hypot(*np.moveaxis(yx - centres, -1, 0)) / reach + rng.normal(0, 0.06 * side, (n, len(background)))
    return np.array(background)[distance.argmin(1)]


def add_focus(
    kinds: np.ndarray, kind: str, size: int, background: Sequence[str], rng: np.random.Generator
) -> np.ndarray:
    """The layout (n,) with one compact focus of a kind in place of background."""
    side = int(np.ceil(np.sqrt(len(kinds))))
    yx = np.stack(np.divmod(np.arange(len(kinds)), side), 1)
    free = np.flatnonzero(np.isin(kinds, background))
    centre = yx[rng.choice(free)]
    near = free[(np.hypot(*(yx[free] - centre).T) + rng.uniform(0, 1, len(free))).argsort()[:size]]
    kinds = kinds.astype(f"<U{max(kinds.dtype.itemsize // 4, len(kind))}")
    kinds[near] = kind
    return kinds
