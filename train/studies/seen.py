"""How much more the features of slides tell that the patch encoder was trained on.

    python -m train.studies.seen --slides runs/slides.safetensors --unseen runs/unseen/unseen.safetensors

A logistic regression of each published fact on a training slide's mean feature, for cases that the regression was not
fitted on: once with the features of the encoder that ships, which was taught these facts of these slides, and once with
those of encoders that had not seen the slide (train/unseen.py). The last row is fitted on all training slides and asked
about the val slides, which no encoder has seen. Intervals resample cases.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.data.bank import Bank
from train.data.real import SlideFacts, load_slides, slide_rows
from train.eval.table import write_table
from train.flags import make_parser, run_command
from train.studies.real import accuracy, auc, resample

STRENGTH = 1e-3  # C of the regression; not chosen, and results with 1e-4 and 1e-2 are alike
FOLDS = 5
ASKED = ("malignant", "carcinoma", "neoplasm", "organ")


def mean_features(bank: Bank, slides: Sequence[SlideFacts]) -> np.ndarray:
    """(S, D) of the slides as they are."""
    return np.stack(
        [bank.features[torch.from_numpy(slide_rows(bank, s.slide))].float().mean(0).numpy() for s in slides]
    )


def cross_answer(x: np.ndarray, slides: Sequence[SlideFacts], kind: str) -> list[dict[str, Any]]:
    """A record per slide, answered by a regression that was fitted on other cases."""
    from sklearn.model_selection import GroupKFold

    y = np.array([slide.facts[kind] for slide in slides])
    cases = np.array([slide.case for slide in slides])
    found: list[dict[str, Any]] = []
    for known, asked in GroupKFold(FOLDS).split(x, y, cases):
        found += answer(x[known], y[known], x[asked], [slides[i] for i in asked], kind)
    return found


def answer(
    x: np.ndarray, y: np.ndarray, asked: np.ndarray, slides: Sequence[SlideFacts], kind: str
) -> list[dict[str, Any]]:
    """Records of the slides with features `asked`, by a regression of y on x."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    machine = make_pipeline(
        StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500)
    ).fit(x, y)
    options = machine.classes_.tolist()
    return [
        {"case": slide.case, "kind": kind, "options": options, "answer": slide.facts[kind], "probs": probs.tolist()}
        for slide, probs in zip(slides, machine.predict_proba(asked))
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--slides", type=Path, required=True, help="bank of python -m train.data.real bank")
    parser.add_argument("--unseen", type=Path, required=True, help="bank of python -m train.unseen")
    given = parser.parse_args()
    unseen, _ = load_slides(given.unseen, "train")
    seen, slides = load_slides(given.slides, "train")
    val, val_slides = load_slides(given.slides, "val")
    encoded = set(map(str, unseen.sources))
    slides = tuple(slide for slide in slides if slide.slide in encoded)
    lines = []
    for kind in ASKED:
        told = [slide for slide in slides if slide.facts[kind]]
        new = [slide for slide in val_slides if slide.facts[kind]]
        if kind == "organ":  # of one case alone nothing can be learned
            cases = {slide.facts[kind]: {s.case for s in told if s.facts[kind] == slide.facts[kind]} for slide in told}
            told = [slide for slide in told if len(cases[slide.facts[kind]]) > 1]
        y = np.array([slide.facts[kind] for slide in told])
        for name, records in (
            ("seen", cross_answer(mean_features(seen, told), told, kind)),
            ("not seen", cross_answer(mean_features(unseen, told), told, kind)),
            ("val", answer(mean_features(seen, told), y, mean_features(val, new), new, kind)),
        ):
            measure = accuracy if kind == "organ" else auc
            value, low, high = resample(records, measure)
            lines.append(
                [
                    kind,
                    name,
                    len(records),
                    len({r["case"] for r in records}),
                    f"{value:.2f}",
                    f"{low:.2f} to {high:.2f}",
                ]
            )
    print(write_table(["fact", "encoder's slides", "slides", "cases", "AUC (organ: right)", "95 %"], lines))


if __name__ == "__main__":
    run_command(main)
