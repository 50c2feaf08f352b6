"""Features by encoders that have not seen a slide: who is left out, and how features are brought into line."""

import csv
from pathlib import Path

import torch

from train.unseen import deal_cases, fit_map


def test_every_case_is_left_out_of_one_half_and_malignant_ones_of_both(tmp_path: Path) -> None:
    with (tmp_path / "slides.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["slide", "case", "role", "malignant"])
        writer.writeheader()
        for number in range(14):
            case = f"case {number // 2}"  # two slides each
            writer.writerow(
                {"slide": f"s{number}", "case": case, "role": "train", "malignant": "yes" if number < 8 else "no"}
            )
    halves = deal_cases(tmp_path, 0)
    assert len(halves) == 7
    malignant = [halves[f"case {number}"] for number in range(4)]
    assert sorted(malignant) == [0, 0, 1, 1]
    assert deal_cases(tmp_path, 0) == halves


def test_the_map_turns_one_encoders_features_into_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    turn, shift = torch.randn(6, 5, generator=generator), torch.randn(5, generator=generator)
    weights, offset = fit_map(x, x @ turn + shift)
    new = torch.randn(20, 6, generator=generator)
    assert torch.allclose(new @ weights + offset, new @ turn + shift, atol=0.15)
