"""How much of a kind is recognised on a source of tiles that was left out.

    python -m train.studies.left_out --bank runs/tiles.safetensors --kind carcinoma

A linear probe of all kinds on the train tiles' features, without those of one source of the kind; then the share of
that source's views of the kind that it calls so. Sources are slides, or a data set of which slides are not known.
"""

import numpy as np

from train.data.bank import Bank, load_bank
from train.eval.statistics import estimate_share
from train.eval.table import write_table
from train.flags import add_flag, make_parser, run_command

STRENGTH = 1e-3  # C of the regression; not chosen


def leave_out(bank: Bank, kind: str, source: str) -> tuple[int, int]:
    """How many of a source's patches of a kind a probe without that source recognises, and how many there are."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = StandardScaler().fit_transform(bank.features.float().numpy())
    out = bank.sources == source
    machine = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=100).fit(x[~out], bank.kinds[~out])
    asked = out & (bank.kinds == kind)
    return int((machine.predict(x[asked]) == kind).sum()), int(asked.sum())


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--bank", required=True)
    parser.add_argument("--kind", default="carcinoma")
    given = parser.parse_args()
    bank = load_bank(given.bank, "train")
    lines = []
    for source in np.unique(bank.sources[bank.rows(given.kind)]).tolist():
        right, asked = leave_out(bank, given.kind, source)
        found = estimate_share(right, asked)
        lines.append([source, asked, f"{found.value:.0%}", f"{found.low:.0%} to {found.high:.0%}"])
    print(write_table(["source left out", f"views of {given.kind}", "recognised", "95 %"], lines))


if __name__ == "__main__":
    run_command(main)
