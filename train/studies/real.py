"""What a model answers about real slides and about mosaics of an open world that it has never seen.

    python -m train.studies.real --model my-model --slides runs/slides.safetensors --bank runs/tiles.safetensors \\
        --split test --out results/real-test

Every slide is asked every kind of question whose answer was published, in every wording, organ and diagnosis with
several sets of wrong options; a mosaic of an open world is asked one question. The answer is the likeliest option. Rows
are ways to keep 32 patches, all patches, the majority answer, and a logistic regression on mean-pooled features of the
train split (its strength chosen by cross-validation over train cases). Intervals resample cases, 2.5 to 97.5 %.

--limits writes what the artefact says of itself into its folder: where it is not sure as the pooled validation
suggests (train/studies/pooled.py), how often it is right as the answers about the slides asked now tell.

The folder --out gets a line a slide and row (slides.jsonl) and a line a mosaic (mosaics.jsonl) as they are answered; a
run that was stopped goes on.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sparsewsi.bags.bag import Bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.files import append_line, read_lines, write_text
from sparsewsi.model.limits import Limit, Limits
from sparsewsi.model.prompt import text_ids
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import mmr
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.model.words import UNKNOWN
from train.align import word_of
from train.data.bank import Bank, load_bank
from train.data.example import Example, Question
from train.data.open_world import GLASS, OpenWorld, absent_slides
from train.data.packing import answer_logits, pack
from train.data.real import CHOICES, KINDS, WORDINGS, YES_NO, SlideFacts, ask, load_slides, slide_bag, slide_rows
from train.data.stream import place_rows
from train.eval.statistics import estimate_share
from train.eval.table import write_table
from train.flags import add_flag, make_parser, run_command
from train.stage import find_model_folder

ROWS = ("learned", "topk", "mmr", "random", "farthest", "all")
ALIKE = 0.4  # cosine from which on a patch has a word: on validation tiles, where 3 of 4 words are then right
SETS = 4  # sets of wrong options of a choice
TOGETHER = 4  # questions in a pass


def keep(model: SparseWSI, bag: Bag, row: str, k: int, seed: int) -> Selection:
    """The patches a row keeps: a selector's, or "all"; "mmr@2" weighs likeness by 2."""
    if row == "all":
        x = model.encode(bag.features).cpu()
        return Selection(torch.arange(len(x)), torch.zeros(len(x)), x, len(x))
    selector, _, weight = row.partition("@")
    if weight:
        scores = model.score(model.encode(bag.features)).cpu()
        indices = mmr(scores, bag.features, k, float(weight))
        return Selection(indices, scores, model.encode(bag.features[indices]).cpu(), len(scores))
    return model.select(bag, k, selector=selector, seed=seed)


@torch.inference_mode()
def option_probs(model: SparseWSI, selection: Selection, questions: Sequence[Question]) -> list[list[float]]:
    """What SparseWSI.option_probs gives for each question, several of them in a pass behind one copy of the patches."""
    found: list[list[float]] = []
    for start in range(0, len(questions), TOGETHER):
        part = questions[start : start + TOGETHER]
        variants = tuple(replace(question, answer=option) for question in part for option in question.options)
        example = Example(selection.tokens, selection.indices, selection.num_patches, variants)
        packed = pack(model.tokenizer, example, model.config.position, model.max_position)
        logits = answer_logits(model, model.project(selection.tokens), packed).cpu()
        nll = F.cross_entropy(logits, packed.targets, reduction="none")
        ends = torch.cumsum(torch.tensor([len(text_ids(model.tokenizer, v.answer)) + 1 for v in variants]), 0)
        scores = -torch.stack([each.mean() for each in torch.tensor_split(nll, ends[:-1])])
        found += [each.softmax(0).tolist() for each in scores.split([len(question.options) for question in part])]
    return found


def all_questions(slide: SlideFacts, others: Sequence[SlideFacts], sets: int = SETS) -> list[Question]:
    """Every question about a slide; wrong options are facts of the others, a different draw of them for each set."""
    found = []
    for kind in KINDS:
        for number in range(len(WORDINGS[kind]) if kind in YES_NO else sets):
            rng = np.random.default_rng((number, *slide.slide.encode()))
            wording = number if kind in YES_NO else number % len(CHOICES[kind]) if number else 0
            shuffled = [others[i] for i in rng.permutation(len(others)) if others[i].case != slide.case]
            question = ask(slide, kind, shuffled, rng, wording)
            if question is not None:
                found.append(question)
    return found


def answer_slides(
    model: SparseWSI,
    bags: dict[str, Bag],
    slides: Sequence[SlideFacts],
    others: Sequence[SlideFacts],
    rows: Sequence[str],
    k: int,
    log: Path,
) -> list[dict[str, Any]]:
    """One record per slide, row and question; the log has a line per slide and row. others: give wrong options."""
    lines = list(read_lines(log)) if log.exists() else []
    done = {(line["slide"], line["row"]) for line in lines}
    for slide in tqdm(slides, desc="slides", disable=None):
        questions = all_questions(slide, others)
        for row in rows:
            if (slide.slide, row) in done or not questions:
                continue
            selection = keep(model, bags[slide.slide], row, k, 0)
            asked = [
                {
                    "kind": question.family,
                    "question": question.question,
                    "options": list(question.options),
                    "answer": question.answer,
                    "probs": probs,
                }
                for question, probs in zip(questions, option_probs(model, selection, questions))
            ]
            line = {"slide": slide.slide, "case": slide.case, "row": row, "n": selection.num_patches, "asked": asked}
            append_line(log, line)
            lines.append(line)
    return [
        {"slide": line["slide"], "case": line["case"], "row": line["row"], **asked}
        for line in lines
        for asked in line["asked"]
    ]


def probe_slides(
    train: tuple[Bank, tuple[SlideFacts, ...]],
    bags: dict[str, Bag],
    slides: Sequence[SlideFacts],
    others: Sequence[SlideFacts],
) -> list[dict[str, Any]]:
    """The same questions answered by a logistic regression on the mean feature of a slide."""
    bank, known = train
    x = {
        slide.slide: bank.features[torch.from_numpy(slide_rows(bank, slide.slide))].float().mean(0).numpy()
        for slide in known
    }
    records = []
    for kind in ("malignant", "carcinoma", "neoplasm", "organ"):
        told = [slide for slide in known if slide.facts[kind]]
        machine = fit_probe(
            np.stack([x[slide.slide] for slide in told]),
            np.array([slide.facts[kind] for slide in told]),
            np.array([slide.case for slide in told]),
        )
        for slide in slides:
            probs = dict(
                zip(
                    machine.classes_, machine.predict_proba(bags[slide.slide].features.float().mean(0)[None].numpy())[0]
                )
            )
            for question in all_questions(slide, others):
                if question.family == kind:
                    found = np.array([probs.get(option, 0.0) for option in question.options]) + 1e-9
                    records.append(
                        {
                            "slide": slide.slide,
                            "case": slide.case,
                            "row": "probe",
                            "kind": kind,
                            "question": question.question,
                            "options": list(question.options),
                            "answer": question.answer,
                            "probs": (found / found.sum()).tolist(),
                        }
                    )
    return records


def add_majority(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of the most frequent answer to each kind of yes-or-no question in this very set."""
    found = []
    for kind in YES_NO:
        asked = [record for record in records if record["kind"] == kind and record["row"] == "learned"]
        yes = 2 * sum(record["answer"] == "Yes" for record in asked) > len(asked)
        found += [record | {"row": "majority", "probs": [float(yes), float(not yes)]} for record in asked]
    return found


def fit_probe(x: np.ndarray, y: np.ndarray, cases: np.ndarray) -> Any:
    """Balanced logistic regression of labels (S,) on features (S, D), as strong as suits unseen cases best."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    machine = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=500))
    grid = {"logisticregression__C": [1e-5, 1e-4, 1e-3, 1e-2]}
    search = GridSearchCV(machine, grid, scoring="balanced_accuracy", cv=GroupKFold(5))
    return search.fit(x, y, groups=cases).best_estimator_


# ---------------------------------------------------------------------------------------------------------- scores


def resample(records: Sequence[dict[str, Any]], measure: Any, draws: int = 1000) -> tuple[float, float, float]:
    """A measure of the records and its 95 % interval from a bootstrap over cases; NaN where it cannot be had."""
    by_case = defaultdict(list)
    for record in records:
        by_case[record["case"]].append(record)
    cases, rng = sorted(by_case), np.random.default_rng(0)
    found = []
    for _ in range(draws):
        drawn = [record for case in rng.choice(cases, len(cases)) for record in by_case[str(case)]]
        found.append(measure(drawn))
    low, high = np.nanpercentile(found, [2.5, 97.5]) if not np.all(np.isnan(found)) else (np.nan, np.nan)
    return measure(records), float(low), float(high)


def says_yes(record: dict[str, Any]) -> float:
    """Probability of Yes."""
    return record["probs"][record["options"].index("Yes")]


def is_right(record: dict[str, Any]) -> bool:
    """Whether the likeliest option is the answer."""
    return record["options"][int(np.argmax(record["probs"]))] == record["answer"]


def accuracy(records: Sequence[dict[str, Any]]) -> float:
    """Share of right answers."""
    return float(np.mean([is_right(record) for record in records])) if records else np.nan


def share_of(answer: str) -> Any:
    """Accuracy on the records whose answer is this: sensitivity for Yes, specificity for No."""
    return lambda records: accuracy([record for record in records if record["answer"] == answer])


def balanced(records: Sequence[dict[str, Any]]) -> float:
    """Mean of sensitivity and specificity."""
    return (share_of("Yes")(records) + share_of("No")(records)) / 2


def auc(records: Sequence[dict[str, Any]]) -> float:
    """Chance that a slide with Yes gets a higher probability of Yes than one with No."""
    yes = np.array([says_yes(record) for record in records if record["answer"] == "Yes"])
    no = np.array([says_yes(record) for record in records if record["answer"] == "No"])
    if not len(yes) or not len(no):
        return np.nan
    difference = yes[:, None] - no[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def sure(record: dict[str, Any]) -> float:
    """Probability of the likeliest option."""
    return float(max(record["probs"]))


def select_risk(records: Sequence[dict[str, Any]], goal: float) -> float:
    """The lowest probability from which on answers are right as often as the goal asks; 1 where they never are.

    Cases count alike, however many answers there are about one.
    """
    asked = Counter(record["case"] for record in records)
    weights = np.array([1 / asked[record["case"]] for record in records])
    certain = np.array([sure(record) for record in records])
    right = np.array([is_right(record) for record in records], float)
    for level in sorted(set(certain.tolist())):
        told = certain >= level
        if np.average(right[told], weights=weights[told]) >= goal:
            return level
    return 1.0


# -------------------------------------------------------------------------------------------------------- mosaics


def make_mosaics(
    bank: Bank, slides: Bank | None, count: int, n: int, seed: int
) -> Iterator[tuple[Bag, np.ndarray, set[str], Question]]:
    """Bags of an open world, the kinds of their patches, the foci among these, and a question about each."""
    world = OpenWorld(bank, slides, seed)
    side = int(np.ceil(np.sqrt(n)))
    row, column = np.divmod(np.arange(n), side)
    coords = torch.from_numpy(np.stack([column, row], 1).astype(np.int32) * 224)
    number = 0
    for index in range(10 * count):
        if number == count:
            return
        rng = np.random.default_rng((seed, 19, index))
        drawn = world.draw(n, (4, 12), rng)
        questions = {question.family: question for question in world.questions(drawn.facts, drawn.certain, rng)}
        families = [family for family in ("present", "absent", "contains", "diagnosis") if family in questions]
        wanted = ("present", "absent", "contains", "diagnosis")[number % 4]
        if wanted not in families or not drawn.needles:
            continue
        bag = Bag(drawn.features, coords, 224, 0.5, bank.encoder, f"open mosaic {number}, seed {seed}")
        number += 1
        yield bag, drawn.kinds, drawn.needles, questions[wanted]


def answer_mosaics(
    model: SparseWSI, mosaics: Iterator[Any], total: int, rows: Sequence[str], k: int, log: Path
) -> list[dict[str, Any]]:
    """One record per mosaic and row: the answer, and what of the foci was kept."""
    records = list(read_lines(log)) if log.exists() else []
    done = {(record["case"], record["row"]) for record in records}
    for number, (bag, kinds, needles, question) in enumerate(tqdm(mosaics, total=total, desc="mosaics", disable=None)):
        for row in rows:
            if (bag.slide, row) in done:
                continue
            selection = keep(model, bag, row, k, number)
            found = kinds[selection.indices.numpy()]
            record = {
                "case": bag.slide,
                "row": row,
                "kind": question.family,
                "question": question.question,
                "options": list(question.options),
                "answer": question.answer,
                "probs": option_probs(model, selection, [question])[0],
                "recall": float(np.isin(found, list(needles)).sum() / max(1, np.isin(kinds, list(needles)).sum())),
                "found": len(set(found.tolist()) & needles) / max(1, len(needles)),
            }
            append_line(log, record)
            records.append(record)
    return records


# --------------------------------------------------------------------------------------------------------- tables


def table_of_slides(records: Sequence[dict[str, Any]], limits: Limits) -> str:
    """Markdown: a line per row and kind of question, in the first wording and in all."""
    lines = []
    for kind in KINDS:
        for row in dict.fromkeys(record["row"] for record in records):
            asked = [record for record in records if record["row"] == row and record["kind"] == kind]
            if not asked:
                continue
            first = [record for record in asked if record["question"] == WORDINGS[kind][0]] if kind in YES_NO else asked
            for name, some in (("first wording", first), ("all wordings", asked))[: 2 if kind in YES_NO else 1]:
                limit = limits.find(WORDINGS[kind][0])
                told = [record for record in some if sure(record) >= (limit.least if limit else 0)]
                cells = [
                    kind,
                    name if kind in YES_NO else "four options",
                    row,
                    len({record["slide"] for record in some}),
                    len({record["case"] for record in some}),
                ]
                if kind in YES_NO:
                    measures = (auc, share_of("Yes"), share_of("No"), balanced)
                    cells += [
                        _interval(resample(some, measure), 100 if measure is not auc else 1) for measure in measures
                    ]
                else:
                    cells += ["", "", "", ""]
                cells += [
                    _interval(resample(some, accuracy), 100),
                    f"{len(told) / len(some):.0%}",
                    f"{accuracy(told):.0%}" if told else "",
                ]
                lines.append(cells)
    head = [
        "kind",
        "asked",
        "row",
        "slides",
        "cases",
        "AUC",
        "sensitivity",
        "specificity",
        "balanced",
        "right",
        "answered",
        "right when answered",
    ]
    return write_table(head, lines)


def table_of_mosaics(records: Sequence[dict[str, Any]], base: str = "learned") -> str:
    """Markdown: a line per row, with the paired difference to the first row."""
    rows = list(dict.fromkeys(record["row"] for record in records))
    right = {row: np.array([is_right(record) for record in records if record["row"] == row], float) for row in rows}
    rng, lines = np.random.default_rng(0), []
    for row in rows:
        some = [record for record in records if record["row"] == row]
        by_kind = [
            f"{accuracy([r for r in some if r['kind'] == kind]):.0%}"
            for kind in ("present", "absent", "contains", "diagnosis")
        ]
        difference = ""
        if row != base and base in right and len(right[base]) == len(right[row]):
            gap = 100 * (right[base] - right[row])
            draws = [gap[rng.integers(len(gap), size=len(gap))].mean() for _ in range(2000)]
            difference = f"{gap.mean():+.1f} ({np.percentile(draws, 2.5):+.1f} to {np.percentile(draws, 97.5):+.1f})"
        recall, found = (np.mean([record[name] for record in some]) for name in ("recall", "found"))
        lines.append(
            [
                row,
                len(some),
                _interval(resample(some, accuracy), 100),
                difference,
                f"{recall:.0%}",
                f"{found:.0%}",
                *by_kind,
            ]
        )
    return write_table(
        [
            "row",
            "n",
            "right",
            f"{base} less this",
            "patches of foci kept",
            "kinds of foci kept",
            "present",
            "absent",
            "contains",
            "diagnosis",
        ],
        lines,
    )


def _interval(found: tuple[float, float, float], unit: int) -> str:
    value, low, high = (unit * number for number in found)
    return f"{value:.1f} ({low:.1f} to {high:.1f})" if unit == 100 else f"{value:.2f} ({low:.2f} to {high:.2f})"


PATTERNS = {
    "neoplasm": ("neoplas", "benign or malignant", r"^(?!.*malignan).*\btumou?r"),
    "malignant": ("malignan", r"\bcancer"),
    "carcinoma": ("carcinoma",),
    "organ": (r"\borgan\b", "where was this tissue", r"tissue (come|taken) from"),
    "category": ("category of disease", "kind of disease", "sort of process"),
}
GOAL = {"neoplasm": 0.85, "malignant": 0.85, "carcinoma": 0.85, "organ": 0.75, "category": 0.75}


def make_limits(
    chosen: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], vocabulary: Sequence[str], alike: float
) -> Limits:
    """What the artefact says of its own selection's answers: thresholds from `chosen`, shares from `records`."""
    kinds = []
    for kind, words in PATTERNS.items():
        some, before = (
            [record for record in each if record["row"] == "learned" and record["kind"] == kind]
            for each in (records, chosen)
        )
        if not some or not before:
            continue
        right, low, high = resample(some, accuracy)
        least = select_risk(before, GOAL[kind])
        told = [record for record in some if sure(record) >= least]
        kinds.append(
            Limit(
                kind,
                words,
                len({record["slide"] for record in some}),
                len({record["case"] for record in some}),
                round(right, 3),
                round(low, 3),
                round(high, 3),
                round(least, 3),
                round(accuracy(told), 3) if told else 0.0,
                round(len(told) / len(some), 3),
                round(share_of("Yes")(some), 3) if kind in YES_NO else None,
            )
        )
    return Limits(tuple(kinds), tuple(vocabulary), alike)


def read_answers(log: Path) -> list[dict[str, Any]]:
    """One record per slide, row and question of slides.jsonl, or of a pooled validation's answers.jsonl."""
    return [
        {"slide": line["slide"], "case": line["case"], "row": line["row"], **asked}
        for line in read_lines(log)
        for asked in line["asked"]
    ]


# A patch is never called this: of a source of tiles that training had left out 0 to 12 % were recognised.
UNSAID = ("carcinoma",)


def list_vocabulary(path: Path) -> list[str]:
    """Words of the kinds of a bank that live on two slides or more, whatever their split, but UNSAID."""
    sources = defaultdict(set)
    for split in ("train", "val", "test"):
        bank = load_bank(path, split)
        for kind, source in zip(bank.kinds, bank.sources):
            sources[str(kind)].add(str(source))
    told = [kind for kind, found in sources.items() if len(found) > 1 and kind not in (GLASS, *UNSAID)]
    return sorted(map(word_of, told))


def table_of_words(model: SparseWSI, bank: Bank) -> str:
    """Markdown: how often the nearest word of a labelled patch is that of its kind, and how many patches have one."""
    words, lines = model.words(place_rows(bank, np.arange(len(bank.kinds)))), []
    told = np.array([words.word(number) for number in words.nearest.tolist()])
    for kind in [*sorted(set(map(str, bank.kinds)) - {GLASS}), ""]:
        some = bank.kinds == kind if kind else bank.kinds != GLASS
        named = some & (told != UNKNOWN)
        right = np.array([word_of(str(each)) for each in bank.kinds]) == told
        known = not kind or word_of(kind) in model.limits.vocabulary
        share = f"{right[named].mean():.0%}" if named.any() and known else "" if known else "no word"
        lines.append([word_of(kind) if kind else "all", some.sum(), f"{named.sum() / some.sum():.0%}", share])
    return write_table(["kind", "views of patches", "with a word", "right of these"], lines)


def tell_commonest(model: SparseWSI, mosaics: Iterator[tuple[Bag, np.ndarray, set[str], Question]]) -> str:
    """How often the commonest word of a mosaic's patches is that of its commonest kind, where that has a word."""
    right, asked = 0, 0
    for bag, kinds, _, _ in mosaics:
        names, counts = np.unique(kinds, return_counts=True)
        word = word_of(str(names[counts.argmax()]))
        if word in model.limits.vocabulary:  # no slide as background has one
            told = [name for name in model.words(bag).shares if name != UNKNOWN]
            right, asked = right + (told[:1] == [word]), asked + 1
    share = estimate_share(right, asked)
    return (
        f"The commonest tissue, by the words of all patches: {right} of {asked} mosaics right, {share.value:.0%} "
        f"({share.low:.0%} to {share.high:.0%})."
    )


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--model")
    parser.add_argument("--slides", type=Path, help="bank of python -m train.data.real bank")
    parser.add_argument("--whole", type=Path, help="folder of python -m train.data.real whole: whole slides instead")
    add_flag(parser, "--bank")
    add_flag(parser, "--split")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    add_flag(parser, "--questions", help="number of mosaics; 0: none")
    add_flag(parser, "--n", default=1024)
    add_flag(parser, "--seed")
    parser.add_argument(
        "--limits", type=Path, help="--out of train.studies.pooled: write limits.json into the model's folder"
    )
    add_flag(parser, "--out")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = SparseWSI.from_pretrained(find_model_folder(given.model))
    given.out.mkdir(parents=True, exist_ok=True)
    text = []
    if given.slides:
        bank, slides = load_slides(given.slides, given.split)
        slides = tuple(slide for slide in slides if any(slide.facts.values()))
        bags = {slide.slide: slide_bag(bank, slide.slide) for slide in slides}
        if given.whole:
            bags = {
                slide: load_bag(given.whole / f"{slide}.safetensors")
                for slide in bags
                if (given.whole / f"{slide}.safetensors").exists()
            }
        asked = [slide for slide in slides if slide.slide in bags]
        records = answer_slides(
            model, bags, asked, slides, given.rows, model.config.num_tokens, given.out / "slides.jsonl"
        )
        records += probe_slides(load_slides(given.slides, "train"), bags, asked, slides)
        if given.limits:
            if not given.bank:
                parser.error("--limits needs --bank, for the words that the model has for patches")
            chosen = read_answers(given.limits / "answers.jsonl")
            model.limits = make_limits(chosen, records, list_vocabulary(given.bank), ALIKE)
            model.limits.save(find_model_folder(given.model))
        text.append(table_of_slides(records + add_majority(records), model.limits))
    if given.bank and given.questions:
        clean = None
        if given.slides:
            clean = absent_slides(
                bank, [slide.slide for slide in slides if slide.facts["carcinoma"] == slide.facts["malignant"] == "No"]
            )
        labelled = load_bank(given.bank, given.split)
        mosaics = make_mosaics(labelled, clean, given.questions, given.n, given.seed)
        rows = [row for row in given.rows if row != "all"]
        records = answer_mosaics(
            model, mosaics, given.questions, rows, model.config.num_tokens, given.out / "mosaics.jsonl"
        )
        text.append(table_of_mosaics(records))
        if model.limits.vocabulary:
            drawn = make_mosaics(labelled, clean, given.questions, given.n, given.seed)
            text.append(tell_commonest(model, drawn))
    if given.bank and model.limits.vocabulary:
        text.append(table_of_words(model, load_bank(given.bank, given.split)))
    write_text(given.out / "table.md", "\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    run_command(main)
