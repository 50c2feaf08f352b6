"""Whether there is a tumour, a malignant one, a carcinoma: asked where the kinds of all patches are known.

Real slides are few, and a model learns by heart which of them are malignant. The same questions in the same words,
asked of mosaics and phantoms, have an answer that no slide's look gives away.
"""

from collections.abc import Collection

import numpy as np

from train.data.example import Question
from train.data.real import YES_NO

MALIGNANT = ("carcinoma", "sarcoma", "lymphoma")
BENIGN = ("adenoma", "ganglioneuroma", "granular_cell_tumour", "oncocytoma")
UNCLEAR = {  # kinds of which it was not published, or is not agreed on
    "malignant": ("neuroendocrine_tumour",),
    "carcinoma": ("neuroendocrine_tumour",),
    "neoplasm": ("hyperplastic_polyp",),
}
SHOWING = {
    "malignant": MALIGNANT,
    "carcinoma": ("carcinoma",),
    "neoplasm": (*MALIGNANT, *BENIGN, "neuroendocrine_tumour"),
}


def tell_tumour(kinds: Collection[str], asked: str) -> str:
    """ "Yes", "No", or "" where a slide of these kinds does not tell; asked: key of SHOWING."""
    if any(kind in SHOWING[asked] for kind in kinds):
        return "Yes"
    return "" if any(kind in UNCLEAR[asked] for kind in kinds) else "No"


def ask_tumours(kinds: Collection[str], rng: np.random.Generator, every: bool = False) -> list[Question]:
    """The questions that the kinds of a slide answer, each in one wording, or in every one."""
    found = []
    for asked, texts in YES_NO.items():
        answer = tell_tumour(kinds, asked)
        if answer:
            chosen = texts if every else [texts[int(rng.integers(len(texts)))]]
            found += [Question(text, answer, ("Yes", "No"), asked) for text in chosen]
    return found
