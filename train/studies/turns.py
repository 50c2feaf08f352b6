"""Whether a question is answered worse when others were asked before it in the same conversation.

    python -m train.studies.turns --model my-model --slides runs/slides.safetensors --phantoms runs/phantoms \\
        --out runs/turns

Val slides and val phantoms, every question of a case in one wording: alone, after one other question with the answer
that the model gave to it, and after two. The earlier ones are about other facts of the same case. Intervals of the
paired differences resample cases. The folder gets a line a case (turns.jsonl); a run that was stopped goes on.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsewsi.files import append_line, read_lines, write_text
from sparsewsi.model.prompt import build_prompt
from sparsewsi.model.selection import Selection
from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.example import Question
from train.data.phantoms import load_phantoms
from train.data.real import load_slides
from train.eval.table import write_table
from train.flags import add_flag, make_parser, run_command
from train.stage import find_model_folder
from train.studies.pooled import Case, phantom_cases, slide_cases
from train.studies.real import is_right

BEFORE = (0, 1, 2)  # earlier exchanges
DRAWS = 2000


@torch.no_grad()
def ask_after(
    model: SparseWSI, selection: Selection, earlier: Sequence[tuple[str, str]], question: Question
) -> list[float]:
    """Probabilities of the options after earlier questions and their answers."""
    messages = [
        {"role": role, "content": text} for exchange in earlier for role, text in zip(("user", "assistant"), exchange)
    ]
    messages.append({"role": "user", "content": question.question})
    prompt = build_prompt(model.tokenizer, messages, question.options)
    return model.mean_log_likelihoods(selection, prompt, list(question.options)).softmax(0).tolist()


def one_wording(questions: Sequence[Question]) -> list[Question]:
    """The first question of each kind; of "contains" all, as they are about different tissues."""
    kinds: dict[str, Question] = {}
    for question in questions:
        kinds.setdefault(question.question if question.family == "contains" else question.family, question)
    return list(kinds.values())


def answer_turns(model: SparseWSI, case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """The line of a case: every question of it after none, one and two others."""
    domain, name, bag, questions = case
    selection, asked = model.select(bag), one_wording(questions)
    alone = [ask_after(model, selection, (), question) for question in asked]
    said = [(q.question, q.options[int(np.argmax(probs))]) for q, probs in zip(asked, alone)]
    lines = []
    for number, question in enumerate(asked):
        others = [i for i in rng.permutation(len(asked)) if asked[i].family != question.family]
        probs = [alone[number]]
        probs += [ask_after(model, selection, [said[i] for i in others[:count]], question) for count in BEFORE[1:]]
        facts = {"kind": question.family, "options": list(question.options), "answer": question.answer}
        lines.append(facts | {"probs": probs})
    return {"domain": domain, "case": name, "slide": bag.slide, "asked": lines}


def table_of_turns(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: share right after so many exchanges, and the paired difference to none."""
    records = [(line["case"], asked) for line in lines for asked in line["asked"]]
    cases = np.array([case for case, _ in records])
    right = np.array([[is_right(asked | {"probs": probs}) for probs in asked["probs"]] for _, asked in records], float)
    said = np.array([[int(np.argmax(probs)) for probs in asked["probs"]] for _, asked in records])
    rng, names = np.random.default_rng(0), np.unique(cases)
    rows = {name: np.flatnonzero(cases == name) for name in names}
    draws = [np.concatenate([rows[name] for name in rng.choice(names, len(names))]) for _ in range(DRAWS)]
    cells = []
    for count in BEFORE:
        gap = 100 * (right[:, count] - right[:, 0])
        low, high = np.percentile([gap[drawn].mean() for drawn in draws], [2.5, 97.5])
        alike = f"{(said[:, count] == said[:, 0]).mean():.0%}"
        difference = f"{gap.mean():+.1f} ({low:+.1f} to {high:+.1f})" if count else ""
        cells.append([count, len(records), len(names), f"{right[:, count].mean():.1%}", difference, alike])
    return write_table(
        ["exchanges before", "questions", "cases", "right", "less than alone", "answered as alone"], cells
    )


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--model")
    parser.add_argument("--slides", type=Path, required=True, help="bank of python -m train.data.real bank")
    parser.add_argument("--phantoms", type=Path, required=True, help="folder of python -m train.data.phantoms")
    add_flag(parser, "--seed")
    add_flag(parser, "--out")
    given = parser.parse_args()
    model = SparseWSI.from_pretrained(find_model_folder(given.model))
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "turns.jsonl"

    def cases() -> Iterator[Case]:
        yield from slide_cases(*load_slides(given.slides, "val"))
        yield from phantom_cases(load_phantoms(given.phantoms, "val"))

    done = {line["slide"] for line in read_lines(log)}
    for number, case in enumerate(cases()):
        if case[2].slide not in done:
            append_line(log, answer_turns(model, case, np.random.default_rng((given.seed, 47, number))))
    text = table_of_turns(list(read_lines(log)))
    write_text(given.out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_command(main)
