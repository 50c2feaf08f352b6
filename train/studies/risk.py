"""How often a model is right when it answers only where it is surest: risk against coverage, as a picture.

    python -m train.studies.risk train/studies/answers/pooled/answers.jsonl --model assets/demo-model \\
        --out docs/risk-coverage.png

The answers are those that python -m train.studies.pooled wrote (row "learned", all wordings); all cases count alike. A
dot is where the model's limits.json draws the line of "not sure".
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sparsewsi.model import limits
from train.flags import add_flag, make_parser, run_command
from train.stage import find_model_folder
from train.studies.real import GOAL, is_right, read_answers, sure


def trace_risk(records: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares answered, shares right among these, and the least probability answered, from the surest answer on."""
    certain = np.array([sure(record) for record in records])
    order = np.argsort(-certain, kind="stable")
    asked = Counter(record["case"] for record in records)
    weights = np.array([1 / asked[records[i]["case"]] for i in order])
    right = np.array([is_right(records[i]) for i in order], float)
    answered = np.cumsum(weights)
    return answered / answered[-1], np.cumsum(weights * right) / answered, certain[order]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("answers", type=Path, help="answers.jsonl of python -m train.studies.pooled")
    add_flag(parser, "--model")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    given = parser.parse_args()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {limit.kind: limit for limit in limits.load(find_model_folder(given.model)).kinds}
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, kind in enumerate(GOAL):
        records = [r for r in read_answers(given.answers) if r["row"] == "learned" and r["kind"] == kind]
        if not records:
            continue
        answered, right, least = trace_risk(records)
        cases = len({record["case"] for record in records})
        axes.plot(100 * answered, 100 * right, color=f"C{number}", label=f"{kind} ({cases} cases)", linewidth=1.5)
        if kind in known:
            told = int((least >= known[kind].least).sum())
            if told:
                axes.plot(100 * answered[told - 1], 100 * right[told - 1], "o", color=f"C{number}", markersize=5)
            print(
                f"{kind}: answers {told} of {len(records)} ({answered[told - 1]:.0%} with cases alike) from "
                f"{known[kind].least:.2f} on, {right[told - 1]:.0%} right"
                if told
                else f"{kind}: answers none"
            )
    axes.set(xlabel="answered, %, the surest first", ylabel="right of these, %", ylim=(0, 103), xlim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(given.out)


if __name__ == "__main__":
    run_command(main)
