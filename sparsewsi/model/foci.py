"""Which of the kept patches belong together: a focus is a group of patches that look alike, the more so if they touch.

What an answer rests on is measured by leaving out a whole focus (SparseWSI.leave_one_out): of many patches that show
the same, no single one is missed. Nothing here loads a model. N patches, K kept, D feature dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

# Mean distance within a focus, 1 - cosine about the kept patches' mean. Chosen on mosaics of the validation split:
# train/studies/evidence_check.py tells how often two patches of a focus are of one tissue, and the other way round.
ALIKE = 0.8
TOUCH = 0.5  # what the distance of two patches that touch is multiplied by
APART = 1e3  # distance of two patches of different slides: more than any mean within a focus can be


@dataclass(frozen=True)
class Focus:
    """Two kept patches or more that belong together. name: A, B, C ...; places: in Selection.indices, ascending."""

    name: str
    places: tuple[int, ...]


def find_foci(
    coords: Tensor,
    features: Tensor,
    patch_size: int | Tensor,
    ranks: Sequence[int],
    slides: Tensor | None = None,
) -> list[Focus]:
    """The foci of the kept patches, that of the best score first; a patch on its own is in none.

    coords (K, 2) level-0 px; features (K, D); ranks (K,): all of the kept patches
    patch_size: of all, or (K,) of each; slides: (K,) number of each one's slide: a focus lies on one slide
    """
    if len(coords) < 2:
        return []
    directions = F.normalize(features.float() - features.float().mean(0), dim=1)
    apart = (1 - directions @ directions.T).clamp_min(0)  # (K, K)
    touching = (coords[:, None] - coords[None]).abs().amax(-1) <= 1.05 * patch_size
    apart = torch.where(touching, TOUCH * apart, apart)
    if slides is not None:
        apart[slides[:, None] != slides] = APART
    distances = apart.double().numpy()
    np.fill_diagonal(distances, 0)
    groups = fcluster(linkage(squareform(distances, checks=False), "average"), ALIKE, "distance")
    members = [tuple(map(int, np.flatnonzero(groups == group))) for group in np.unique(groups)]
    found = sorted((m for m in members if len(m) > 1), key=lambda places: min(ranks[place] for place in places))
    return [Focus(name_focus(number), places) for number, places in enumerate(found)]


def name_focus(number: int) -> str:
    """A for 0, Z for 25, A2 for 26."""
    return ascii_uppercase[number % 26] + (str(number // 26 + 1) if number >= 26 else "")
