"""What the learned top-K is compared with: attention MIL, straight-through and Gumbel top-K, and its own training path.

    python -m train.studies.rivals --checkpoint runs/demo2/checkpoints/last --bank runs/real.safetensors --out runs/gap

asks a checkpoint the same questions on three paths: the hard top-K of inference, the same through the denoiser, and the
soft path of training at its last temperature. How much they differ is the gap between training and inference.

    python -m train.studies.rivals --model assets/demo-model --bank runs/real.safetensors --seed 0 1 2 \\
        --questions 340 --mil-banks runs/real.safetensors runs/phantom.safetensors --out runs/rivals

asks one model the same questions about the patches that each selector keeps, a set of questions a seed. Attention MIL
is trained first, on the train split of --mil-banks, on as many bags as the demo's stage 2. train/studies/grid.py
compares selectors with a language model trained on each.

    python -m train.studies.rivals --tables --out results/rivals-real

prints the tables again, from the answers that are there.

N patches, D feature dim, C needle kinds, W width inside.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsewsi.bags.bag import Bag
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import ROWS, SELECTORS, hard_topk
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import load_state
from train.command import fingerprint, run_command, write_whole
from train.config import RECIPES, TrainConfig
from train.data.mosaic import NEEDLE_KINDS, Bank, MosaicStream, load_bank, mosaic_size
from train.data.packing import Example
from train.eval.scoring import majority, markdown, summary, wilson
from train.evaluate import check_settings, evaluate, mosaic_items, read_records
from train.sparselearn import GATES, SparseLearn, gumbel_topk, ste_topk, zscore

STRAIGHT_THROUGH = ("ste", "gumbel")
PATHS = ("learned", "denoised", "soft")
MIL = "attention-mil"


# ---- straight-through estimators


class StraightThrough(SparseLearn):
    """SparseLearn with a 0/1 mask forward and the soft top-K's gradient backward: dropped tokens are zero, no noise.

    gate: "ste" keeps the highest scores, "gumbel" draws with Gumbel noise. A noise gate is not to be had here: the
    slope of sqrt(alpha) is infinite at 0, where a hard mask lies.
    """

    def __init__(
        self, dim: int, k: int, heads: int = 8, kernel: str = "laplace", gate: str = "ste", denoiser: str = "local"
    ):
        super().__init__(dim, k, heads, kernel, "scale", denoiser)
        if gate not in STRAIGHT_THROUGH:
            raise ValueError(f"gate is {gate!r}; choose one of {', '.join(STRAIGHT_THROUGH)}.")
        self.estimator = gate

    def forward(
        self,
        x: Tensor,
        scores: Tensor,
        tau: float,
        mask: Tensor | None = None,
        k: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As SparseLearn.forward; of a budget that is not whole the whole part is kept."""
        z, budget = zscore(scores, mask), self.k if k is None else k
        if self.estimator == "gumbel":
            alpha = gumbel_topk(z, budget, tau, mask, generator, self.kernel)  # type: ignore[arg-type]
        else:
            alpha = ste_topk(z, budget, tau, mask, self.kernel)  # type: ignore[arg-type]
        x = (x * alpha.unsqueeze(-1)).to(x.dtype)
        if self.denoiser is not None:
            x = self.denoiser(x, mask)
        return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def sparselearn_class(gate: str) -> type[SparseLearn]:
    """The module that a gate of TrainConfig asks for."""
    return StraightThrough if gate in STRAIGHT_THROUGH and gate not in GATES else SparseLearn


def kept_by(selector: str, model: SparseWSI, example: Example) -> Example:
    """The example with the patches that a selector keeps; its patches lie on a square raster, as mosaics do."""
    n = len(example.features)
    rows, columns = np.divmod(np.arange(n), math.isqrt(max(n - 1, 0)) + 1)
    coords = torch.from_numpy(np.stack([columns, rows], 1).astype(np.int32) * 224)
    # The seed is the slide's own, so that a slide is always seen alike and a resumed run sees what the first one saw.
    keep = SELECTORS[selector](example.features, coords, model.config.num_tokens, example.num_patches)
    return example.keep(keep)


# ---- attention MIL


class AttentionMIL(nn.Module):
    """Gated attention over patches that says which needle kinds a slide holds (Ilse et al., ICML 2018)."""

    def __init__(self, feature_dim: int, width: int = 256):
        super().__init__()
        self.inlet = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, width), nn.GELU())
        self.content, self.gate = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.attention = nn.Linear(width // 2, 1)
        self.head = nn.Linear(width, len(NEEDLE_KINDS))

    def score(self, features: Tensor) -> Tensor:
        """(N, D) -> (N,) attention before the softmax."""
        return self._attend(self.inlet(features.float()))

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (C,) logits, one a kind of NEEDLE_KINDS."""
        x = self.inlet(features.float())  # (N, W)
        return self.head(self._attend(x).softmax(0) @ x)

    def _attend(self, x: Tensor) -> Tensor:
        return self.attention(self.content(x).tanh() * self.gate(x).sigmoid()).squeeze(-1)

    @torch.inference_mode()
    def select(self, features: Tensor, coords: Tensor, k: int, seed: int = 0) -> Tensor:
        """The k patches with the highest attention, as a selector. The seed changes nothing."""
        return hard_topk(torch.cat([self.score(part) for part in features.split(ROWS)]), k)


def train_mil(
    banks: Sequence[Bank], seed: int, steps: int, accumulation: int, n: int, lr: float = 5e-4
) -> tuple[AttentionMIL, float]:
    """Train on as many bags as stage 2, of n patches each, and return the model with its mean loss over the last tenth.

    The truth it learns from is which needle kinds a bag holds, more than any answer tells.
    """
    torch.manual_seed(seed)
    stream = MosaicStream(tuple(banks), seed, 2)
    mil = AttentionMIL(banks[0].features.shape[1])
    optimizer = torch.optim.AdamW(mil.parameters(), lr=lr, weight_decay=1e-2)
    losses = []
    for step in range(steps):
        loss = torch.zeros(())
        for number in range(accumulation):
            example = stream.example(step * accumulation + number, n)
            present = torch.tensor([float(kind in example.kinds) for kind in NEEDLE_KINDS])
            loss = loss + F.binary_cross_entropy_with_logits(mil(example.features), present) / accumulation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return mil.eval(), float(np.mean(losses[-max(1, steps // 10) :]))


def save_mil(mil: AttentionMIL, path: Path) -> None:
    """Write its weights under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    save_file(mil.state_dict(), temporary)
    temporary.replace(path)


def load_mil(path: Path) -> AttentionMIL:
    """Read what save_mil wrote."""
    state = load_file(path)
    mil = AttentionMIL(state["inlet.0.weight"].shape[0])
    mil.load_state_dict(state)
    return mil.eval()


# ---- more rows to ask


class Contender(SparseWSI):
    """A SparseWSI whose select knows further selectors by name, so that train.evaluate can ask them like any other."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.more: dict[str, Callable[[Bag, int | None, int], Selection]] = {}

    def select(self, bag: Bag, k: int | None = None, selector: str = "learned", seed: int = 0) -> Selection:
        if selector in self.more:
            return self.more[selector](bag, k, seed)
        return super().select(bag, k, selector, seed)

    def add_selector(self, name: str, keep: Callable[[Tensor, Tensor, int, int], Tensor]) -> None:
        """Add a function of features, coords, k and seed, as those in SELECTORS."""

        @torch.no_grad()
        def select(bag: Bag, k: int | None, seed: int) -> Selection:
            indices = keep(bag.features, bag.coords, k or self.config.num_tokens, seed)
            x = self.encode(bag.features)
            return Selection(indices, self.score(x).cpu(), x[indices.to(x.device)].cpu(), len(x))

        self.more[name] = select

    def add_training_path(self, sparselearn: SparseLearn, tau: float) -> None:
        """Add what training shows the LLM.

        "soft": all N tokens behind soft top-K, gate and denoiser at temperature tau, with noise drawn from the seed;
        "denoised": the hard top-K through the denoiser, which inference leaves out.
        """

        @torch.no_grad()
        def soft(bag: Bag, k: int | None, seed: int) -> Selection:
            x = self.encode(bag.features)
            scores = self.score(x)
            generator = torch.Generator(x.device).manual_seed(seed)
            tokens = sparselearn(x, scores, tau, k=k, generator=generator)
            return Selection(torch.arange(len(x)), scores.cpu(), tokens.cpu(), len(x))

        @torch.no_grad()
        def denoised(bag: Bag, k: int | None, seed: int) -> Selection:
            kept = self.select(bag, k)
            if sparselearn.denoiser is None:
                return kept
            return replace(kept, tokens=sparselearn.denoiser(kept.tokens.to(self.device)).cpu())

        self.more |= {"soft": soft, "denoised": denoised}


def load_contender(checkpoint: Path) -> Contender:
    """A checkpoint's model with its training path at the last temperature of the run that made it."""
    checkpoint = checkpoint.resolve()
    config = TrainConfig(**json.loads((checkpoint.parent.parent / "train_config.json").read_text()))
    model = Contender.from_pretrained(checkpoint / "model")
    assert isinstance(model, Contender)
    build = sparselearn_class(config.gate)
    settings = model.config
    sparselearn = build(
        settings.dim, settings.num_tokens, kernel=config.kernel, gate=config.gate, denoiser=config.denoiser
    )
    load_state(checkpoint, sparselearn)
    model.add_training_path(sparselearn.to(model.device).eval(), config.tau_end)
    return model


def against_learned(records: Sequence[dict], row: str, draws: int = 4000) -> tuple[float, float, float]:
    """Paired difference in accuracy, row minus learned, over the questions that both were asked; a 95 % bootstrap."""
    both = [record for record in records if row in record and "learned" in record]
    values = np.array([float(r[row] == r["answer"]) - float(r["learned"] == r["answer"]) for r in both])
    drawn = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def share(records: Sequence[dict], row: str) -> str:
    """Accuracy of a row in percent with its Wilson interval."""
    asked = [record for record in records if row in record]
    right = sum(record[row] == record["answer"] for record in asked)
    low, high = wilson(right, len(asked))
    return f"{100 * right / max(1, len(asked)):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def comparison(records: Sequence[dict], rows: Sequence[str]) -> str:
    """Rows as Markdown: overall, microscopy and diagnosis in percent, and the paired difference from learned.

    Needle recall is the share of needle patches that are kept, kinds found that of the needle kinds of which one is.
    The difference also without the family "dominant", which is about the background and not about what is planted.
    """
    parts = ([r for r in records if r["family"] != "diagnosis"], [r for r in records if r["family"] == "diagnosis"])
    head = ("row", "overall", "microscopy", "diagnosis", "needle recall", "kinds found", "minus learned")
    head = (*head, "the same without dominant", "n")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    planted = [record for record in records if record["family"] != "dominant"]
    for row in rows:
        cells = [row, share(records, row), *(share(part, row) for part in parts)]
        for what in ("recall", "kinds"):
            found = [record[f"{row} {what}"] for record in records if f"{row} {what}" in record]
            cells.append(f"{100 * np.mean(found):.0f} %" if found else "")
        for asked in (records, planted):
            both = row != "learned" and any(row in record and "learned" in record for record in asked)
            change = (100 * value for value in against_learned(asked, row)) if both else ()
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*change) if both else "")
        lines.append(f"| {' | '.join(cells)} | {sum(row in record for record in records)} |")
    return "\n".join(lines)


def write_tables(known: dict[int, dict], rows: Sequence[str] | None, out: Path) -> str:
    """Write table.json and table.md from answers, of all rows that were asked or of these; returns the Markdown."""
    records = [known[number] for number in sorted(known)]
    majority(records)
    names = (*PATHS, *SELECTORS, MIL, "all", "text-only")
    rows = tuple(rows or (name for name in names if any(name in record for record in records)))
    table = summary(records, rows)
    write_whole(out / "table.json", json.dumps({"rows": table}, indent=2) + "\n")
    text = markdown(table)
    if "learned" in rows:
        text += "\n\n" + comparison(records, (*rows, "majority"))
    write_whole(out / "table.md", text + "\n")
    return text


def attention_mil(banks: Sequence[Path], path: Path) -> AttentionMIL:
    """The one in path; if there is none it is trained on the train split of banks as long as the demo's stage 2."""
    if not path.is_file():
        config = RECIPES["demo-stage2"]()
        loaded = [load_bank(bank, "train") for bank in banks]
        save_mil(train_mil(loaded, config.seed, config.steps, config.accumulation, config.patches)[0], path)
    return load_mil(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", type=Path, help="of train.run; knows its training path as well")
    what.add_argument("--model", type=Path, help="a released model")
    parser.add_argument("--bank", type=Path)
    parser.add_argument("--n", type=mosaic_size, default=1024, help="patches of a mosaic")
    parser.add_argument("--questions", type=int, default=400, help="of each seed, one mosaic each")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the questions")
    parser.add_argument("--needles", type=int, nargs=2, default=[4, 12], help="least and most patches of a focus")
    parser.add_argument(
        "--mil-banks", type=Path, nargs="+", help="what attention MIL is trained on; without, it is no row"
    )
    parser.add_argument("--rows", nargs="+", help="default: the paths of a checkpoint, the selectors for a model")
    parser.add_argument("--out", type=Path, required=True, help="folder for records.jsonl, table.json and table.md")
    parser.add_argument("--tables", action="store_true", help="ask nothing, print the tables of --out")
    given = parser.parse_args()
    log = given.out / "records.jsonl"
    if given.tables:
        if not log.is_file():
            raise ValueError(f"{log} is not there; --out is the folder of answers that were asked for.")
        print(write_tables(read_records(log), given.rows, given.out))
        return
    source = given.checkpoint or given.model
    if source is None or given.bank is None:
        raise ValueError("Say what is asked, with --checkpoint or --model, and about what, with --bank.")
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(getattr(given, name)) for name in ("checkpoint", "model", "bank", "n", "seed")}
    settings |= {"questions": str(given.questions)} if len(given.seed) > 1 else {}  # else more can be asked later
    settings |= {"needles": str(given.needles)} if given.needles != [4, 12] else {}
    check_settings(given.out, settings | {"weights": fingerprint(sorted(source.resolve().rglob("*.safetensors")))})
    if given.checkpoint:
        model, rows = load_contender(given.checkpoint), PATHS
    else:
        model, rows = Contender.from_pretrained(given.model), ("learned", *SELECTORS, "text-only")
        assert isinstance(model, Contender)
    if given.mil_banks:
        model.add_selector(MIL, attention_mil(given.mil_banks, given.out / f"{MIL}.safetensors").select)
        rows = (*rows, MIL)
    rows = tuple(given.rows or rows)
    fewest, most = given.needles
    items = chain.from_iterable(
        mosaic_items(given.bank, "test", given.questions, given.n, seed, (fewest, most)) for seed in given.seed
    )
    total = given.questions * len(given.seed)
    evaluate(model, items, total, rows, None, log)
    print(write_tables(read_records(log), rows, given.out))


if __name__ == "__main__":
    run_command(main)
