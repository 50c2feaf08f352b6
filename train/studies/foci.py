"""Whether a selector finds the foci, without a language model: how hard are mosaics, and what is a scorer blind to?

    python -m train.studies.foci --model assets/demo-model --bank runs/real.safetensors --out runs/foci

Three kinds of slides, all of the bank's test split:

    as trained      the mosaics of train.evaluate: one source a tissue, so that its patches recur many times
    each patch once patches of all sources, none twice before all were taken: more that differs without being a focus
    new background  the same, with regions of every tissue of the test split that is neither asked about nor background

Kinds found: of the kinds of the planted foci, the share of which at least one patch is kept; recall: of their patches
(of K, where there are more). Intervals are 95 % percentiles of a bootstrap over mosaics. N patches, K kept.
"""

import numpy as np
from tqdm import tqdm

from sparsewsi.files import write_json, write_text
from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.bank import Bank, list_other_kinds, load_bank
from train.data.kinds import plan_facts
from train.data.layout import add_other_tissue, draw_rows, lay_out
from train.data.stream import place_rows
from train.eval.statistics import estimate_mean
from train.eval.table import write_points, write_table
from train.flags import add_flag, make_parser, run_command

SLIDES = ("as trained", "each patch once", "new background")
REGION = (10, 60)  # patches of a region of new background


def draw_once(bank: Bank, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows (N,) of the bank for a layout (N,), of all sources; none twice before all of its kind were taken."""
    rows = np.empty(len(kinds), np.int64)
    for kind in np.unique(kinds):
        pool, want = bank.rows(str(kind)), int((kinds == kind).sum())
        rows[kinds == kind] = np.concatenate([rng.permutation(pool) for _ in range(-(-want // len(pool)))])[:want]
    return rows


def measure(
    model: SparseWSI, bank: Bank, slides: str, number: int, n: int, ks: list[int], selectors: list[str], seed: int
) -> tuple[dict[str, tuple[float, float]], int]:
    """(kinds found, recall) of every "selector@K" on one mosaic, and how many of its patches differ."""
    rng = np.random.default_rng((seed, number))
    facts = plan_facts(bank.origin, "present", rng)
    kinds = lay_out(facts, n, (4, 12), rng)
    if slides == "new background":
        kinds = add_other_tissue(bank.origin, kinds, list_other_kinds(bank), REGION, rng)
    rows = draw_rows(kinds, bank.kinds, bank.sources, rng) if slides == "as trained" else draw_once(bank, kinds, rng)
    bag = place_rows(bank, rows)
    focus = np.isin(kinds, facts.present)  # (N,)
    found = {}
    for selector in selectors:
        for k in ks:
            kept = model.select(bag, k, selector, seed=seed).indices.numpy()
            share = len(set(kinds[kept]) & set(facts.present)) / len(facts.present)
            found[f"{selector}@{k}"] = (share, float(focus[kept].sum() / min(k, focus.sum())))
    return found, len(np.unique(rows))


def write_foci(table: list[dict]) -> str:
    """Rows as a Markdown table."""
    head = ["slides", "different patches, median", "selector", "K", "kinds found, %", "recall, %", "mosaics"]
    rows = []
    for row in table:
        cells = [row["slides"], f"{row['different']:.0f} of {row['n']:,}", row["selector"], row["k"]]
        rows.append([*cells, write_points(row["kinds"]), write_points(row["recall"]), row["mosaics"]])
    return write_table(head, rows)


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--model")
    add_flag(parser, "--bank", required=True)
    add_flag(parser, "--n")
    parser.add_argument("--k", type=int, nargs="+", default=[32, 8], help="patches kept")
    parser.add_argument("--selectors", nargs="+", default=["learned", "farthest", "redundancy", "random"])
    parser.add_argument("--mosaics", type=int, default=60, help="of each kind of slides")
    add_flag(parser, "--seed", help="of the mosaics")
    add_flag(parser, "--out", help="folder for foci.json and foci.md")
    given = parser.parse_args()
    model, bank, table = SparseWSI.from_pretrained(given.model), load_bank(given.bank, "test"), []
    for slides in SLIDES:
        if slides == "new background" and not list_other_kinds(bank):
            continue
        numbers = tqdm(range(given.mosaics), desc=slides, unit="mosaics")
        made = [measure(model, bank, slides, i, given.n, given.k, given.selectors, given.seed) for i in numbers]
        different = float(np.median([count for _, count in made]))
        for name in made[0][0]:
            selector, k = name.split("@")
            kinds, recall = (estimate_mean(np.array([[found[name][i] for found, _ in made]])) for i in range(2))
            row = {"slides": slides, "different": different, "n": given.n, "selector": selector, "k": int(k)}
            table.append(row | {"kinds": kinds, "recall": recall, "mosaics": given.mosaics})
    settings = {name: str(value) for name, value in vars(given).items()}
    write_json(given.out / "foci.json", {"settings": settings, "rows": table})
    write_text(given.out / "foci.md", write_foci(table) + "\n")
    print(write_foci(table))


if __name__ == "__main__":
    run_command(main)
