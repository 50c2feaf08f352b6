"""How often the model answers right, with which patches, against what.

    python -m train.evaluate mosaic --model assets/demo-model --bank runs/real.safetensors --n 1024 --questions 400 \\
        --out runs/eval-real
    python -m train.evaluate phantom --model assets/demo-model --slides 30 --out runs/eval-phantom
    python -m train.evaluate tcga-1494 --data SlideBench-VQA-TCGA.csv --features features/ --model my-model \\
        --out runs/eval-tcga

The named benchmarks and the files they come as are in train/data/questions.py; `python -m train.data.questions check`
says beforehand what is missing. Every question is multiple choice and is answered by the likeliest option (mean
log-likelihood per token of the option's text); with --generate it is also answered in writing, which is read twice:
strict (a letter, or the text of one option, and nothing else) and lenient (train/eval/reading.py).

Rows: the learned top-K, K random patches, K patches on a uniform grid and all N patches through the same artefact; the
text alone (no visual token); the majority answer, that is the most frequent answer of each question family in this very
set, an optimistic constant. A row "learned@8" keeps 8 patches, whatever --k says. Questions about slides without
features count as wrong (but for the text alone and the majority) unless --skip-missing leaves them out. Intervals are
Wilson's at 95 %; where several questions share a slide, a bootstrap over slides as well.

Other systems answer in rows READER:SHOWN, as in gpt-4o:random@30, gpt-4o:thumbnail or openai:MODEL:learned@32, and in
the row slidechat (train/eval/systems.py); they see pictures, cut from the slides in --slides, and are read strictly and
leniently. Servers are named by SPARSEWSI_ENDPOINT and OPENAI_API_KEY. --answers keeps what they said for other runs.

The folder --out gets a line per question as it is answered; a run that is stopped goes on, and asks no question twice.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparsewsi.files import write_json, write_text
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.sparse_wsi import SparseWSI
from train.config import MOST_PATCHES
from train.data.bank import list_phantom_seeds
from train.data.questions import BENCHMARKS, BadRow, read_closed_questions, report_missing_features
from train.data.slides import FeatureFolder
from train.eval.items import Item, make_mosaic_items, make_phantom_items, read_items
from train.eval.picture import draw_scores
from train.eval.reading import add_readings
from train.eval.running import ROWS, Way, check_rows, evaluate
from train.eval.scoring import add_majority, score_rows, write_scores
from train.eval.systems import SLIDECHAT, SYSTEMS, Systems, add_votes, describe_counts, open_systems
from train.flags import add_flag, make_parser, run_command
from train.run_folder import claim, digest_model, digest_of


@dataclass
class QuestionSet:
    """A set of questions: the items, how many, and what decides them; rows of its files that cannot be asked."""

    items: Iterable[Item]
    total: int
    settings: dict[str, Any]
    bad: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def say(line: str) -> None:
    """A line above the progress bar."""
    tqdm.write(line, file=sys.stderr)


def choose_mosaics(given: argparse.Namespace) -> QuestionSet:
    """Questions on mosaics, of each N in turn."""
    if given.bank is None:
        raise ValueError("mosaic needs --bank, a file of python -m train.data.mosaic bank.")
    items = itertools.chain.from_iterable(
        make_mosaic_items(given.bank, given.split, given.questions, n, given.seed) for n in given.n
    )
    settings = {name: getattr(given, name) for name in ("bank", "split", "seed", "n")}
    if len(given.n) > 1:  # else more questions can be asked later
        settings["questions"] = given.questions
    return QuestionSet(items, given.questions * len(given.n), settings)


def choose_phantoms(given: argparse.Namespace, config: SparseWSIConfig) -> QuestionSet:
    """Questions on whole phantom slides of the test split."""
    seeds = list_phantom_seeds("test", given.slides)
    items = make_phantom_items(given.out / "slides", seeds, given.size, given.per_slide, config.encoder)
    settings = {"size": given.size, "per_slide": given.per_slide}
    return QuestionSet(items, given.slides * given.per_slide, settings)


def choose_file(given: argparse.Namespace, config: SparseWSIConfig) -> QuestionSet:
    """The closed questions of files, about slides whose features lie in a folder."""
    if not given.data or not given.features:
        raise ValueError(f"{given.benchmark} needs --data FILE and --features FOLDER.")
    records, bad, notes = read_closed_questions(given.benchmark, given.data)
    features = FeatureFolder(given.features)
    slides = {slide for record in records for slide in record.slides}
    if len(list(report_missing_features(records, features))) == len(slides):
        raise ValueError(f"none of the {len(slides)} slides has a feature file under {given.features}.")
    items = read_items(records, features, config, given.max_patches, say)
    settings = {"questions": digest_of(*given.data), "features": given.features, "max_patches": given.max_patches}
    return QuestionSet(items, len(records), settings, bad, notes)


def run(given: argparse.Namespace) -> str:
    """Evaluate as the flags say, write the tables, and return the one in Markdown with notes under it."""
    check_rows(given.rows)
    if given.benchmark == "phantom":
        given.slides = read_count(given.slides)
    elif given.slides is not None:
        given.slides = Path(given.slides)
    for name in ("questions", "per_slide"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}.")
    if given.seed and given.benchmark != "mosaic":
        raise ValueError("--seed is for mosaics: other questions are always the same ones.")
    others = [row for row in given.rows if row == SLIDECHAT or ":" in row]
    if others and given.benchmark in ("mosaic", "phantom"):
        raise ValueError(f"{others[0]} is a row for questions about slides in files, not for a {given.benchmark}.")
    given.answers = given.answers or given.out / "answers.jsonl"
    theirs = (given.slidechat, given.slidechat_features or given.features) if given.slidechat else None
    readers = dict(given.reader)
    folder = given.slides if isinstance(given.slides, Path) else None
    systems = open_systems(given.rows, readers, given.answers, folder, theirs, os.environ, given.device)
    config = SparseWSIConfig.load(given.model)
    if given.benchmark == "mosaic":
        chosen = choose_mosaics(given)
    elif given.benchmark == "phantom":
        chosen = choose_phantoms(given, config)
    else:
        chosen = choose_file(given, config)
    settings = chosen.settings | {"benchmark": given.benchmark, "k": given.k, "prompt": given.prompt}
    settings |= {"model": digest_model(given.model), "config": replace(config, note="", demo=False, adapter=None)}
    claim(given.out, json.loads(json.dumps(settings, default=_plain)))
    model = SparseWSI.from_pretrained(given.model, device=given.device)
    way = Way(tuple(given.rows), given.k, given.prompt, given.generate)
    try:
        answered = evaluate(model, chosen.items, chosen.total, way, given.out / "records.jsonl", systems)
    finally:
        if systems is not None:
            systems.close()
    return write_results(given, answered, chosen, given.k or config.num_tokens, systems)


def read_count(text: str | None) -> int:
    """--slides of phantoms. Raises ValueError for what is no number of at least 1."""
    if text is None:
        return 40
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--slides of phantoms is a number of at least 1, got {text}.")
    return int(text)


def read_pair(text: str) -> tuple[str, str]:
    """NAME=READER of the command line."""
    name, equals, reader = text.partition("=")
    if not equals or name not in SYSTEMS:
        raise argparse.ArgumentTypeError(f"NAME=READER, of {', '.join(SYSTEMS)}; got {text}")
    return name, reader


def read_price(text: str) -> tuple[str, tuple[float, float]]:
    """NAME=IN/OUT of the command line, USD for a million tokens."""
    name, _, price = text.rpartition("=")
    try:
        first, second = (float(part) for part in price.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"NAME=IN/OUT in USD per million, as gpt-4o=2.5/10; got {text}") from None
    return name, (first, second)


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, SparseWSIConfig) else str(value)


def write_results(
    given: argparse.Namespace, answered: list[dict], chosen: QuestionSet, k: int, systems: Systems | None = None
) -> str:
    """Write table.json, table.md and table.png; returns the Markdown. Raises ValueError if nothing could be asked."""
    notes = list(chosen.notes)
    missing = [record for record in answered if record.get("missing")]
    if len(missing) == len(answered):
        raise ValueError(f"no slide has usable features; the first: {answered[0]['missing'] if answered else 'none'}")
    if missing:
        how = "left out" if given.skip_missing else "counted as wrong"
        slides = len({record["slide"] for record in missing})
        notes.append(f"{len(missing)} questions about {slides} slides without usable features are {how}.")
    if given.skip_missing:
        answered = [record for record in answered if not record.get("missing")]
    ours = [row for row in given.rows if ":" not in row]
    rows = (*ours, *add_readings(answered, ours), *add_votes(answered, given.rows))
    counts = systems.counts if systems else {}
    notes += describe_counts(counts, dict(given.price))
    add_majority(answered, letters=given.benchmark not in ("mosaic", "phantom"))
    if chosen.bad and not given.skip_missing:
        notes.append(f"{len(chosen.bad)} rows of the files cannot be asked and are counted as wrong.")
        answered += [count_as_wrong(problem, (*rows, "majority")) for problem in chosen.bad]
    scores = score_rows(answered, rows)
    settings = {name: str(value) for name, value in vars(given).items()}
    record = {name: asdict(score) | {"accuracy": score.accuracy} for name, score in scores.items()}
    asked = {row: asdict(count) for row, count in counts.items()}
    text = "\n".join([write_scores(scores), *(["", *notes] if notes else [])])
    write_json(given.out / "table.json", {"settings": settings, "rows": record, "notes": notes, "asked": asked})
    write_text(given.out / "table.md", text + "\n")
    draw_scores(scores, k, given.out / "table.png")
    return text


def count_as_wrong(problem: BadRow, rows: Iterable[str]) -> dict:
    """The record of a row that cannot be asked."""
    slide = problem.slide or f"{problem.file}, row {problem.row}"
    facts = {"slide": slide, "family": "unreadable", "answer": "?", "options": [], "n": 0, "detail": ""}
    return facts | dict.fromkeys(rows)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("benchmark", choices=["mosaic", "phantom", "file", *BENCHMARKS])
    add_flag(parser, "--model")
    parser.add_argument("--data", type=Path, nargs="+", help="named benchmarks, file: the files of questions")
    parser.add_argument("--features", type=Path, help="named benchmarks, file: folder of the slides' feature files")
    parser.add_argument(
        "--max-patches",
        type=int,
        default=MOST_PATCHES,
        help=f"of a larger slide, so many patches, evenly spaced; default {MOST_PATCHES:,}, as in training",
    )
    parser.add_argument("--skip-missing", action="store_true", help="leave out questions about slides without features")
    add_flag(parser, "--bank", help="mosaic: the feature bank")
    add_flag(parser, "--split", help="mosaic: of the bank")
    add_flag(parser, "--n", nargs="+", default=[1024], help="mosaic: patches a slide; several: each in turn")
    add_flag(parser, "--questions", help="mosaic: number of questions per N, one mosaic each")
    add_flag(parser, "--seed", help="mosaic: of the questions")
    parser.add_argument("--slides", help="phantom: number of slides (40); else: folder of slides, for rows of readers")
    parser.add_argument("--per-slide", type=int, default=10, help="phantom: questions a slide")
    parser.add_argument("--size", type=int, default=10_000, help="phantom: side of a slide in px")
    parser.add_argument("--k", type=int, help="patches kept; default: the model's")
    add: Any = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), help="selector[@K], all, text-only, slidechat, READER:SHOWN")
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--reader", type=read_pair, **several, metavar="NAME=READER", help="who answers as a system of Table 1")
    add("--answers", type=Path, help="what readers said; default: answers.jsonl in --out")
    add("--price", type=read_price, **several, metavar="NAME=IN/OUT", help="USD for a million tokens")
    add("--slidechat", type=Path, help="slidechat: the model of python -m train.convert slidechat")
    add("--slidechat-features", type=Path, help="slidechat: folder of CONCH features; default: --features")
    parser.add_argument("--prompt", choices=["slidechat", "plain"], default="slidechat")
    parser.add_argument(
        "--generate", action="store_true", help="answer in writing as well, read strictly and leniently"
    )
    parser.add_argument("--device", help="cpu, cuda, ...")
    add_flag(parser, "--out", help="folder for records.jsonl, table.json, table.md, table.png")
    print(run(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)
